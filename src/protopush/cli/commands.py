"""Commands: a function each, whose signature and docstring are its parser (:mod:`protopush.cli.parser`).

What stands before the star is given as a word without a name; ``options`` are the optional arguments of the method of
:class:`protopush.Run` that has the command's name. Nothing heavy is imported outside of the bodies.
"""

from __future__ import annotations

import json as json_text
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protopush.api import Run, audit_catalog, open_run
from protopush.errors import InputError, Positive, check_fields

if TYPE_CHECKING:
    from protopush.training.config import RunConfig

PANELS = {"right": "surest-right", "unsure": "least-sure", "wrong": "surest-wrong"}  # of the demo's cases


@dataclass(frozen=True)
class Pictures:
    """Images that are read.

    Args:
        max_megapixels: of an image, in millions of pixels; by default what was allowed in training.
    """

    max_megapixels: float | None = None


@dataclass(frozen=True)
class Images(Pictures):
    """Images that are read.

    Args:
        path: other data than the run was trained on.
        source: auto, or a source of docs/data.md.
        num_workers: processes that read images.
    """

    path: str = ""
    source: str = ""
    num_workers: int = 2


@dataclass(frozen=True)
class Split(Images):
    """Images that are read.

    Args:
        split: train, val, test or all.
    """

    split: str = "test"


@dataclass(frozen=True)
class DataSet:
    """The data set.

    Args:
        path: the same as PATH.
        source: the kind of data, where it can't be recognised.
        split_seed: decides the splits where the data have none.
        max_megapixels: of an image, in millions of pixels; larger ones count as unreadable.
    """

    path: str = ""
    source: str = "auto"
    split_seed: int = 0
    max_megapixels: Positive = 100.0


def demo(*, config: RunConfig, out: str = "runs/demo") -> int:
    """Train, push and explain on solar cells, and leave pictures in runs/demo.

    Args:
        out: the run folder; replaced if it is a run.
    """
    from protopush.cli.tables import demo_words
    from protopush.report.cases import select_cases
    from protopush.training.trainer import train as train_run

    started = time.perf_counter()
    folder = train_run(config, Path(out), overwrite=True).folder
    run = open_run(folder, num_workers=config.data.num_workers, device="cpu")
    page, measured = run.report(faithfulness=6)
    samples, cases = measured.dataset.samples, select_cases(measured.probabilities, measured.labels, each=1)
    shown = {PANELS[kind]: samples[i].image for kind, some in cases.items() for i in some}
    found = run.explain(list(shown.values()), Path(out) / "explanations", names=list(shown))
    panels, image = [one["panel"] for one in found], Path(os.path.relpath(samples[0].image))
    numbers, seconds = measured.numbers["classification"], time.perf_counter() - started
    print(demo_words(Path(out), page, numbers, panels, image, seconds))
    return 0


def train(*, config: RunConfig, out: str, overwrite: bool = False, resume: bool = False) -> int:
    """Train a prototype classifier and push it onto real patches.

    Args:
        out: the run folder to write.
        overwrite: replace the run in --out.
        resume: go on where a run in --out was cut off.
    """
    from protopush.training.trainer import train as train_run

    done = train_run(config, out, overwrite=overwrite, resume=resume).folder
    here = shlex.quote(str(done))
    words = f"Trained {done}. Next: protopush evaluate {here} --data.split test; protopush verify {here}"
    return _answer(False, None, words)


def push(
    run: str, *, out: str, data: Split = Split(split="train"), json: bool = False, device: str = "auto", **options: Any
) -> int:
    """Push a run's prototypes once more, into a new run."""
    from protopush.push import PushSettings, check_settings

    check_settings(PushSettings(**{name: options[name] for name in PushSettings().settings()}))
    report = _open(run, data, device).push(out, split=data.split, **options)
    return _answer(json, report.to_dict(), str(report))


def evaluate(run: str, *, data: Split = Split(), json: bool = False, device: str = "auto", **options: Any) -> int:
    """Accuracy, balanced accuracy, F1 and AUROC on a split."""
    from protopush.cli.tables import metrics_table

    metrics = _open(run, data, device).evaluate(data.split, **options)
    return _answer(json, metrics, metrics_table(metrics))


def predict(
    run: str, paths: list[str], *, out: str, data: Images = Images(), json: bool = False, device: str = "auto",
    **options: Any,
) -> int:  # fmt: skip
    """A CSV of predictions for folders and manifests of any size, with what each image resembles."""
    from protopush.predict.prediction import in_words

    found = _open(run, data, device, distributed=True).predict(paths, out, **options)
    return _answer(json, found, in_words(found))


def explain(
    run: str, images: list[str], *, out: str, data: Pictures = Pictures(), json: bool = False, device: str = "auto",
    **options: Any,
) -> int:  # fmt: skip
    """Show which patches of which training images an image resembles."""
    from protopush.explain.figure_style import percent

    found = _open(run, Images(data.max_megapixels), device).explain(images, out, **options)
    lines = (
        f"{one['file']}: {one['predicted_name']} ({percent(one['probability'])}) -> {one['panel']}" for one in found
    )
    return _answer(json, found, "\n".join(lines))


def report(
    run: str, *, against: list[str] | None = None, data: Split = Split(), json: bool = False, device: str = "auto",
    **options: Any,
) -> int:  # fmt: skip
    """One page (HTML) that shows what a run is and what it is worth."""
    opened = _open(run, data, device, check_weights=False)  # the page says whether they are the run's own
    page, measured = opened.report(split=data.split, against=against or (), **options)
    size = page.stat().st_size / 1e6
    values = {"report": str(page), "megabytes": size, "split": measured.split} | measured.numbers
    return _answer(json, values, f"Report: {page} ({size:.1f} MB)")


def compare(runs: list[str], *, data: Split = Split(), json: bool = False, device: str = "auto", **options: Any) -> int:
    """Runs side by side: accuracy, diversity, localisation, faithfulness.

    Args:
        runs: run folders, two or more.
    """
    from protopush.cli.tables import comparison_table

    if len(runs) < 2:
        raise InputError("one run alone cannot be compared; expected two or more run folders")
    found = _open(runs[0], data, device).compare(runs[1:], split=data.split, **options)
    return _answer(json, found, comparison_table(found))


def verify(
    run: str, *, local: bool = False, images: int = 16, data: Split = Split(), json: bool = False,
    device: str = "auto", **options: Any,
) -> int:  # fmt: skip
    """Embed every anchor's file again and see whether it still holds.

    Args:
        local: also replace everything outside the boxes, and measure how much the similarities change.
        images: of the split, for --local.
    """
    from protopush.cli.tables import anchors_table, locality_table

    opened = _open(run, data, device, check_weights=False)
    checks = opened.verify(**options)
    holds = all(check.holds for check in checks)
    answer: dict[str, Any] = {"holds": holds, "anchors": [check.to_dict() for check in checks]}
    words = anchors_table(checks)
    if local:
        from protopush.evaluation.locality import TOLERANCE

        found = opened.locality(options["root"], split=data.split, images=images)
        claimed = opened.model.backbone.is_local
        largest = max((one.largest for one in found), default=0.0)
        answer["locality"] = {"claimed": claimed, "largest": largest, "places": [one.to_dict() for one in found]}
        holds = holds and (largest <= TOLERANCE or not claimed)
        words += "\n" + locality_table(found, opened.model.backbone.regions.reach)
    _answer(json, answer, words)
    return 0 if holds else 1


def rebuild(run: str, *, out: str, **options: Any) -> int:
    """Make the prototypes of a run from their crops alone, as a new run."""
    opened = _open(run, Images(), "cpu")
    opened.rebuild(out, **options)
    return _answer(False, None, f"Rebuilt {len(opened.head.proto_manager.used_slots())} prototypes in {out}")


def forbid(
    run: str, *, reason: str, data: Images = Images(), json: bool = False, device: str = "auto", **options: Any
) -> int:
    """Forbid a patch, an image or a region; the next best anchor takes its place.

    Args:
        run: a run folder; it is changed in place.
    """
    from protopush.cli.tables import decision_table

    decision = _open(run, data, device).forbid(reason=reason, **options)
    dry_run = options["dry_run"]
    return _answer(
        json, decision.to_dict() | ({"dry_run": True} if dry_run else {}), decision_table(decision, run, dry_run)
    )


def app(
    run: str, *, host: str = "127.0.0.1", port: int = 7860, max_megabytes: float = 20.0, root_path: str = "",
    allowed_host: list[str] | None = None, data: Images = Images(num_workers=0), device: str = "auto",
) -> int:  # fmt: skip
    """A page on this computer to view predictions and prototypes, and to decide about these.

    Args:
        run: a run folder; decisions change it in place.
        host: the address to listen on; there are no passwords.
        port: 0: any that is free.
        max_megabytes: of an uploaded file.
        root_path: where a reverse proxy shows the page: a path such as /review, or the whole address.
        allowed_host: names by which browsers may call the page, besides those of this computer.
    """
    from protopush.app import require_extra

    require_extra("the review app")
    from protopush.app.run_store import RunStore
    from protopush.app.serve import serve
    from protopush.app.upload import Limits
    from protopush.data.manifest import DataConfig

    opened = _open(run, data, device)
    store = RunStore(opened.folder, opened.data, opened.device, data.num_workers)
    limits = Limits(max_megabytes, DataConfig(**opened.data).max_megapixels)
    serve(store, limits, host, port, root_path, allowed_host or ())
    return 0


def serve(
    run: str, *, host: str = "127.0.0.1", port: int = 7861, max_megabytes: float = 20.0, max_batch: int = 16,
    max_wait_ms: float = 5.0, token_file: str = "", root_path: str = "", allowed_host: list[str] | None = None,
    data: Images = Images(num_workers=0), device: str = "auto",
) -> int:  # fmt: skip
    """Answer over HTTP: predictions and explanations for other programs.

    Args:
        host: the address to listen on; one that other computers reach needs a token.
        port: 0: any that is free.
        max_megabytes: of a request.
        max_batch: images of a forward pass.
        max_wait_ms: that an image waits for others that are on their way.
        token_file: what callers have to know; without, the variable PROTOPUSH_TOKEN.
        root_path: where a reverse proxy shows the service: a path such as /model, or the whole address.
        allowed_host: names by which the service may be called, besides those of this computer.
    """
    from protopush.app import require_extra
    from protopush.app.upload import Limits
    from protopush.data.manifest import DataConfig

    require_extra("the service")
    from protopush.app.resident import run_service
    from protopush.app.service import ServiceLimits

    opened = _open(run, data, device)
    limits = ServiceLimits(Limits(max_megabytes, DataConfig(**opened.data).max_megapixels), max_batch, max_wait_ms)
    run_service(opened, limits, host, port, token_file, root_path, allowed_host or ())
    return 0


def data_audit(
    path: str | None = None, *, threshold: float = 0.92, data: DataSet = DataSet(), json: bool = False
) -> int:
    """Find leaks between splits, duplicates and damaged files in a data set.

    Args:
        path: a folder, a manifest (CSV) or a .npz.
        threshold: similarity of near duplicates, at most 1.
    """
    from protopush.cli.tables import audit_table
    from protopush.data.audit import check_threshold
    from protopush.data.manifest import check_names
    from protopush.data.sources import load_catalog

    check_fields(data, "data.")
    check_threshold(threshold)  # before the images are listed
    catalog = load_catalog(path or data.path, data.source, seed=data.split_seed, refuse_leaks=False)
    check_names(catalog)
    found = audit_catalog(catalog, threshold=threshold, max_megapixels=data.max_megapixels)
    _answer(json, found.to_dict(), audit_table(found))
    return 1 if found.leaks else 0


def export(run: str, *, json: bool = False, **options: Any) -> int:
    """Write a run as an ONNX file that needs neither PyTorch nor protopush."""
    from protopush.runs.onnx_export import ParityError, require_extra

    require_extra()  # before anything is opened
    try:
        done = _open(run, Images(), "cpu").export(**options)
    except ParityError as error:
        print(f"protopush: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    facts = f"{done.megabytes:.1f} MB, opset {done.opset}, largest difference to PyTorch {done.difference:.1g}"
    return _answer(json, done.to_dict(), f"Exported: {done.file} ({facts})")


def is_first() -> bool:
    """Whether this is the process that reports, of those that torchrun or Fabric started."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def _open(run: str, data: Images, device: str, **how: Any) -> Run:
    return open_run(
        run, data=data.path, source=data.source, num_workers=data.num_workers, device=device,
        max_megapixels=data.max_megapixels, **how,
    )  # fmt: skip


def _answer(json: bool, values: Any, text: str) -> int:
    if is_first():
        print(json_text.dumps(values, indent=2, allow_nan=False) if json else text)  # ASCII: any pipe can take it
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "train": train,
    "push": push,
    "evaluate": evaluate,
    "predict": predict,
    "explain": explain,
    "report": report,
    "compare": compare,
    "verify": verify,
    "rebuild": rebuild,
    "forbid": forbid,
    "app": app,
    "serve": serve,
    "data audit": data_audit,
    "export": export,
}
