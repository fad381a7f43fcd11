"""``protopush demo``, ``train`` and ``push``.

``protopush evaluate``, ``explain``, ``report`` and ``compare``.

``protopush predict``.

``protopush verify``, ``forbid`` and ``data audit``: exit code 1 where a check fails.

``protopush app``.

``protopush export``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from protopush.cli.parser import add_data, add_json, is_first, log, new_parser, parse, print_json
from protopush.errors import InputError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
import sys
from typing import TYPE_CHECKING


def demo(words: list[str]) -> int:
    """``protopush demo``."""
    parser = train_parser("demo")
    parser.add_argument("--out", type=str, default="runs/demo", help="the run folder; replaced if it is a run")
    config = ["--config", str(_recipe("elpv"))] if "--config" not in words else []
    options = parse(parser, [*config, *words])
    log()
    from protopush.cli.demo import run_demo

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
    from protopush.push.options import PushSettings

    parser = new_parser("push")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--out", type=str, required=True, help="the run folder to write")
    parser.add_argument("--use_local", type=bool, default=True, help="patches, or pooled features")
    parser.add_class_arguments(PushSettings)
    parser.add_argument(
        "--data.split", type=str, default="train", help="the split whose images prototypes may stand for"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the run in --out")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.api import push_run

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


def evaluate(words: list[str]) -> int:
    """``protopush evaluate``."""
    parser = new_parser("evaluate")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--data.split", type=str, default="test", help="train, val, test or all")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.api import evaluate_run
    from protopush.cli.tables import metrics_table

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
    from protopush.api import explain_images

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
    from protopush.api import report_run

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
    from protopush.api import compare_runs
    from protopush.cli.tables import comparison_table

    found = compare_runs(options)
    print_json(found) if options.json else print(comparison_table(found))
    return 0


def _add_measuring(parser: ArgumentParser) -> None:
    parser.add_argument("--data.split", type=str, default="test", help="train, val, test or all")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap behind the intervals; 0: none")
    parser.add_argument(
        "--faithfulness", type=int, default=48, help="images that faithfulness is measured on (slow); 0: none"
    )


def predict(words: list[str]) -> int:
    """``protopush predict``."""
    parser = new_parser("predict")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument(
        "paths", type=str, nargs="+", metavar="PATH", help="folders, manifests (CSV image[,label]) or image files"
    )
    parser.add_argument(
        "--out", type=str, required=True, help="the CSV file; after a kill, the same words go on with it"
    )
    parser.add_argument("--top", type=int, default=3, help="prototypes told for each image; 0: none")
    parser.add_argument(
        "--threshold",
        type=float | None,
        default=None,
        help="similarity below which nothing in training is like an image; by default set on the validation images",
    )
    parser.add_argument("--share", type=float, default=0.05, help="of validation images that may be below it")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever is there")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.api import predict_files
    from protopush.predict.summary import in_words

    try:
        found = predict_files(options)
    except KeyboardInterrupt as stop:
        raise type(stop)("the same command, without --overwrite, goes on where it stopped") from None
    if is_first():
        print_json(found) if options.json else print(in_words(found))
    return 0


def verify(words: list[str]) -> int:
    """``protopush verify``."""
    parser = new_parser("verify")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--root", type=str | None, default=None, help="where the training images are now")
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.api import verify_run
    from protopush.cli.tables import anchors_table

    checks = verify_run(options)
    holds = all(check.holds for check in checks)
    if options.json:
        print_json({"holds": holds, "anchors": [check.to_dict() for check in checks]})
    else:
        print(anchors_table(checks))
    return 0 if holds else 1


def forbid(words: list[str]) -> int:
    """``protopush forbid``."""
    parser = new_parser("forbid")
    parser.add_argument("run", type=str, help="a run folder; it is changed in place")
    parser.add_argument(
        "--prototype", type=str | None, default=None, help="CLASS:NUMBER: the patch that it stands for (mel:3, or 4:3)"
    )
    parser.add_argument("--image", type=str | None, default=None, help="a training image: none of its patches")
    parser.add_argument(
        "--mask-column", "--mask_column", action="store_true", help="whatever lies outside the manifest's masks"
    )
    parser.add_argument("--min_share", type=float, default=0.5, help="share of a patch that must lie inside its mask")
    parser.add_argument("--undo", type=int | None, default=None, help="a decision's number: it holds no more")
    parser.add_argument("--reason", type=str, required=True, help="why, for those who read the log later")
    parser.add_argument("--who", type=str | None, default=None, help="who decides; by default your login name")
    add_data(parser)
    add_json(parser)
    options = parse(parser, words)
    log()
    from protopush.api import forbid_run
    from protopush.cli.tables import decision_table

    decision = forbid_run(options)
    print_json(decision.to_dict()) if options.json else print(decision_table(decision, options.run))
    return 0


def data(words: list[str]) -> int:
    """``protopush data audit``."""
    if words[:1] != ["audit"]:
        raise InputError("expected: protopush data audit PATH; protopush data audit --help tells the options")
    from protopush.data.similar import THRESHOLD

    parser = new_parser("data audit")
    parser.add_argument("path", type=str, nargs="?", default="", help="a folder, a manifest (CSV) or a .npz")
    parser.add_argument("--source", type=str, default="auto", help="the kind of data, where it can't be recognised")
    parser.add_argument("--split_seed", type=int, default=0, help="decides the splits where the data have none")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="similarity of near duplicates, at most 1")
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    options = parse(parser, words[1:])
    log()
    from protopush.api import audit_data
    from protopush.cli.tables import audit_table

    found = audit_data(options)
    print_json(found.to_dict()) if options.json else print(audit_table(found))
    return 1 if found.leaks else 0


def app(words: list[str]) -> int:
    """``protopush app``."""
    parser = new_parser("app")
    parser.add_argument("run", type=str, help="a run folder; decisions change it in place")
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="the address to listen on; there are no passwords"
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--max_megabytes", type=float, default=20.0, help="of an uploaded file")
    parser.add_argument("--max_megapixels", type=float, default=50.0, help="of an uploaded image")
    parser.add_argument("--data.path", type=str | None, default=None, help="where the training images are now")
    parser.add_argument("--data.source", type=str | None, default=None, help="auto, or a source of docs/data.md")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or mps")
    options = parse(parser, words)
    log()
    from protopush.api import data_of, open_with
    from protopush.app.run_store import Desk
    from protopush.app.serve import serve
    from protopush.app.upload import Limits

    run, device = open_with(options)
    desk = Desk(Path(options.run), data_of(run, options), device)
    serve(desk, Limits(options.max_megabytes, options.max_megapixels), options.host, options.port)
    return 0


def export(words: list[str]) -> int:
    """``protopush export``."""
    parser = new_parser("export")
    parser.add_argument("run", type=str, help="a run folder")
    parser.add_argument("--format", type=str, default="onnx", help="onnx")
    parser.add_argument("--out", type=str | None, default=None, help="the file; by default RUN/model.onnx")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference to PyTorch; above it nothing is written"
    )
    parser.add_argument("--json", action="store_true", help="print JSON to stdout")
    options = parse(parser, words)
    log()
    from protopush.api import export_run
    from protopush.runs.onnx_export import ParityError

    try:
        done = export_run(options)
    except ParityError as error:
        print(f"protopush: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    if options.json:
        print_json(done.to_dict())
    else:
        told = f"{done.megabytes:.1f} MB, opset {done.opset}, largest difference to PyTorch {done.difference:.1g}"
        print(f"Exported: {done.file} ({told})")
    return 0
