"""What shows a run: ``protopush evaluate``, ``explain``, ``report`` and ``compare``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from protopush.commands.checking import audited, checks_of
from protopush.commands.opening import data_of, loader_of, open_with, split_of
from protopush.data.dataset import ImageDataset
from protopush.data.files import write_atomic, write_json
from protopush.data.images import check_images, read_image
from protopush.data.manifest import Catalog
from protopush.errors import InputError, listing
from protopush.explain import draw_panel, draw_why_not, explain_image
from protopush.explain.neighbours import find_neighbours
from protopush.explain.region import checked_regions
from protopush.report.build import build_report
from protopush.report.compare import compare
from protopush.report.measure import Measured, measure
from protopush.training.config import DataConfig
from protopush.training.evaluate import evaluate
from protopush.training.launch import make_fabric
from protopush.training.prepare import open_split
from protopush.training.progress import bar
from protopush.training.run import Run, open_run


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
