"""Review of prototypes: keep one, or forbid a patch, an image or a region and give the next best patch its place."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from protopush.data.dataset import check_masks
from protopush.data.images import sha256_of
from protopush.data.manifest import Catalog, DataConfig, Sample
from protopush.errors import InputError, did_you_mean, listing
from protopush.models.model_folder import Run
from protopush.push.certificate import file_within
from protopush.runs.allowed import Allowed
from protopush.runs.decisions import Decision, in_force, load_decisions, login, now, state_of, write_decision
from protopush.runs.reanchor import Bench, replace_anchors
from protopush.runs.splits import open_split, scores, validation_of


def named_prototype(run: Run, words: str) -> dict[str, Any]:
    """Class, prototype and patch of ``mel:3``, or ``4:3`` (the class's number), for a decision.

    Raises:
        InputError: there is no such class or prototype, or it has no anchor in a file.
    """
    name, colon, number = words.rpartition(":")
    if not colon or not number.isdecimal():
        raise InputError(f"prototype {words!r}; expected CLASS:NUMBER, such as {run.class_names[0]}:0")
    manager = run.head.proto_manager
    c, k, names = _class_index(name, run.class_names), int(number), run.class_names
    used = manager.used_of(c)
    if k not in used:
        raise InputError(f"no prototype {names[c]}:{k}; expected one of: {listing([f'{names[c]}:{i}' for i in used])}")
    anchor = manager.anchor(c, k)
    if anchor is None or anchor.file is None:
        what = "was never pushed" if anchor is None else "has an anchor that names no file"
        raise InputError(
            f"prototype {names[c]}:{k} {what}, so that there is nothing to forbid; protopush push it first"
        )
    place = {name: getattr(anchor, name) for name in ("file", "sha256", "cell", "grid", "box")}
    return {"class_name": names[c], "prototype": k, **place}


def _class_index(name: str, names: Sequence[str]) -> int:
    """A class by its name or, where none is called so, by its number."""
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    hint = did_you_mean(name, names, f"expected one of: {listing(names)}", cutoff=0.4)
    raise InputError(f"unknown class {name!r}; {hint}")


def named_image(run: Run, words: str, samples: Sequence[Sample], root: Path) -> dict[str, Any]:
    """Name, hash and class of an image file, for a decision.

    Args:
        run: an image that its anchors stand for is known, even if the training data no longer has it.
        words: the path, relative to ``root`` or to the working folder, or absolute.
        samples: the training images.
        root: the folder that their names are relative to.

    Raises:
        InputError: the path leads out of the root, or isn't one of a training image.
    """
    classes = {sample.name: sample.label for sample in samples}
    manager, digests = run.head.proto_manager, dict[str, str | None]()
    for row, anchor in enumerate(manager.anchors):
        if anchor is not None and anchor.file is not None:
            classes.setdefault(anchor.file, manager.slot(row)[0])
            digests[anchor.file] = anchor.sha256
    inside = [name for name in (_relative(path, root) for path in (root / words, Path(words))) if name]
    name = next((name for name in inside if name in classes), None)
    if not inside:
        raise InputError(f"{words} lies outside the data folder {root}; expected one of its images")
    if name is None:
        hint = did_you_mean(inside[0], classes, f"expected a path below {root}")
        raise InputError(f"{words} is none of the {len(samples)} training images; {hint}")
    file = root / name
    digest = sha256_of(file) if file.is_file() else digests.get(name)
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
        """``prototype``, ``image`` or ``mask``.

        Raises:
            InputError: none or several of them, no reason, a share that is none.
        """
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


def forbid(run: Run, wish: Wish, data: dict[str, Any], device: torch.device, num_workers: int = 0) -> Decision:
    """Forbid something, give each prototype that stands for it the next best anchor, and write both into the run.

    Everything is computed first; then the run's files change together, or not at all.

    Args:
        run: as opened, with :func:`protopush.runs.decisions.alone` held since before; its model is on ``device`` and
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


def keep(run: Run, prototype: str, reason: str, who: str = "") -> Decision:
    """Record that a prototype was reviewed and is to stay; it may still be forbidden later.

    Args:
        run: as opened, with :func:`protopush.runs.decisions.alone` held since before.
        prototype: ``class:number``.
        reason: why.
        who: by default the user's login name.

    Raises:
        InputError: there is no such prototype, it has no anchor, or there is no reason.
    """
    state, past = state_of(run.folder), load_decisions(run.folder)
    named = named_prototype(run, prototype)
    if not reason.strip():
        raise InputError("no reason given; expected one, for those who read the log later")
    decision = Decision(len(past) + 1, now(), who.strip() or login(), "keep", reason.strip(), **named)
    write_decision(run, decision, state)
    return decision
