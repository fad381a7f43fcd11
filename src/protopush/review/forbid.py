"""Forbid a patch, an image or a region: no anchor may be there again, and the next best takes its place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from protopush.data.images import sha256_of
from protopush.data.manifest import Catalog
from protopush.data.masks import check_masks
from protopush.errors import InputError, listing
from protopush.push.certificate import file_within
from protopush.review.allowed import Allowed
from protopush.review.compare import scores, validation_of
from protopush.review.decisions import Decision, in_force, load_decisions
from protopush.review.named import named_image, named_prototype
from protopush.review.reanchor import Bench, replace_anchors
from protopush.review.writing import login, now, state_of, write_decision
from protopush.training.config import DataConfig
from protopush.training.prepare import open_split
from protopush.training.run import Run


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
        run: as opened, with :func:`protopush.review.writing.alone` held since before; its model is on ``device`` and
            is changed.
        wish: what and why.
        data: where the training images are, as :attr:`Run.data`.
        device: of the model.
        num_workers: processes that read images.

    Raises:
        InputError: what is named isn't there, is forbidden already, or leaves a class without a patch; the run is as
            it was.
    """
    kind, state = wish.kind(), state_of(run.folder)
    past = load_decisions(run.folder)
    holding = in_force(past)
    named = named_prototype(run, wish.prototype) if wish.prototype is not None else {}
    config = DataConfig(**data, num_workers=num_workers)
    train, catalog = open_split(config, "train", run.class_names, run.transform)
    if wish.image is not None:
        named = named_image(run, wish.image, train.samples, catalog.root)
    if wish.masks or any(made.kind == "mask" for made in holding):
        unmasked = check_masks(train.samples)
        named = named or {"min_share": wish.min_share, "unmasked": unmasked}
    decision = Decision(len(past) + 1, now(), wish.who or login(), kind, wish.reason.strip(), **named)
    allowed = Allowed([*holding, decision], run.transform)
    rows = _forbidden_rows(run, allowed, catalog)
    _refuse_again(decision, holding, rows)
    refuse_other_images(run, catalog.root, rows)
    val = validation_of(run, config, catalog)
    bench, old_head = Bench(run, train, allowed, device, num_workers), copy.deepcopy(run.head)
    replaced = replace_anchors(bench, rows)
    heads = [old_head, run.head] if replaced else [old_head]
    before, *after = scores(run, val, heads, device, num_workers)
    decision = replace(decision, replaced=tuple(replaced), val_before=before, val_after=after[0] if after else before)
    write_decision(replace(run, root=catalog.root.resolve(), data=data), decision, state)
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


def _refuse_again(decision: Decision, holding: Sequence[Decision], rows: list[int]) -> None:
    """What is forbidden already is refused, unless there is an anchor to be replaced all the same."""
    for made in holding:
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


def refuse_other_images(run: Run, root: Path, rows: Sequence[int]) -> None:
    """Images from a new place must be those that the anchors that stay were taken from."""
    if root.resolve() == run.root.resolve():
        return
    manager = run.head.proto_manager
    stay = {anchor for row, anchor in enumerate(manager.anchors) if anchor is not None and row not in rows}
    wrong = sorted({a.file for a in stay if a.file and not holds(root, a.file, a.sha256)})
    if wrong:
        raise InputError(
            f"{len(wrong)} anchors' files are missing or changed below {root}: {listing(wrong, 3)}; expected the "
            "images that the run was trained on, in folders as they were"
        )


def holds(root: Path, name: str, digest: str | None) -> bool:
    """Whether an anchor's file is below the root, and the same as it was."""
    file = file_within(root, name)
    return file is not None and file.is_file() and digest in (None, sha256_of(file))
