"""The quick form of each benchmark of speed, held against the committed figures: what has moved by more than a tenth.

Ratios are compared, since both of their sides ran here, one after the other; milliseconds and megabytes of another
machine are shown beside them, and say nothing where the machine is another one. Few images and repetitions: a move is
a reason to run the benchmark as a whole, not a result.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from showing import Parser

HERE = Path(__file__).parent
MOVED = 0.1
SIZES = re.compile(r"batch(es)? of \d+, |\d+ images, |\d+ crops, ")  # words of a setting that a quick run has otherwise

# Script, its quick options, and the files of its committed figures.
QUICK: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "push": (
        "push_speed.py",
        "--cases a b e f --images 32 --maps 1024 --windowed 8 --repetitions 3",
        ("push_speed.json", "push_speed_windows.json"),
    ),
    "explain": ("explain_speed.py", "--batch 8 --repetitions 5", ("explain_speed.json",)),
    "live": ("live_speed.py", "--repetitions 2 --backbones tf_efficientnet_lite0", ("live_speed.json",)),
    "predict": ("predict_speed.py", "RUN DATA --images 64 --repetitions 3", ("predict_speed.json",)),
    "onnx": ("onnx_speed.py", "RUN --images 8 --repetitions 5", ("onnx_speed.json",)),
    "serve": ("serve_speed.py", "WINDOWED_RUN DATA --requests 48 --repetitions 1", ("serve_speed.json",)),
}
TRAINING = "--model.backbone tf_efficientnet_lite0 --train.epochs 1 --trainer.device cpu"
RUNS = {"RUN": "--model.windows null", "WINDOWED_RUN": "--model.windows.size 64 --model.windows.stride 32"}
ROWS = {"train": 15, "val": 5, "test": 10}  # of each class, that the run is trained on


class Figure(NamedTuple):
    """A median of a benchmark: of which case and setting, and its unit; a ratio has none."""

    case: str
    setting: str
    name: str
    unit: str
    median: float

    @property
    def key(self) -> tuple[str, str, str]:
        """The same for another number of images."""
        return self.case, SIZES.sub("", self.setting), self.name


def figures(found: dict[str, Any]) -> Iterator[Figure]:
    """All results that a benchmark's JSON holds."""
    cases = found.get("cases") or {"": found}
    for case, content in cases.items():
        for comparison in content.get("comparisons", ()):
            for one in comparison["results"]:
                yield Figure(case, comparison["setting"], one["name"], one["unit"], one["median"])


def held_against(here: dict[str, Any], committed: Sequence[dict[str, Any]]) -> list[tuple[Figure, Figure]]:
    """Each figure of a quick run that is among the committed ones, behind that one."""
    before = {one.key: one for found in committed for one in figures(found)}
    return [(before[now.key], now) for now in figures(here) if now.key in before]


def has_moved(before: Figure, now: Figure) -> bool:
    """Whether a ratio is another one; what depends on the machine says nothing."""
    return not now.unit and not 1 - MOVED <= now.median / before.median <= 1 + MOVED


def small_runs(data: Path, folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Those of RUNS that are named, on a few images of a manifest with splits; DATA is the manifest of these."""
    seen, rows = Counter[tuple[str, str]](), list[list[str]]()
    with data.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            seen[row["split"], row["label"]] += 1
            if seen[row["split"], row["label"]] <= ROWS.get(row["split"], 0):
                rows.append([str(data.parent.resolve() / row["image"]), row["label"], row["split"]])
    few = folder / "few.csv"
    with few.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "label", "split"], *rows])
    given, command = {"DATA": str(few)}, [sys.executable, "-m", "protopush", "train", "--data.source", "manifest"]
    for name in names:
        given[name] = str(folder / name)
        words = [*command, "--data.path", str(few), "--out", given[name], *TRAINING.split(), *RUNS[name].split()]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip().splitlines()[-1])
    return given


def quick(name: str, given: dict[str, str], folder: Path) -> dict[str, Any] | str:
    """What the quick form of a benchmark has found, or its last line where it failed."""
    script, options, _ = QUICK[name]
    out = folder / f"{name}.json"
    words = [given.get(word, word) for word in options.split()]
    done = subprocess.run(
        [sys.executable, str(HERE / script), *words, "--out", str(out)], capture_output=True, text=True
    )
    if out.is_file():  # a goal that so few images miss is no failure
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}, nothing was printed"])[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 where a benchmark failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(QUICK)} (default: all)")
    parser.add_argument("--data", type=Path, help="a manifest with splits, for those that need a run; else left out")
    args = parser.parse_args(argv)
    names = args.names or [name for name, (_, words, _) in QUICK.items() if args.data or "RUN" not in words]
    if unknown := [name for name in names if name not in QUICK]:
        parser.error(f"no benchmark {unknown[0]!r}; expected some of {', '.join(QUICK)}")
    if not args.data and (without := [name for name in names if "RUN" in QUICK[name][1]]):
        parser.error(f"{without[0]} needs images; give --data MANIFEST")
    ratios = Table("what", "committed", "here", "here / committed", title="Ratios")
    numbers = Table("what", "committed", "here", title="What depends on the machine")
    moved, failed, given = list[str](), list[str](), dict[str, str]()
    scratch = tempfile.TemporaryDirectory(prefix="protopush-bench-")
    if args.data:
        given = small_runs(args.data, Path(scratch.name), {QUICK[name][1].split()[0] for name in names} & RUNS.keys())
    for name in names:
        started, (script, options, files) = time.perf_counter(), QUICK[name]
        print(f"{name}: python benchmarks/{script} {options}", flush=True)
        found = quick(name, given, Path(scratch.name))
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        if isinstance(found, str):
            failed.append(f"failed: {name}: {found}")
            continue
        committed = [json.loads((HERE / "results" / file).read_text(encoding="utf-8")) for file in files]
        for before, now in held_against(found, committed):
            what = f"{name} {now.case}: {now.setting}: {now.name}".replace(" :", ":")
            if now.unit:
                numbers.add_row(what, f"{before.median:.4g} {now.unit}", f"{now.median:.4g} {now.unit}")
                continue
            ratios.add_row(what, f"{before.median:.3g}", f"{now.median:.3g}", f"{now.median / before.median:.2f}")
            moved += [f"{what}: {before.median:.3g} -> {now.median:.3g}"] if has_moved(before, now) else []
    Console(width=160).print(ratios, numbers)
    print(
        "\n".join(
            [f"Moved by more than {MOVED:.0%}:", *moved] if moved else [f"Nothing moved by more than {MOVED:.0%}."]
        )
    )
    print("".join(f"{one}\n" for one in failed), end="")
    scratch.cleanup()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
