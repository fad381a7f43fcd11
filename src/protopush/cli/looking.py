"""``protopush evaluate``, ``explain``, ``report`` and ``compare``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protopush.cli.options import log, new_parser, print_json
from protopush.parsing import add_data, add_json, parse

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def evaluate(words: list[str]) -> int:
    """``protopush evaluate``."""
    parser = new_parser("evaluate")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--data.split", type=str, default="test", help="train, val, test or all")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.commands.looking import evaluate_run
    from protopush.tables import metrics_table

    metrics = evaluate_run(options)
    print_json(metrics) if options.json else print(metrics_table(metrics))
    return 0


def explain(words: list[str]) -> int:
    """``protopush explain``."""
    parser = new_parser("explain")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("images", type=str, nargs="+", help="image files")
    parser.add_argument("--out", type=str, required=True, help="folder for the panels (PNG) and their data (JSON)")
    parser.add_argument("--rows", type=int, default=5, help="prototypes shown in a panel")
    parser.add_argument("--top_classes", type=int, default=3, help="classes told in the JSON")
    parser.add_argument(
        "--why-not",
        "--why_not",
        type=str | None,
        default=None,
        help="a class: also show why it isn't the predicted one",
    )
    parser.add_argument(
        "--regions", type=bool, default=False, help="find what each prototype shown depends on, by hiding parts (slow)"
    )
    parser.add_argument("--narrow", type=bool, default=False, help="panels for a phone's width")
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.commands.looking import explain_images

    found = explain_images(options)
    if options.json:
        print_json(found)
    else:
        for item in found:
            print(f"{item['file']}: {item['predicted_name']} ({item['probability']:.1%}) -> {item['panel']}")
    return 0


def report(words: list[str]) -> int:
    """``protopush report``."""
    parser = new_parser("report")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--out", type=str | None, default=None, help="the HTML file; by default RUN/report.html")
    parser.add_argument("--against", type=str, nargs="+", default=[], help="other runs, to be shown beside this one")
    parser.add_argument("--audit", type=bool, default=True, help="look for leaks between the splits as well")
    _add_measuring(parser)
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.commands.looking import report_run

    told = report_run(options)
    print_json(told) if options.json else print(f"Report: {told['report']} ({told['megabytes']:.1f} MB)")
    return 0


def compare(words: list[str]) -> int:
    """``protopush compare``."""
    parser = new_parser("compare")
    parser.add_argument("runs", type=str, nargs="+", help="run folders, two or more")
    _add_measuring(parser)
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.commands.looking import compare_runs
    from protopush.tables import comparison_table

    found = compare_runs(options)
    print_json(found) if options.json else print(comparison_table(found))
    return 0


def _add_measuring(parser: ArgumentParser) -> None:
    parser.add_argument("--data.split", type=str, default="test", help="train, val, test or all")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap behind the intervals; 0: none")
    parser.add_argument(
        "--faithfulness", type=int, default=48, help="images that faithfulness is measured on (slow); 0: none"
    )
