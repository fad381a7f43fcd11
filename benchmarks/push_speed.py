"""How fast the push is: against the bare forward pass, alone, in memory, on two ranks, and beside other pushes.

``python benchmarks/push_speed.py --help`` tells what each case does. Every number is a median over paired repetitions:
in each repetition all sides work one after the other, in alternating order, and ratios are taken within a repetition.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Sizes
from measuring import save
from rich.console import Console
from showing import Parser, count, device_name, surroundings, table

TITLES = {
    "a": "a. push against the bare forward pass of the same backbone",
    "b": "b. the push alone, on ready-made maps of 49x256",
    "c": "c. peak memory against the number of images",
    "d": "d. one process against two ranks",
    "e": "e. beside other pushes, on the same ready-made maps",
    "f": "f. live prototypes on windows: push against the bare forward pass of all windows",
}
HELP = """\
cases:
  a  push / forward pass in eval mode without gradients, both over the same images in memory (Lite0 and ResNet-18,
     7x10 and 200x10 classes x prototypes, batches of 32). Goal: a ratio of at most 1.03. For information: the same
     with the head's projection on the other side too.
  b  push on feature maps that are there already, less the bare iteration of its loader, in milliseconds an image.
     Goals: 0.05 for 7x10, 0.10 for 200x10. Beside it the limit: one batched matrix product over the same maps.
  c  peak memory of fresh processes that push few and many maps (49x64, made when they are read). Goal: at most 10 MB
     apart.
  d  one process against two ranks that share the work, real images through Lite0: of gloo with a thread each, or of
     NCCL with a GPU each. Goal: 1.6 times faster.
  e  push alone beside the straightforward algorithm (collect, cdist, loop) and, where it is installed, cabrnet's
     ProtoPNet.project. Goal: 5 times faster than cabrnet.
  f  as a, with Lite0 on windows (64 pixels, stride 32) and live prototypes (7x10), which keep the features of their
     patches, by the processors' time (on a GPU: the clock's). Goal: a ratio of at most 1.1.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = Parser(description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    default, out = Sizes(), Path(__file__).parent / "results" / "push_speed.json"
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which (default: all)")
    for name, meaning in (
        ("images", "images of case a"),
        ("pixels", "their side, also in cases d and f"),
        ("maps", "maps of cases b and e"),
        ("few", "maps of case c's first process"),
        ("many", "maps of case c's second process"),
        ("rank-images", "images of case d"),
        ("windowed", "images of case f"),
        ("repetitions", "of every measurement; fewer than 5 are no measurement"),
    ):
        number = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=count, default=number, metavar="N", help=f"{meaning} (default: {number})")
    parser.add_argument("--device", type=device_name, default=default.device, help="(default: cpu)")
    parser.add_argument(
        "--out", type=Path, default=out, help="where the JSON goes (default: results/ beside this file)"
    )
    options = parser.parse_args(argv)
    if options.out.is_dir():
        parser.error(f"--out {options.out} is a folder; expected the name of a JSON file")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out} cannot be written: {error.strerror}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases asked for, show and save what they give."""
    options = parse(argv)
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.__dataclass_fields__})
    console = Console(width=None if sys.stdout.isatty() else 120)
    record: dict[str, Any] = surroundings(options.device) | {"sizes": vars(sizes), "cases": {}}
    if (record["load"] or 0) > 0.5:
        console.print(f"{record['load']:.1f} other processes were busy in the last minute: do not trust the timings")
    for case in sorted(set(options.cases)):
        torch.manual_seed(0)
        comparisons = list(CASES[case](sizes))
        console.print(table(TITLES[case], comparisons))
        record["cases"][case] = {
            "title": TITLES[case],
            "comparisons": [comparison.to_dict() for comparison in comparisons],
        }
        save(record, options.out)  # after every case: a later one may be interrupted
    console.print(f"Written to {options.out}")
    return 0


if __name__ == "__main__":
    logging.getLogger("protopush").setLevel(logging.ERROR)  # small trials have classes without an image
    sys.exit(main())
