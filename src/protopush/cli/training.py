"""``protopush demo``, ``train`` and ``push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from protopush.cli.options import is_first, log, new_parser, print_json
from protopush.errors import InputError
from protopush.parsing import add_data, add_json, parse

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def demo(words: list[str]) -> int:
    """``protopush demo``."""
    parser = train_parser("demo")
    parser.add_argument("--out", type=str, default="runs/demo", help="the run folder; replaced if it is a run")
    config = ["--config", str(_recipe("elpv"))] if "--config" not in words else []
    options = parse(parser, [*config, *words])
    log()
    from protopush.demo import run_demo

    print(run_demo(config_of(parser, options), Path(options.out)))
    return 0


def train(words: list[str]) -> int:
    """``protopush train``."""
    parser = train_parser("train")
    parser.add_argument("--out", type=str, required=True, help="the run folder to write")
    parser.add_argument("--resume", action="store_true", help="go on where a run in --out was cut off")
    options = parse(parser, words)
    log()
    from protopush.training.loop import train as train_run

    run = train_run(config_of(parser, options), options.out, overwrite=options.overwrite, resume=options.resume)
    if is_first():
        print(
            f"Trained {run.folder}. Next: protopush evaluate {run.folder} --data.split test; "
            f"protopush verify {run.folder}"
        )
    return 0


def push(words: list[str]) -> int:
    """``protopush push``."""
    parser = new_parser("push")
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
    log()
    from protopush.commands.changing import push_run

    report = push_run(options)
    print_json(report.to_dict()) if options.json else print(report)
    return 0


def train_parser(command: str) -> ArgumentParser:
    """The parser of all that a recipe can say."""
    from protopush.training.config import RunConfig

    parser = new_parser(command)
    parser.add_argument("--config", action="config", help="a recipe (YAML); options after it override it")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the run in --out")
    parser.add_class_arguments(RunConfig)
    return parser


def config_of(parser: ArgumentParser, options: Any) -> Any:
    """What was parsed, as a :class:`protopush.training.config.RunConfig`."""
    from protopush.training.config import RunConfig

    made = parser.instantiate(options)
    return RunConfig(made.data, made.model, made.loss, made.push, made.train, made.trainer)


def _recipe(name: str) -> Path:
    """A recipe that ships with the package, or lies in the repository."""
    here = Path(__file__).parent.parent
    for folder in (here / "recipes", here.parent.parent / "recipes"):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise InputError(f"no recipe {name!r}; give --config FILE.yaml")
