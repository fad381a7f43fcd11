"""Runs and their data, as a command's options name them.

What shows a run: ``protopush evaluate``, ``explain``, ``report`` and ``compare``.

What checks a run or its data: ``protopush verify`` and ``data audit``.

What changes a run: ``protopush push`` (into a new one) and ``forbid`` (in place).

What predicts: ``protopush predict``.

What hands a run to others: ``protopush export``.
"""

from __future__ import annotations

import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from protopush.data.audit import Audit, audit, check_threshold
from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.data.files import read_json, write_atomic, write_json
from protopush.data.images import check_images, read_image
from protopush.data.manifest import Catalog, DataConfig
from protopush.data.similar import THRESHOLD
from protopush.data.sources import load_catalog
from protopush.distributed import raise_on_all_ranks, rank_and_size
from protopush.errors import InputError, listing
from protopush.evaluation.compare import compare
from protopush.evaluation.measure import Measured, measure
from protopush.evaluation.outputs import evaluate
from protopush.explain import draw_panel, draw_why_not, explain_image
from protopush.explain.checked_region import checked_regions
from protopush.explain.neighbours import find_neighbours
from protopush.models.model_folder import Run, save_run
from protopush.models.versions import recorded_versions, version_change
from protopush.predict.prediction import predict
from protopush.push import PushReport, PushSettings, check_settings
from protopush.push.certificate import AnchorCheck, verify_anchors
from protopush.report.build import build_report
from protopush.runs.allowed import allow_of
from protopush.runs.decisions import FILE, Decision, alone, load_decisions
from protopush.runs.fabric import make_fabric, quiet
from protopush.runs.onnx_export import Exported, export_onnx, require_extra
from protopush.runs.progress import bar
from protopush.runs.review import Wish, forbid
from protopush.runs.run import append_metrics, clear_folder, fresh_folder, open_run, same_weights
from protopush.runs.splits import open_split
from protopush.runs.undo import undo
from protopush.training.final_push import push_row


def open_with(options: Namespace, check_weights: bool = True) -> tuple[Run, torch.device]:
    """The run, its model on the device."""
    run = open_run(options.run, check_weights=check_weights)
    device = make_fabric(options.device).device
    run.model.to(device)
    return run, device


def data_of(run: Run, options: Namespace) -> dict[str, Any]:
    """The run's own data, or what the options say."""
    if options.data.path is None and options.data.source is None:
        return run.data
    source = options.data.source or ("auto" if options.data.path else run.data["source"])
    path = os.path.abspath(options.data.path) if options.data.path else ""
    return run.data | {"path": path, "source": source}


def split_of(run: Run, options: Namespace) -> tuple[ImageDataset, Catalog]:
    """The images of the split that was asked for."""
    data = DataConfig(**data_of(run, options))
    return open_split(data, options.data.split, run.class_names, run.transform)


def loader_of(dataset: ImageDataset, options: Namespace, device: torch.device) -> DataLoader[Any]:
    """Images in order, in batches for inference."""
    return DataLoader(dataset, batch_size=inference_batch_size(device), num_workers=options.data.num_workers)


def evaluate_run(options: Namespace) -> dict[str, Any]:
    """The metrics of a run on a split."""
    run, device = open_with(options)
    dataset, _ = split_of(run, options)
    return evaluate(run.model, loader_of(dataset, options, device), device, run.class_names)


def explain_images(options: Namespace) -> list[dict[str, Any]]:
    """Panels (PNG) and their data (JSON) for image files; every file is checked before the first is explained."""
    run, device = open_with(options)
    _check_why_not(options.why_not, run.class_names)
    paths = [Path(image) for image in options.images]
    check_images(paths)
    style = PanelStyle(options.rows, options.top_classes, options.why_not, options.regions, options.narrow)
    return [
        explain_to(run, path, Path(options.out), name, device, style)
        for path, name in zip(paths, _distinct_names(paths), strict=True)
    ]


@dataclass(frozen=True)
class PanelStyle:
    """What a panel shows.

    Attributes:
        rows: prototypes.
        top_classes: classes told in the JSON.
        why_not: another class, that gets a picture of its own beside the predicted one.
        regions: whether what each prototype shown depends on is looked for.
        narrow: for a phone's width.
    """

    rows: int = 5
    top_classes: int = 3
    why_not: str | None = None
    regions: bool = False
    narrow: bool = False


def explain_to(
    run: Run, path: Path, out: Path, name: str, device: torch.device, style: PanelStyle = PanelStyle()
) -> dict[str, Any]:
    """Write ``name.png`` and ``name.json`` for one image; returns what the JSON holds.

    With ``why_not`` there is also ``name-why-not.png``, unless that class is the predicted one.
    """
    also = [style.why_not] if style.why_not else []
    explanation = explain_image(run.model, path, run.transform, run.class_names, device, style.top_classes, also)
    image = read_image(path)
    shown = explanation.classes[0].matches[: style.rows]
    regions = checked_regions(run.model, image, run.transform, shown, device) if style.regions else None
    panel = out / f"{name}.png"
    _save_picture(draw_panel(explanation, image, run.picture, style.rows, regions=regions, narrow=style.narrow), panel)
    values = explanation.to_dict() | {"panel": str(panel)}
    if regions is not None:
        values["regions"] = [region.to_dict() for region in regions]
    if style.why_not and style.why_not != explanation.predicted_name:
        beside = out / f"{name}-why-not.png"
        _save_picture(draw_why_not(explanation, style.why_not, image, run.picture, narrow=style.narrow), beside)
        values["why_not"] = explanation.why_not(style.why_not).to_dict() | {"panel": str(beside)}
    write_json(out / f"{name}.json", values)
    return values


def _check_why_not(name: str | None, class_names: Sequence[str]) -> None:
    if name is not None and name not in class_names:
        raise InputError(f"unknown class {name!r} in --why-not; expected one of: {listing(class_names)}")


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The files' stems; where two are alike, with a number."""
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in names:
            name, number = f"{path.stem}-{number}", number + 1
        names.append(name)
    return names


def _save_picture(picture: Image.Image, file: Path) -> None:
    write_atomic(file, lambda temporary: picture.save(temporary, format="PNG"))


@dataclass(frozen=True)
class Measuring:
    """What runs are measured on, and how thoroughly.

    Attributes:
        data: path, source and so on, as in the run's configuration.
        split: of the data.
        device: of the models.
        resamples: of the bootstrap behind the intervals.
        faithfulness: images that faithfulness is measured on.
        num_workers: processes that read images.
    """

    data: dict[str, Any]
    split: str = "test"
    device: torch.device | str = "cpu"
    resamples: int = 1000
    faithfulness: int = 48
    num_workers: int = 0

    @classmethod
    def of(cls, options: Namespace, run: Run) -> Measuring:
        """As a command's options say, on the run's own data where they name no other."""
        if options.resamples < 0 or options.faithfulness < 0:
            raise InputError(
                f"--resamples {options.resamples}, --faithfulness {options.faithfulness}; expected 0 or more"
            )
        device = make_fabric(options.device).device
        asked = (options.resamples, options.faithfulness, options.data.num_workers)
        return cls(data_of(run, options), options.data.split, device, *asked)

    def measure(self, run: Run) -> tuple[Measured, Catalog]:
        """A run's numbers, and the data that they are of."""
        dataset, catalog = open_split(DataConfig(**self.data), self.split, run.class_names, run.transform)
        run.model.to(self.device)
        known = {sample.name: sample for sample in catalog.samples}
        asked = (self.num_workers, self.resamples, self.faithfulness)
        return measure(run, dataset, self.split, known, self.device, *asked), catalog


def report_run(options: Namespace) -> dict[str, Any]:
    """One page (HTML) about a run; returns where it is, and its numbers."""
    run = open_run(options.run, check_weights=False)  # the page tells whether they are the run's own
    others = _of_same_classes([run, *(open_run(folder) for folder in options.against)])[1:]
    out = Path(options.out) if options.out else run.folder / "report.html"
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; expected the HTML file to write")
    page, measured = write_report(run, Measuring.of(options, run), out, others, options.audit)
    return {"report": str(page), "megabytes": page.stat().st_size / 1e6, "split": measured.split} | measured.numbers


def write_report(
    run: Run, measuring: Measuring, out: Path, others: Sequence[Run] = (), with_audit: bool = True
) -> tuple[Path, Measured]:
    """The same for runs that are open already; the page and what was measured."""
    measured, catalog = measuring.measure(run)
    beside = [(other, measuring.measure(other)[0]) for other in others]
    train = ImageDataset(catalog.split("train"), run.transform)
    device, workers = measuring.device, measuring.num_workers
    with bar("Neighbours of the prototypes", len(train)) as advance:
        neighbours = find_neighbours(run.model, train, device, num_workers=workers, advance=advance)
    page = build_report(
        run,
        measured,
        neighbours,
        checks=checks_of(run, run.root, device),
        audit=audited(catalog) if with_audit else None,
        comparison=compare([(run, measured), *beside]) if beside else None,
        path=out,
        device=device,
    )
    return page, measured


def compare_runs(options: Namespace) -> dict[str, Any]:
    """The numbers of several runs side by side."""
    if len(options.runs) < 2:
        raise InputError("one run alone cannot be compared; expected two or more run folders")
    runs = _of_same_classes([open_run(folder) for folder in options.runs])
    measuring = Measuring.of(options, runs[0])
    return compare([(run, measuring.measure(run)[0]) for run in runs])


def _of_same_classes(runs: Sequence[Run]) -> list[Run]:
    for run in runs[1:]:
        if run.class_names != runs[0].class_names:
            raise InputError(f"{run.folder} has other classes than {runs[0].folder}; expected the same ones")
    return list(runs)


logger = logging.getLogger("protopush.training")


def verify_run(options: Namespace) -> list[AnchorCheck]:
    """Whether each anchor of a run still holds."""
    run, device = open_with(options, check_weights=False)
    root = Path(options.root) if options.root else run.root
    if not root.is_dir():
        raise InputError(f"no such folder: {root}; expected the training images; say where they are with --root")
    checks = checks_of(run, root, device)
    change = version_change(recorded_versions(read_json(run.folder / "config.json")))
    if change and any(check.fault == "similarity_off" for check in checks):
        logger.warning("Other versions may read images and weights otherwise: the run was %s", change)
    return checks


def checks_of(run: Run, root: Path, device: torch.device | str) -> list[AnchorCheck]:
    """Whether each anchor of an open run still holds, with the images below ``root``."""
    return verify_anchors(
        run.model,  # type: ignore[arg-type]
        run.head.proto_manager,
        run.transform,
        root,
        run.class_names,
        device,
        same_weights=same_weights(run.folder),
    )


def audit_data(options: Namespace) -> Audit:
    """What is wrong with a data set; groups in several splits are told, not refused."""
    check_threshold(options.threshold)
    catalog = load_catalog(options.path, options.source, seed=options.split_seed, refuse_leaks=False)
    return audited(catalog, options.threshold)


def audited(catalog: Catalog, threshold: float = THRESHOLD) -> Audit:
    """What is wrong with a data set that is open already."""
    with bar("Auditing images", 2 * len(catalog.samples)) as advance:
        return audit(catalog, threshold, advance)


def push_run(options: Namespace) -> PushReport:
    """Push a run's prototypes once more and write the result as a new run."""
    out = Path(options.out)
    if out.resolve() == Path(options.run).resolve():
        raise InputError(f"--out is the run itself: {out}; choose another folder, the first run stays as it is")
    settings = {name: getattr(options, name) for name in PushSettings().settings()}
    check_settings(PushSettings(**settings))
    guarded = options.guard not in (None, "off")
    run, device = open_with(options)
    fresh_folder(out, options.overwrite)
    dataset, catalog = split_of(run, options)
    val = open_split(DataConfig(**data_of(run, options)), "val", run.class_names, run.transform)[0] if guarded else None
    report: PushReport = run.model.push_prototypes(
        loader_of(dataset, options, device),
        device,
        use_local=options.use_local,
        **settings,
        val_loader=None if val is None else loader_of(val, options, device),
        allow=allow_of(load_decisions(run.folder), dataset),
    )
    pushed = replace(run, model=run.model.cpu(), folder=out, root=catalog.root.resolve(), data=data_of(run, options))
    clear_folder(out)
    for name in ("config.yaml", FILE):
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, out / name)
    save_run(pushed)
    append_metrics(out, push_row(report, 0, None, None))
    return report


def forbid_run(options: Namespace) -> Decision:
    """Forbid a patch, an image or a region, or undo that, and replace the anchors there in the run itself."""
    wish = Wish(
        options.prototype, options.image, options.mask_column, options.min_share, options.reason, options.who or ""
    )
    if options.undo is None:
        wish.kind()  # a wish that says nothing is refused before the run is opened
    elif wish.prototype is not None or wish.image is not None or wish.masks:
        raise InputError("--undo takes back one decision; expected no --prototype, --image or --mask-column beside it")
    with alone(Path(options.run), lambda: logger.info("Somebody else is deciding about %s; waiting", options.run)):
        run, device = open_with(options)
        data, workers = data_of(run, options), options.data.num_workers
        if options.undo is not None:
            return undo(run, options.undo, data, device, wish.reason, wish.who, workers)
        return forbid(run, wish, data, device, workers)


def predict_files(options: Namespace) -> dict[str, Any]:
    """A CSV of predictions, in as many processes as torchrun started; returns its summary."""
    fabric = make_fabric(options.device)
    with quiet():
        fabric.launch()
    # What is wrong with the run, one process says.
    run = raise_on_all_ranks(lambda: open_run(options.run) if rank_and_size()[0] == 0 else None) or open_run(
        options.run
    )
    run.model.to(fabric.device)
    return predict(
        run,
        options.paths,
        options.out,
        top=options.top,
        threshold=options.threshold,
        share=options.share,
        data=DataConfig(**data_of(run, options)),
        device=fabric.device,
        num_workers=options.data.num_workers,
        overwrite=options.overwrite,
    )


FORMATS = ("onnx",)


def export_run(options: Namespace) -> Exported:
    """A run as a file of another format."""
    if options.format not in FORMATS:
        near = get_close_matches(options.format, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(FORMATS)}"
        raise InputError(f"unknown format {options.format!r}; {hint}")
    if not options.tolerance > 0:
        raise InputError(f"--tolerance {options.tolerance}; expected a number above 0")
    require_extra()
    run = open_run(options.run)
    return export_onnx(run, Path(options.out) if options.out else run.folder / "model.onnx", options.tolerance)
