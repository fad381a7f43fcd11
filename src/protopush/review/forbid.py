"""Forbid a patch, an image or a region: no anchor may be there again, and the next best takes its place."""

from __future__ import annotations

import copy
import getpass
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from protopush.data.change import changing
from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.data.images import sha256_of
from protopush.data.manifest import Catalog
from protopush.data.masks import check_masks
from protopush.errors import InputError, listing
from protopush.head_optimal import HeadOptimal
from protopush.review.allowed import Allowed
from protopush.review.compare import compare_heads
from protopush.review.decisions import FILE, Decision, add_decision, load_decisions
from protopush.review.named import named_image, named_prototype
from protopush.review.reanchor import Bench, replace_anchors
from protopush.training.config import DataConfig
from protopush.training.prepare import open_split
from protopush.training.run import Run, save_run


@dataclass(frozen=True)
class Wish:
    """What is to be forbidden, in the user's words; one of the first three.

    Attributes:
        prototype: ``class:number``, whose anchor's patch it is.
        image: a file of the training data.
        masks: whatever lies outside the images' masks.
        min_share: the share of a patch's box that must lie inside its mask, in (0, 1].
        reason: why.
        who: by default the user's login name.
    """

    prototype: str | None = None
    image: str | None = None
    masks: bool = False
    min_share: float = 0.5
    reason: str = ""
    who: str = ""

    def kind(self) -> str:
        """``prototype``, ``image`` or ``mask``.

        Raises:
            InputError: none or several of them, no reason, a share that is none.
        """
        said = {"prototype": self.prototype is not None, "image": self.image is not None, "mask": self.masks}
        kinds = [kind for kind, wished in said.items() if wished]
        if len(kinds) != 1:
            raise InputError(
                f"{'several things' if kinds else 'nothing'} to forbid; expected exactly one of --prototype "
                "CLASS:NUMBER, --image PATH and --mask-column"
            )
        if not self.reason.strip():
            raise InputError("no reason given; expected --reason TEXT, for those who read the log later")
        if not 0 < self.min_share <= 1:
            raise InputError(f"min_share is {self.min_share}; expected a share of a patch's box, above 0 and up to 1")
        return kinds[0]


def forbid(run: Run, wish: Wish, data: dict[str, Any], device: torch.device, num_workers: int = 0) -> Decision:
    """Forbid something, give each prototype that stands for it the next best anchor, and write both into the run.

    Everything is computed first; then the run's files change together, or not at all.

    Args:
        run: as opened; its model is on ``device`` and is changed.
        wish: what and why.
        data: where the training images are, as :attr:`Run.data`.
        device: of the model.
        num_workers: processes that read images.

    Raises:
        InputError: what is named isn't there, is forbidden already, or leaves a class without a patch; the run is as
            it was.
    """
    kind, state = wish.kind(), _state(run.folder)
    past = load_decisions(run.folder)
    named = named_prototype(run, wish.prototype) if wish.prototype is not None else {}
    config = DataConfig(**data, num_workers=num_workers)
    train, catalog = open_split(config, "train", run.class_names, run.transform)
    if wish.image is not None:
        named = named_image(run, wish.image, train.samples, catalog.root)
    if wish.masks or any(made.kind == "mask" for made in past):
        unmasked = check_masks(train.samples)
        named = named or {"min_share": wish.min_share, "unmasked": unmasked}
    decision = Decision(len(past) + 1, _now(), wish.who or _login(), kind, wish.reason.strip(), **named)
    allowed = Allowed([*past, decision], run.transform)
    rows = _forbidden_rows(run, allowed, catalog)
    _refuse_again(decision, past, rows)
    _refuse_other_images(run, catalog.root, rows)
    val = _validation(run, config, catalog)
    bench, old_head = Bench(run, train, allowed, device, num_workers), copy.deepcopy(run.head)
    replaced = replace_anchors(bench, rows)
    before, *after = _scores(bench, val, [old_head, run.head] if replaced else [old_head])
    decision = replace(decision, replaced=tuple(replaced), val_before=before, val_after=after[0] if after else before)
    _write(replace(run, root=catalog.root.resolve(), data=data), decision, state)
    return decision


def _forbidden_rows(run: Run, allowed: Allowed, catalog: Catalog) -> list[int]:
    """The prototypes whose present anchors may not stay."""
    sample_of = {sample.name: sample for sample in catalog.samples}
    manager = run.head.proto_manager
    return [
        row
        for row in manager.valid_mask.nonzero().flatten().tolist()
        if (anchor := manager.anchors[row]) is not None and allowed.forbids(anchor, sample_of.get(anchor.file or ""))
    ]


def _refuse_again(decision: Decision, past: Sequence[Decision], rows: list[int]) -> None:
    """What is forbidden already is refused, unless there is an anchor to be replaced all the same."""
    for made in past:
        same = made.kind == decision.kind and (
            (made.kind == "image" and (made.file == decision.file))
            or (made.kind == "mask" and (made.min_share or 0) >= (decision.min_share or 0))
        )
        if same and not rows:
            what = made.file if made.kind == "image" else f"less than {made.min_share:g} of a patch inside its mask"
            raise InputError(
                f"already forbidden: {what} (decision {made.id}, {made.time}, by {made.who}: {made.reason!r}); no "
                "anchor stands there"
            )


def _refuse_other_images(run: Run, root: Path, rows: list[int]) -> None:
    """Images from a new place must be those that the anchors that stay were taken from."""
    if root.resolve() == run.root.resolve():
        return
    manager = run.head.proto_manager
    stay = {anchor for row, anchor in enumerate(manager.anchors) if anchor is not None and row not in rows}
    wrong = sorted({a.file for a in stay if a.file and not _holds(root / a.file, a.sha256)})
    if wrong:
        raise InputError(
            f"{len(wrong)} anchors' files are missing or changed below {root}: {listing(wrong, 3)}; expected the "
            "images that the run was trained on, in folders as they were"
        )


def _holds(file: Path, digest: str | None) -> bool:
    return file.is_file() and digest in (None, sha256_of(file))


def _validation(run: Run, config: DataConfig, catalog: Catalog) -> ImageDataset | None:
    if not any(sample.split == "val" for sample in catalog.samples):
        return None
    return open_split(config, "val", run.class_names, run.transform)[0]


def _scores(bench: Bench, val: ImageDataset | None, heads: Sequence[HeadOptimal]) -> list[dict[str, Any] | None]:
    """What a decision keeps of the metrics of each head; None without validation images."""
    if val is None:
        return [None for _ in heads]
    run, size = bench.run, inference_batch_size(bench.device)
    loader: DataLoader[Any] = DataLoader(val, batch_size=size, num_workers=bench.num_workers)
    found = compare_heads(run.model, heads, loader, bench.device, run.class_names)
    return [{name: metrics[name] for name in ("n", "balanced_accuracy", "auroc")} for metrics in found]


def _write(run: Run, decision: Decision, state: list[bytes]) -> None:
    with changing(run.folder) as stage:
        if decision.replaced:
            if (run.folder / "prototypes").is_dir():  # pictures of images that are gone stay
                shutil.copytree(run.folder / "prototypes", stage / "prototypes")
            save_run(replace(run, folder=stage))
        add_decision(run.folder, stage, decision)
        if _state(run.folder) != state:
            raise InputError(f"{run.folder} was changed by another process meanwhile; it is as that left it; try again")


def _state(folder: Path) -> list[bytes]:
    """What every change of a run changes."""
    files = (folder / name for name in ("config.json", FILE))
    return [file.read_bytes() if file.is_file() else b"" for file in files]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return "unknown"
