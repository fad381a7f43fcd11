"""The quick form of each benchmark of speed, held against the committed figures: what has moved by more than a tenth.

Ratios are compared, since both of their sides ran here, one after the other; milliseconds and megabytes of another
machine are shown beside them, and say nothing where the machine is another one. Few images and repetitions: a move is
a reason to run the benchmark as a whole, not a result.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from showing import Parser

HERE = Path(__file__).parent
MOVED = 0.1

# Script, its quick options, and the files of its committed figures.
QUICK: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "push": (
        "push_speed.py",
        "--cases a b e f --images 32 --maps 512 --windowed 8 --repetitions 3",
        ("push_speed.json", "push_speed_windows.json"),
    ),
    "explain": ("explain_speed.py", "--batch 8 --repetitions 5", ("explain_speed.json",)),
    "live": ("live_speed.py", "--batch 8 --repetitions 3 --backbones tf_efficientnet_lite0", ("live_speed.json",)),
    "predict": ("predict_speed.py", "--images 64 --repetitions 3", ("predict_speed.json",)),
    "onnx": ("onnx_speed.py", "--images 8 --repetitions 5", ("onnx_speed.json",)),
}


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
        words = [word for word in self.setting.split(", ") if not any(digit.isdigit() for digit in word.split()[0][:1])]
        kept = [word for word in words if not word.startswith("batch")]
        return self.case, ", ".join(kept) or self.setting, self.name


def figures(found: dict[str, Any]) -> Iterator[Figure]:
    """All results that a benchmark's JSON holds."""
    cases = found.get("cases") or {"": found}
    for case, content in cases.items():
        for comparison in content.get("comparisons", ()):
            for one in comparison["results"]:
                yield Figure(case, comparison["setting"], one["name"], one["unit"], one["median"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 where a benchmark failed."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(QUICK)} (default: all)")
    names = parser.parse_args(argv).names or list(QUICK)
    if unknown := [name for name in names if name not in QUICK]:
        parser.error(f"no benchmark {unknown[0]!r}; expected some of {', '.join(QUICK)}")
    table, failed = Table("what", "committed", "here", "here / committed", title="Ratios"), list[str]()
    plain = Table("what", "committed", "here", title="Numbers that depend on the machine")
    moved = list[str]()
    for name in names:
        script, options, files = QUICK[name]
        started = time.perf_counter()
        print(f"{name}: python benchmarks/{script} {options}", flush=True)
        with tempfile.TemporaryDirectory(prefix="protopush-bench-") as folder:
            out = Path(folder) / "quick.json"
            command = [sys.executable, str(HERE / script), *options.split(), "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            if not out.is_file():  # a goal that is missed by so few images is no failure
                failed.append(f"{name}: {(done.stderr.strip().splitlines() or ['nothing was printed'])[-1]}")
                continue
            here = {one.key: one for one in figures(json.loads(out.read_text(encoding="utf-8")))}
        committed = {
            one.key: one
            for file in files
            for one in figures(json.loads((HERE / "results" / file).read_text(encoding="utf-8")))
        }
        for key, now in here.items():
            if (before := committed.get(key)) is None:
                continue
            what = f"{name}{f' {now.case}' if now.case else ''}: {now.setting}: {now.name}"
            if now.unit:
                plain.add_row(what, f"{before.median:.4g} {now.unit}", f"{now.median:.4g} {now.unit}")
                continue
            ratio = now.median / before.median
            table.add_row(what, f"{before.median:.3g}", f"{now.median:.3g}", f"{ratio:.2f}")
            if abs(ratio - 1) > MOVED:
                moved.append(f"{what}: {before.median:.3g} -> {now.median:.3g}")
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    console = Console(width=160)
    console.print(table, plain)
    print("\n".join([f"Moved by more than {MOVED:.0%}:", *moved]) if moved else "Nothing moved by more than a tenth.")
    print("\n".join(f"failed: {one}" for one in failed), end="\n" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
