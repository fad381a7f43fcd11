"""A run and what can be done with it: :func:`protopush.open_run`. Each method imports its room when it is called."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from protopush.data.manifest import Catalog, DataConfig
from protopush.errors import InputError, check_fields, did_you_mean, listing
from protopush.models import stored_run

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from protopush.data.audit import Audit
    from protopush.data.dataset import ImageDataset
    from protopush.evaluation.locality import Locality
    from protopush.evaluation.measure import Measured
    from protopush.push import PushReport
    from protopush.push.certificate import AnchorCheck
    from protopush.runs.decisions import Decision
    from protopush.runs.onnx_export import Exported

logger = logging.getLogger("protopush.training")

LONGEST = 200  # bytes of the name of a picture, which most systems limit to 255 with all that is added to it


def open_run(
    folder: str | Path, *, data: str | Path | None = None, source: str | None = None, num_workers: int = 2,
    device: str = "auto", backbone: nn.Module | None = None, check_weights: bool = True, distributed: bool = False,
    max_megapixels: float | None = None,
) -> Run:  # fmt: skip
    """Open a run folder.

    Args:
        folder: as ``protopush train --out`` wrote it.
        data: a folder or manifest of images; by default what the run was trained on, where that was.
        source: the kind of data, where it can't be recognised (docs/data.md).
        num_workers: processes that read images.
        device: auto, cpu, cuda or mps.
        backbone: the module itself, where it is one of your own, which no name could build again.
        check_weights: refuse other weights than those that the run saved; False is for :meth:`Run.verify`.
        distributed: join the processes that torchrun started, among which :meth:`Run.predict` divides the images.
        max_megapixels: of an image that is read, in millions of pixels; by default what was allowed in training.

    Raises:
        InputError: a file is missing or damaged, or of a newer format; or there is no such device.

    Example:
        >>> run = open_run("runs/mine")  # doctest: +SKIP
        >>> run.evaluate(split="val")["balanced_accuracy"]  # doctest: +SKIP
        0.924
    """
    from protopush.distributed import raise_on_all_ranks, rank_and_size
    from protopush.runs.run import join_processes
    from protopush.runs.run import open_run as read

    where = join_processes(device, distributed)
    first = rank_and_size()[0] == 0  # what is wrong with the run, one process says
    found = raise_on_all_ranks(lambda: read(folder, backbone, check_weights) if first else None)
    found = found or read(folder, backbone, check_weights)
    if data or source:
        kind = source or ("auto" if data else found.data["source"])
        found = replace(found, data=found.data | {"path": os.path.abspath(data) if data else "", "source": kind})
    if max_megapixels is not None:
        found = replace(found, data=found.data | {"max_megapixels": max_megapixels})
        check_fields(DataConfig(**found.data), "data.")
    found.model.to(where)
    return Run(**vars(found), device=where, num_workers=num_workers)


@dataclass(frozen=True)
class Run(stored_run.Run):
    """A trained model and what can be done with it; :func:`protopush.open_run` makes one.

    All methods raise :class:`protopush.InputError` for bad options and for images that aren't there. What a method has
    as arguments, the command of its name has as options: this is the text of their help as well.

    Attributes:
        device: of the model.
        num_workers: processes that read images.
    """

    device: torch.device
    num_workers: int

    def evaluate(
        self, split: str = "test", *, prior: dict[str, float] | str | None = None, views: Literal[1, 2, 4, 8] = 1
    ) -> dict[str, Any]:
        """Accuracy, balanced accuracy, F1, AUROC and calibration on a split, and the numbers of each class.

        Args:
            split: train, val, test or all.
            prior: the shares of the classes that probabilities are to assume, here alone: balanced, data (those of the
                training images) or {class: share}; none: what the run assumes.
            views: orientations of each image whose logits are averaged: 2, with its mirror image; 4, both flips; 8,
                with quarter turns.

        Raises:
            InputError: that is no prior, or the run does not say which one it assumes.
        """
        from protopush.evaluation.evaluate import evaluate
        from protopush.nn.priors import read_prior

        priors = None
        if prior is not None:
            wanted, assumed = read_prior(prior, self.class_names, self.model.train_shares, "--prior"), self.model.prior
            if assumed is None:
                raise InputError(
                    f"{self.folder / 'config.json'} has no prior, so that probabilities can't be changed to another "
                    'one; expected the shares that training assumed; where its classes counted alike, add "prior": '
                    '"balanced" there'
                )
            priors = assumed, wanted
        loader = self._loader(self._images(split)[0])
        found = evaluate(self.model, loader, self.device, self.class_names, priors, views)
        return found if priors is None else found | {"prior": dict(zip(self.class_names, priors[1], strict=True))}

    def explain(
        self, images: Sequence[str | Path], out: str | Path, *, rows: int = 5, top_classes: int = 3,
        why_not: str | None = None, regions: bool = False, narrow: bool = False, names: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Write a panel (PNG) and its data (JSON) for each image; every file is checked before the first is explained.

        Args:
            images: image files.
            out: folder for the panels (PNG) and their data (JSON).
            rows: prototypes in a panel.
            top_classes: classes in the JSON.
            why_not: another class, which gets a picture of its own (``NAME-why-not.png``) beside the predicted one.
            regions: find what each prototype shown depends on, by hiding parts (slow); of windows the box is all.
            narrow: panels for a phone's width.
            names: of the files, without an ending; by default those of the images.

        Returns:
            What each JSON holds.
        """
        from protopush.data.files import write_atomic, write_json
        from protopush.data.images import check_images, read_image
        from protopush.explain import draw_panel, draw_why_not, explain_image
        from protopush.explain.checked_region import checked_regions
        from protopush.models.crops import has_crops

        if why_not is not None and why_not not in self.class_names:
            raise InputError(f"unknown class {why_not!r} in --why_not; expected one of: {listing(self.class_names)}")
        if regions and has_crops(self.model):
            raise InputError(
                "--regions finds what a prototype depends on outside its box; this model sees each box alone: the box "
                "is all; leave --regions out"
            )
        paths, done, also = [Path(image) for image in images], [], [why_not] if why_not else []
        check_images(paths, max_megapixels=DataConfig(**self.data).max_megapixels)
        for path, name in zip(paths, names or _distinct_names(paths), strict=True):
            image, file = read_image(path), str(Path(out) / name)
            found = explain_image(self.model, path, self.transform, self.class_names, self.device, top_classes, also)
            shown = found.classes[0].matches[:rows]
            checked = checked_regions(self.model, image, self.transform, shown, self.device) if regions else None
            pictures = {f"{file}.png": draw_panel(found, image, self.source, rows, regions=checked, narrow=narrow)}
            values = found.to_dict() | {"panel": f"{file}.png"}
            if checked is not None:
                values["regions"] = [region.to_dict() for region in checked]
            if why_not and why_not != found.predicted_name:
                beside = f"{file}-why-not.png"
                pictures[beside] = draw_why_not(found, why_not, image, self.source, narrow=narrow)
                values["why_not"] = found.why_not(why_not).to_dict() | {"panel": beside}
            for target, picture in pictures.items():
                write_atomic(Path(target), lambda temporary, p=picture: p.save(temporary, format="PNG"))  # type: ignore[misc]
            write_json(Path(f"{file}.json"), values)
            done.append(values)
        return done

    def report(
        self, out: str | Path | None = None, *, split: str = "test", against: Sequence[str | Path] = (),
        audit: bool = True, resamples: int = 1000, faithfulness: int = 48,
    ) -> tuple[Path, Measured]:  # fmt: skip
        """Write one page (HTML) that shows what the run is and what it is worth; the page, and what was measured.

        Args:
            out: the file; by default ``report.html`` in the run's folder.
            split: train, val, test or all.
            against: folders of other runs of the same classes, to be shown beside this one.
            audit: search for leaks between the splits as well.
            resamples: of the bootstrap behind the intervals; 0: none.
            faithfulness: images that faithfulness, and (16 of them) locality, are measured on (slow); 0: none.
        """
        from protopush.data.dataset import ImageDataset
        from protopush.evaluation.compare import compare, measure_beside
        from protopush.report.build import build_report
        from protopush.runs.candidates import neighbours_of
        from protopush.runs.progress import bar

        page, where = Path(out) if out else self.folder / "report.html", (self.device, self.num_workers)
        if page.is_dir():
            raise InputError(f"--out {page} is a folder; expected the HTML file to write")
        found, catalog = measure_beside(self, against, split, *where, resamples, faithfulness)
        measured, comparison = found[0][1], compare(found) if against else None
        root = self.root if self.root.is_dir() else catalog.root  # a shared folder doesn't name where its images were
        train, origin = ImageDataset(catalog.split("train"), self.transform), self.model.origin
        with bar("Neighbours of the prototypes", len(train)) as advance:
            neighbours = neighbours_of(self, train, self.device, self.num_workers, advance)
        checks, limit = self._check_anchors(root), DataConfig(**self.data).max_megapixels
        audited = audit_catalog(catalog, max_megapixels=limit) if audit else None
        images = min(faithfulness, 16)
        locality = self._measure_locality(root, measured.dataset, images) if images else None
        trained = replace(self, data=origin.config["data"]) if origin else self
        build_report(trained, measured, neighbours, checks, audited, comparison, page, root, self.device, locality)
        return page, measured

    def compare(
        self, others: Sequence[str | Path], *, split: str = "test", resamples: int = 1000, faithfulness: int = 48
    ) -> dict[str, Any]:
        """The numbers of this run and of others of the same classes (folders), all on this run's data.

        Args:
            split: train, val, test or all.
            resamples: of the bootstrap behind the intervals; 0: none.
            faithfulness: images that faithfulness is measured on (slow); 0: none.
        """
        from protopush.evaluation.compare import compare, measure_beside

        where = self.device, self.num_workers
        return compare(measure_beside(self, others, split, *where, resamples, faithfulness)[0])

    def verify(self, root: str | Path | None = None, *, crops: bool = False) -> list[AnchorCheck]:
        """Embed every anchor's file again, and see whether it still holds.

        Args:
            root: where the training images are now.
            crops: embed the crops in the run's folder instead, without any image; only runs on windows have them.
        """
        if crops:
            from protopush.models.crops import verify_crops

            return verify_crops(self)
        from protopush.data.files import read_json
        from protopush.models.stored_run import recorded_versions, version_change

        root = Path(root) if root else self.root
        if not root.is_dir():
            raise InputError(f"no such folder: {root}; expected the training images; say where they are with --root")
        checks = self._check_anchors(root)
        change = version_change(recorded_versions(read_json(self.folder / "config.json")))
        if change and any(check.fault == "similarity_off" for check in checks):
            logger.warning("Other versions may read images and weights otherwise: the run was %s", change)
        return checks

    def locality(self, root: str | Path | None = None, *, split: str = "test", images: int = 16) -> list[Locality]:
        """How much of each similarity is decided outside the patch's box: nothing, where the model is local.

        Everything outside the box is replaced by noise, by black and by another image, for the patch of each anchor and
        for the best patch of some images.

        Args:
            root: where the training images are now.
            split: whose images.
            images: how many of them.
        """
        return self._measure_locality(Path(root or self.root), self._images(split)[0], images)

    def push(
        self, out: str | Path, *, split: str = "train", momentum: float = 0.9, use_local: bool = True,
        unique: Literal["none", "patch", "image", "group"] = "none",
        interpolation: Literal["linear", "slerp"] = "linear",
        guard: Literal["off", "report", "rollback", "budget"] = "off", guard_budget: float = 0.01,
        max_patches_per_class: int | None = None, overwrite: bool = False,
    ) -> PushReport:  # fmt: skip
        """Push the prototypes once more and write the result as a new run; this one stays as it is.

        Args:
            out: the new run's folder.
            split: whose images prototypes may stand for.
            momentum: 0 puts prototypes onto their patches.
            use_local: patches, or pooled features.
            unique: none; patch, image or group: not shared in a class.
            interpolation: linear or slerp.
            guard: off, report, rollback or budget, on the val split.
            guard_budget: fall of balanced accuracy or AUROC allowed.
            max_patches_per_class: bound the work.
            overwrite: replace the run in ``out``.
        """
        from protopush.runs.candidates import keep_candidates
        from protopush.runs.decisions import load_decisions
        from protopush.runs.reanchor import allow_of
        from protopush.training.final_push import push_row
        from protopush.training.run_writer import append_metrics

        out, model = self._new_folder(out, overwrite), copy.deepcopy(self.model)
        dataset, catalog = self._images(split)
        report: PushReport = model.push_prototypes(
            self._loader(dataset), self.device, use_local=use_local, momentum=momentum, unique=unique,
            max_patches_per_class=max_patches_per_class, interpolation=interpolation, guard=guard,
            guard_budget=guard_budget, allow=allow_of(load_decisions(self.folder), dataset),
            val_loader=None if guard == "off" else self._loader(self._images("val")[0]),
        )  # fmt: skip
        pushed = replace(self, model=model, folder=out, root=catalog.root.resolve())
        self._save_as(replace(pushed, model=model.cpu()))
        model.to(self.device)
        if split == "train":  # what a decision chooses from; embeddings of validation images are as before
            keep_candidates(pushed, dataset, None, self.device, self.num_workers)
        append_metrics(out, push_row(report, 0, None, None))
        return report

    def rebuild(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Make the prototypes from their crops alone, and write the result as a new run; only for runs on windows.

        Args:
            out: the new run's folder.
            overwrite: replace the run in ``out``.
        """
        from protopush.models.crops import rebuild_prototypes

        out, rebuilt = self._new_folder(out, overwrite), replace(self, model=copy.deepcopy(self.model).cpu())
        rebuild_prototypes(rebuilt)
        self._save_as(replace(rebuilt, folder=out), "prototypes")

    def forbid(
        self, *, reason: str, prototype: str | None = None, image: str | None = None, mask_column: bool = False,
        min_share: float = 0.5, undo: int | None = None, who: str = "", dry_run: bool = False,
        keep_accuracy: float | None = None,
    ) -> Decision:  # fmt: skip
        """Forbid a patch, an image or a region; the next best anchor takes its place in the run's folder.

        What this object holds stays as it was read: open the run again to go on with its new anchors.

        Args:
            reason: why, for those who read the log later.
            prototype: ``CLASS:NUMBER``: the patch that it stands for.
            image: a training image: none of its patches.
            mask_column: everything outside the manifest's masks.
            min_share: share of a patch that must lie inside its mask.
            undo: a decision's number: it holds no more.
            who: who decides; by default your login name.
            dry_run: work out what would be, and change nothing.
            keep_accuracy: fall of balanced accuracy or AUROC that is allowed on the validation images: of the next
                anchors the nearest that keeps to it is taken, with biases moved where needed; none: the next.
        """
        from protopush.runs import review
        from protopush.runs import undo as taking_back
        from protopush.runs.decisions import alone
        from protopush.runs.outcome import Care
        from protopush.runs.run import open_run as read

        wish, care = review.Wish(prototype, image, mask_column, min_share, reason, who), Care(dry_run, keep_accuracy)
        if undo is None:
            wish.kind()  # a wish that says nothing is refused first
        elif prototype is not None or image is not None or mask_column:
            raise InputError("--undo takes back one decision; expected no --prototype, --image or --mask_column beside")
        elif keep_accuracy is not None:
            raise InputError("--undo brings back what was there; expected no --keep_accuracy beside")
        with alone(self.folder, lambda: logger.info("Somebody else decides about %s; waiting", self.folder)):
            run = read(self.folder)  # as it is now, whoever has decided since
            run.model.to(self.device)
            if undo is not None:
                return taking_back.undo(run, undo, self.data, self.device, reason, who, self.num_workers, dry_run)
            return review.forbid(run, wish, self.data, self.device, self.num_workers, care)

    def predict(
        self, paths: Sequence[str], out: str | Path, *, top: int = 3, threshold: float | None = None,
        share: float = 0.05, overwrite: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Write a CSV of predictions for any number of images; after a kill, the same call goes on with it.

        Args:
            paths: folders, manifests (CSV ``image[,label]``), shards (.tar, .parquet) or image files.
            out: the CSV file; after a kill, the same words go on with it.
            top: prototypes named for each image; 0: none.
            threshold: similarity below which nothing in training is like an image; None: set on validation images.
            share: of validation images that may be below it.
            overwrite: start again, even where a part is there.

        Returns:
            Counts, and what is known of the threshold.
        """
        from protopush.predict.prediction import predict

        where = DataConfig(**self.data), self.device, self.num_workers
        return predict(self, paths, out, top, threshold, share, *where, overwrite)

    def export(
        self, out: str | Path | None = None, *, format: str = "onnx", input: Literal["float32", "uint8"] = "float32",
        tolerance: float = 1e-4,
    ) -> Exported:  # fmt: skip
        """Write a file that needs neither PyTorch nor protopush.

        Args:
            out: the file; by default ``model.onnx`` in the run's folder.
            format: onnx.
            input: float32 (normalised images) or uint8 (pixels, normalised inside).
            tolerance: of the difference to PyTorch in logits and similarities.

        Raises:
            ParityError: it differs from PyTorch by more than the tolerance; nothing was written.
        """
        from protopush.runs.onnx_export import export_onnx

        if format != "onnx":
            raise InputError(f"unknown format {format!r}; {did_you_mean(format, ['onnx'], 'expected onnx')}")
        if not tolerance > 0:
            raise InputError(f"--tolerance {tolerance}; expected a number above 0")
        on_cpu = replace(self, model=copy.deepcopy(self.model).cpu())
        return export_onnx(on_cpu, Path(out) if out else self.folder / "model.onnx", tolerance, input)

    def _new_folder(self, out: str | Path, overwrite: bool) -> Path:
        from protopush.training.run_writer import fresh_folder

        if Path(out).resolve() == self.folder.resolve():
            raise InputError(f"--out is the run itself: {out}; choose another folder, the first run stays as it is")
        fresh_folder(Path(out), overwrite)
        return Path(out)

    def _save_as(self, run: stored_run.Run, *folders: str) -> None:
        """Write a new run made of this one; ``folders`` of this one go along."""
        from protopush.models.model_folder import save_run
        from protopush.runs import split_record
        from protopush.runs.decisions import FILE
        from protopush.training.run_writer import clear_folder

        clear_folder(run.folder)
        for name in ("config.yaml", split_record.FILE, FILE):
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, run.folder / name)
        for name in folders:
            shutil.copytree(self.folder / name, run.folder / name)
        save_run(run)

    def _images(self, split: str) -> tuple[ImageDataset, Catalog]:
        from protopush.runs.run import open_split

        return open_split(DataConfig(**self.data), split, self.class_names, self.transform, self.folder)

    def _loader(self, dataset: ImageDataset) -> DataLoader[Any]:
        from torch.utils.data import DataLoader

        from protopush.data.features import inference_batch_size

        return DataLoader(dataset, batch_size=inference_batch_size(self.device), num_workers=self.num_workers)

    def _check_anchors(self, root: Path) -> list[AnchorCheck]:
        from protopush.push.certificate import verify_anchors
        from protopush.runs.progress import bar
        from protopush.runs.run import same_weights

        with bar("Checking anchors", len(self.head.proto_manager.used_slots())) as advance:
            return verify_anchors(
                self.model, self.head.proto_manager, self.transform, root, self.class_names, self.device,  # type: ignore[arg-type]
                same_weights=same_weights(self.folder), advance=advance,
            )  # fmt: skip

    def _measure_locality(self, root: Path, dataset: ImageDataset, images: int) -> list[Locality]:
        from protopush.evaluation.locality import measure_run
        from protopush.runs.progress import bar

        places = len(self.head.proto_manager.used_slots()) + min(images, len(dataset))
        with bar("Replacing what lies outside the boxes", places) as advance:
            return measure_run(self, root, dataset, images, self.device, advance=advance)


def audit_catalog(catalog: Catalog, **how: Any) -> Audit:
    """The audit of a data set, with a bar; ``how`` as for :func:`protopush.data.audit.audit`."""
    from protopush.data.audit import audit
    from protopush.runs.progress import bar

    with bar("Auditing images", 2 * len(catalog.samples)) as advance:
        return audit(catalog, advance=advance, **how)


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The files' stems; where two are alike, with a number; cut off where no ending would fit after them."""
    names: list[str] = []
    for path in paths:
        stem, number = path.stem, 2
        while len(os.fsencode(stem)) > LONGEST:
            stem = stem[:-1]
        name = stem
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names
