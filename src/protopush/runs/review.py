"""Review of prototypes: keep one, or forbid a patch, an image or a region and give the next best patch its place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from protopush.data.dataset import ImageDataset, check_masks
from protopush.data.images import sha256_of
from protopush.data.manifest import Catalog, DataConfig, Sample
from protopush.data.shards import is_file
from protopush.errors import InputError, did_you_mean, listing
from protopush.models.model_folder import Run
from protopush.push.certificate import file_within
from protopush.runs.candidates import Slot
from protopush.runs.decisions import (
    Decision,
    in_force,
    load_decisions,
    new_decision,
    state_of,
    write_decision,
)
from protopush.runs.outcome import AS_ASKED, Care, carry_out
from protopush.runs.reanchor import Allowed, replace_anchors
from protopush.runs.split_record import open_catalog


def named_prototype(run: Run, words: str) -> dict[str, Any]:
    """Class, prototype and patch, in a file, of ``mel:3``, or ``4:3`` (the class's number), for a decision."""
    name, colon, number = words.rpartition(":")
    if not colon or not number.isdecimal():
        raise InputError(f"prototype {words!r}; expected CLASS:NUMBER, such as {run.class_names[0]}:0")
    manager, names, k = run.head.proto_manager, run.class_names, int(number)
    if name in names:
        c = names.index(name)
    elif name.isdecimal() and int(name) < len(names):
        c = int(name)
    else:
        hint = did_you_mean(name, names, f"expected one of: {listing(names)}", cutoff=0.4)
        raise InputError(f"unknown class {name!r}; {hint}")
    used = manager.used_of(c)
    if k not in used:
        raise InputError(f"no prototype {names[c]}:{k}; expected one of: {listing([f'{names[c]}:{i}' for i in used])}")
    anchor = manager.anchor(c, k)
    if anchor is None or anchor.file is None:
        what = "was never pushed" if anchor is None else "has an anchor that names no file"
        raise InputError(
            f"prototype {names[c]}:{k} {what}, so that there is nothing to forbid; protopush push it first"
        )
    place = {name: getattr(anchor, name) for name in ("file", "sha256", "cell", "region", "box")}
    return {"class_name": names[c], "prototype": k, **place}


def named_image(run: Run, words: str, samples: Sequence[Sample], root: Path) -> dict[str, Any]:
    """Name, hash and class of a training image, for a decision.

    The path is relative to ``root``, as the names of the training samples are, or to the working folder, or absolute.
    An image that the run's anchors stand for is known, even if the training data no longer has it.
    """
    classes = {sample.name: sample.label for sample in samples}
    manager, digests = run.head.proto_manager, dict[str, str | None]()
    for c, k in manager.used_slots():
        if (anchor := manager.anchor(c, k)) is not None and anchor.file is not None:
            classes.setdefault(anchor.file, c)
            digests[anchor.file] = anchor.sha256
    inside = [name for name in (_relative(path, root) for path in (root / words, Path(words))) if name]
    name = next((name for name in inside if name in classes), None)
    if not inside:
        raise InputError(f"{words} lies outside the data folder {root}; expected one of its images")
    if name is None:
        hint = did_you_mean(inside[0], classes, f"expected a path below {root}")
        raise InputError(f"{words} is none of the {len(samples)} training images; {hint}")
    file = root / name
    digest = sha256_of(file) if is_file(file) else digests.get(name)
    return {"file": name, "sha256": digest, "class_name": run.class_names[classes[name]]}


def _relative(path: Path, root: Path) -> str | None:
    """The path as a name below the root, with forward slashes; None where it leads out of it."""
    for start, end in ((Path(os.path.abspath(root)), Path(os.path.abspath(path))), (root.resolve(), path.resolve())):
        if end.is_relative_to(start) and end != start:
            return end.relative_to(start).as_posix()
    return None


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
        """``prototype``, ``image`` or ``mask``; none or several of them, or no reason, is an InputError."""
        said = {"prototype": self.prototype is not None, "image": self.image is not None, "mask": self.masks}
        kinds = [kind for kind, wished in said.items() if wished]
        if len(kinds) != 1:
            raise InputError(
                f"{'several things' if kinds else 'nothing'} to forbid; expected exactly one of --prototype "
                "CLASS:NUMBER, --image PATH and --mask_column"
            )
        if not self.reason.strip():
            raise InputError("no reason given; expected --reason TEXT, for those who read the log later")
        if not 0 < self.min_share <= 1:
            raise InputError(f"min_share is {self.min_share}; expected a share of a patch's box, above 0 and up to 1")
        return kinds[0]


def forbid(
    run: Run, wish: Wish, data: dict[str, Any], device: torch.device, num_workers: int = 0, care: Care = AS_ASKED,
    catalog: Catalog | None = None,
) -> Decision:  # fmt: skip
    """Forbid something, give each prototype that stands for it the next best anchor, and write both into the run.

    Everything is computed first; then the run's files change together, or not at all.

    Args:
        run: as opened, with :func:`protopush.runs.decisions.alone` held since before; its model is on ``device`` and
            is changed.
        wish: what and why.
        data: where the training images are, as :attr:`Run.data`.
        device: of the model.
        num_workers: processes that read images.
        care: what is to be true of the decision besides.
        catalog: of the training images, where it is known already.

    Raises:
        InputError: what is named isn't there, is forbidden already, or leaves a class without a patch; the run is as
            it was.
    """
    kind, state, past = wish.kind(), state_of(run.folder), load_decisions(run.folder)
    holding = in_force(past)
    named = named_prototype(run, wish.prototype) if wish.prototype is not None else {}
    catalog = catalog or open_catalog(DataConfig(**data), run.class_names, run.folder)
    train = ImageDataset(catalog.split("train"), run.transform)
    if wish.image is not None:
        named = named_image(run, wish.image, train.samples, catalog.root)
    if wish.masks or any(made.kind == "mask" for made in holding):
        unmasked = check_masks(train.samples, DataConfig(**data).max_megapixels)
        named = named or {"min_share": wish.min_share, "unmasked": unmasked}
    decision = new_decision(past, kind, wish.reason, wish.who, **named)
    allowed = Allowed([*holding, decision], run.transform)
    sample_of = {sample.name: sample for sample in catalog.samples}
    anchors = {slot: run.head.proto_manager.anchor(*slot) for slot in run.head.proto_manager.used_slots()}
    slots = [
        slot
        for slot, anchor in anchors.items()
        if anchor is not None and allowed.forbids(anchor, sample_of.get(anchor.file or ""))
    ]
    if not slots:
        _refuse_again(decision, holding)
    refuse_other_images(run, catalog.root, slots)
    new_run = replace(run, root=catalog.root.resolve(), data=data)
    change = partial(replace_anchors, run, train, allowed, slots, device, num_workers)
    return carry_out(new_run, decision, change, catalog, device, num_workers, state, care)


def _refuse_again(decision: Decision, holding: Sequence[Decision]) -> None:
    """What is forbidden already, and no anchor stands there, is refused."""
    for made in holding:
        if made.kind != decision.kind:
            continue
        if made.kind == "image" and made.file == decision.file:
            what = made.file
        elif made.kind == "mask" and (made.min_share or 0) >= (decision.min_share or 0):
            what = f"less than {made.min_share:g} of a patch inside its mask"
        else:
            continue
        raise InputError(
            f"already forbidden: {what} (decision {made.id}, {made.time}, by {made.who}: {made.reason!r}); no anchor "
            "stands there"
        )


def refuse_other_images(run: Run, root: Path, leaving: Sequence[Slot]) -> None:
    """Images from a new place must be those that the anchors that stay were taken from."""
    if root.resolve() == run.root.resolve():
        return
    manager = run.head.proto_manager
    stay = {manager.anchor(*slot) for slot in manager.used_slots() if slot not in leaving}
    wrong = sorted({a.file for a in stay if a is not None and a.file and not holds(root, a.file, a.sha256)})
    if wrong:
        raise InputError(
            f"{len(wrong)} anchors' files are missing or changed below {root}: {listing(wrong, 3)}; expected the "
            "images that the run was trained on, in folders as they were"
        )


def holds(root: Path, name: str, digest: str | None) -> bool:
    """Whether an anchor's file is below the root, and the same as it was."""
    file = file_within(root, name)
    return file is not None and is_file(file) and digest in (None, sha256_of(file))


def keep(run: Run, prototype: str, reason: str, who: str = "") -> Decision:
    """Record that a prototype (``class:number``) was reviewed and is to stay; it may still be forbidden later.

    As for :func:`forbid`, :func:`protopush.runs.decisions.alone` is held since before the run was opened.

    Raises:
        InputError: there is no such prototype, it has no anchor, or there is no reason.
    """
    state, past = state_of(run.folder), load_decisions(run.folder)
    decision = new_decision(past, "keep", reason, who, **named_prototype(run, prototype))
    write_decision(run, decision, state)
    return decision
