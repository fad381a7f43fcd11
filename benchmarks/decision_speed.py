"""What a decision about a prototype takes: from the run's candidates, and by reading its class as before.

``python benchmarks/decision_speed.py RUN`` works on a copy of a run that was trained on images which are still where
they were. Each decision is taken and undone again, so that the next repetition finds the run as it was; opening the run
is part of it, starting Python and importing are not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from measuring import Comparison, Goal, save, timed
from rich.console import Console
from showing import Parser, count, surroundings, table

from protopush._compat import ensure_torchvision

ensure_torchvision()
import protopush  # noqa: E402
from protopush.app.run_store import RunStore  # noqa: E402
from protopush.runs.candidates import KeptCandidates  # noqa: E402

OUT = Path(__file__).parent / "results" / "decision_speed.json"


@contextmanager
def whole_reads() -> Iterator[None]:
    """The images of the class are read, as where there are no candidates."""
    with patch.object(KeptCandidates, "bounds", lambda *_: None):
        yield


def compare(folder: Path, prototype: str, device: str, repetitions: int, whole: bool) -> Comparison:
    """A decision and its undo, each way."""
    run = protopush.open_run(folder, device=device, num_workers=0)
    store = RunStore(folder, run.data, run.device)

    def undo() -> None:
        holding = [made.id for made in store.decisions() if made.kind == "prototype"]
        run.forbid(undo=holding[-1], reason="again")

    def forbid() -> None:
        run.forbid(prototype=prototype, reason="to see how long it takes")

    def slowly() -> None:
        with whole_reads():
            forbid()

    sides: dict[str, Callable[[], object]] = {  # in this order: an undo needs its decision before it
        "forbid, candidates": forbid,
        "undo": undo,
        "what if": lambda: run.forbid(prototype=prototype, reason="what if", dry_run=True),
        "what if, in the app": lambda: store.what_if(prototype),
        "forbid, in the app": lambda: store.forbid(prototype, "to see how long it takes", "benchmark"),
        "undo, in the app": lambda: store.undo(store.decisions()[-1].id, "again", "benchmark"),
    }
    if whole:
        sides |= {"forbid, whole class": slowly, "undo after it": undo}
    timings: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(repetitions + 1):
        for name, work in sides.items():
            took = timed(work)()
            if repetition:  # the first one imports what it needs
                timings[name].append(took)
    label = run.class_names.index(prototype.split(":")[0])
    images = sum(sample.label == label for sample in store.catalog(run).split("train"))
    found = Comparison(f"{prototype}, {images} images of its class", "s", timings)
    found.add("forbid", lambda one: one["forbid, candidates"], "s", Goal(1.0))
    found.add("what if", lambda one: one["what if"], "s", Goal(1.0))
    found.add("forbid, in the app", lambda one: one["forbid, in the app"], "s", Goal(0.3))
    if whole:
        found.add("whole class / candidates", lambda one: one["forbid, whole class"] / one["forbid, candidates"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prototypes", nargs="+", required=True, metavar="CLASS:NUMBER")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=count, default=5)
    parser.add_argument("--whole", action="store_true", help="also by reading the class (slow)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="protopush-bench-") as folder:
        copy = Path(shutil.copytree(args.run, Path(folder) / "run"))
        found = [compare(copy, name, args.device, args.repetitions, args.whole) for name in args.prototypes]
    Console().print(table("Decisions", found))
    save({**surroundings(), "comparisons": [one.to_dict() for one in found]}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
