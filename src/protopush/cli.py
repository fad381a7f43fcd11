"""The command line. It parses first; torch is imported when there is something to do.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protopush import __version__
from protopush.errors import FailedElsewhere, InputError
from protopush.parsing import add_data, add_json, parse

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

ABOUT = {
    "demo": "train, push and explain on solar cells, and leave pictures in runs/demo",
    "train": "train a prototype classifier and push it onto real patches",
    "push": "push a run's prototypes once more, into a new run",
    "evaluate": "accuracy, balanced accuracy, F1 and AUROC on a split",
    "explain": "show which patches of which training images an image looks like",
    "verify": "embed every anchor's file again and see whether it still holds",
    "forbid": "forbid a patch, an image or a region; the next best anchor takes its place",
    "data audit": "find leaks between splits, duplicates and damaged files in a data set",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except FailedElsewhere:  # the process where it failed says why
        return 2
    except InputError as error:
        print(f"protopush: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("protopush: interrupted; what was saved is still there; train goes on with --resume", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"protopush {__version__}")
        return 0
    if words[0] not in COMMANDS:
        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(COMMANDS)}"
        raise InputError(f"unknown command {words[0]!r}; {hint}")
    return COMMANDS[words[0]](words[1:])


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {about}" for name, about in ABOUT.items())
    return (
        "usage: protopush COMMAND [options]\n\n"
        "Prototype image classifiers whose prototypes are real patches of real training images.\n\n"
        f"{commands}\n\n"
        "  protopush COMMAND --help tells a command's options; protopush --version tells the version."
    )


def _parser(command: str) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    return ArgumentParser(prog=f"protopush {command}", description=ABOUT[command], exit_on_error=False)


def _log_to_stderr() -> None:
    from protopush.training.progress import log_to_stderr

    log_to_stderr(logging.INFO if _is_first() else logging.ERROR)


def _is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun or Fabric started."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def _print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False))


def _train_parser(command: str) -> ArgumentParser:
    from protopush.training.config import RunConfig

    parser = _parser(command)
    parser.add_argument("--config", action="config", help="a recipe (YAML); options after it override it")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the run in --out")
    parser.add_class_arguments(RunConfig)
    return parser


def demo(words: list[str]) -> int:
    """``protopush demo``."""
    parser = _train_parser("demo")
    parser.add_argument("--out", type=str, default="runs/demo", help="the run folder; replaced if it is a run")
    recipe = ["--config", str(_recipe("elpv"))] if "--config" not in words else []
    options = parse(parser, [*recipe, *words])
    _log_to_stderr()
    from protopush.demo import run_demo

    print(run_demo(_config(parser, options), Path(options.out)))
    return 0


def train(words: list[str]) -> int:
    """``protopush train``."""
    parser = _train_parser("train")
    parser.add_argument("--out", type=str, required=True, help="the run folder to write")
    parser.add_argument("--resume", action="store_true", help="go on where a run in --out was cut off")
    options = parse(parser, words)
    _log_to_stderr()
    from protopush.training.loop import train as train_run

    run = train_run(_config(parser, options), options.out, overwrite=options.overwrite, resume=options.resume)
    if _is_first():
        print(
            f"Trained {run.folder}. Next: protopush evaluate {run.folder} --data.split test; "
            f"protopush verify {run.folder}"
        )
    return 0


def _config(parser: ArgumentParser, options: Any) -> Any:
    from protopush.training.config import RunConfig

    made = parser.instantiate(options)
    return RunConfig(made.data, made.model, made.loss, made.push, made.train, made.trainer)


def _recipe(name: str) -> Path:
    """A recipe that ships with the package, or lies in the repository."""
    here = Path(__file__).parent
    for folder in (here / "recipes", here.parent.parent / "recipes"):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise InputError(f"no recipe {name!r}; give --config FILE.yaml")


def push(words: list[str]) -> int:
    """``protopush push``."""
    parser = _parser("push")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--out", type=str, required=True, help="the run folder to write")
    parser.add_argument("--momentum", type=float, default=0.9, help="0 puts prototypes onto their patches")
    parser.add_argument("--use_local", type=bool, default=True, help="patches, or pooled features")
    parser.add_argument("--unique", type=str, default="none", help="none; patch, image or group: not shared in a class")
    parser.add_argument("--interpolation", type=str, default="linear", help="linear or slerp")
    parser.add_argument("--guard", type=str, default="off", help="off, report, rollback or budget, on the val split")
    parser.add_argument("--guard_budget", type=float, default=0.01, help="fall of balanced accuracy or AUROC allowed")
    parser.add_argument("--max_patches_per_class", type=int | None, default=None, help="bound the work")
    parser.add_argument(
        "--data.split", type=str, default="train", help="the split whose images prototypes may stand for"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the run in --out")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    _log_to_stderr()
    from protopush.commands import push_run

    report = push_run(options)
    _print_json(report.to_dict()) if options.json else print(report)
    return 0


def evaluate(words: list[str]) -> int:
    """``protopush evaluate``."""
    parser = _parser("evaluate")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--data.split", type=str, default="test", help="train, val, test or all")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    _log_to_stderr()
    from protopush.commands import evaluate_run, metrics_table

    metrics = evaluate_run(options)
    _print_json(metrics) if options.json else print(metrics_table(metrics))
    return 0


def explain(words: list[str]) -> int:
    """``protopush explain``."""
    parser = _parser("explain")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("images", type=str, nargs="+", help="image files")
    parser.add_argument("--out", type=str, required=True, help="folder for the panels (PNG) and their data (JSON)")
    parser.add_argument("--rows", type=int, default=5, help="prototypes shown in a panel")
    parser.add_argument("--top_classes", type=int, default=3, help="classes told in the JSON")
    add_json(parser)
    options = parse(parser, words)
    _log_to_stderr()
    from protopush.commands import explain_images

    found = explain_images(options)
    if options.json:
        _print_json(found)
    else:
        for item in found:
            print(f"{item['file']}: {item['predicted_name']} ({item['probability']:.1%}) -> {item['panel']}")
    return 0


def verify(words: list[str]) -> int:
    """``protopush verify``."""
    parser = _parser("verify")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--root", type=str | None, default=None, help="where the training images are now")
    add_json(parser)
    options = parse(parser, words)
    _log_to_stderr()
    from protopush.commands import anchors_table, verify_run

    checks = verify_run(options)
    holds = all(check.holds for check in checks)
    if options.json:
        _print_json({"holds": holds, "anchors": [check.to_dict() for check in checks]})
    else:
        print(anchors_table(checks))
    return 0 if holds else 1


def forbid(words: list[str]) -> int:
    """``protopush forbid``."""
    parser = _parser("forbid")
    parser.add_argument("run", type=str, help="a run folder; it is changed in place")
    parser.add_argument(
        "--prototype", type=str | None, default=None, help="CLASS:NUMBER: the patch that it stands for (mel:3, or 4:3)"
    )
    parser.add_argument("--image", type=str | None, default=None, help="a training image: none of its patches")
    parser.add_argument(
        "--mask-column", "--mask_column", action="store_true", help="whatever lies outside the manifest's masks"
    )
    parser.add_argument("--min_share", type=float, default=0.5, help="share of a patch that must lie inside its mask")
    parser.add_argument("--reason", type=str, required=True, help="why, for those who read the log later")
    parser.add_argument("--who", type=str | None, default=None, help="who decides; by default your login name")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    _log_to_stderr()
    from protopush.commands import decision_table, forbid_run

    decision = forbid_run(options)
    _print_json(decision.to_dict()) if options.json else print(decision_table(decision, options.run))
    return 0


def data(words: list[str]) -> int:
    """``protopush data audit``."""
    if words[:1] != ["audit"]:
        raise InputError("expected: protopush data audit PATH; protopush data audit --help tells the options")
    from protopush.data.similar import THRESHOLD

    parser = _parser("data audit")
    parser.add_argument("path", type=str, nargs="?", default="", help="a folder, a manifest (CSV) or a .npz")
    parser.add_argument("--source", type=str, default="auto", help="the kind of data, where it can't be recognised")
    parser.add_argument("--split_seed", type=int, default=0, help="decides the splits where the data have none")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="similarity of near duplicates, at most 1")
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    options = parse(parser, words[1:])
    _log_to_stderr()
    from protopush.commands import audit_data, audit_table

    found = audit_data(options)
    _print_json(found.to_dict()) if options.json else print(audit_table(found))
    return 1 if found.leaks else 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "train": train,
    "push": push,
    "evaluate": evaluate,
    "explain": explain,
    "verify": verify,
    "forbid": forbid,
    "data": data,
}

if __name__ == "__main__":
    sys.exit(main())
