"""Undoing a decision: what it forbade may be an anchor again, and each prototype goes back to where it stood before."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from protopush.data.images import read_image
from protopush.data.manifest import Catalog, DataConfig
from protopush.data.sources import load_catalog
from protopush.errors import InputError, listing
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.certificate import file_within
from protopush.runs.allowed import Allowed
from protopush.runs.decisions import (
    FORBIDDING,
    Decision,
    Replacement,
    in_force,
    load_decisions,
    login,
    now,
    state_of,
    write_decision,
)
from protopush.runs.reanchor import Place, level_of, taken
from protopush.runs.review import holds, refuse_other_images
from protopush.runs.splits import scores, validation_of


def undo(
    run: Run,
    decision_id: int,
    data: dict[str, Any],
    device: torch.device,
    reason: str,
    who: str = "",
    num_workers: int = 0,
) -> Decision:
    """Undo one decision, and write that into the run as a decision of its own; the first stays in the log.

    A prototype goes back to the first place it ever stood at that this decision alone has forbidden: the very anchor
    and the very numbers. It stays where it is if another decision forbids that place, if another prototype of its class
    has taken it since (the patch; the image or group where the run gives each prototype its own), or if a push has
    moved it on.

    Args:
        run: as opened, with :func:`protopush.runs.decisions.alone` held since before; its model is on ``device`` and
            is changed.
        decision_id: the number of a decision that forbids something.
        data: where the training images are, as :attr:`Run.data`.
        device: of the model.
        reason: why.
        who: by default the user's login name.
        num_workers: processes that read images.

    Raises:
        InputError: no such decision, it forbids nothing or was undone before, or an image that a prototype would go
            back to isn't there any more; the run is as it was.
    """
    state, past = state_of(run.folder), load_decisions(run.folder)
    undone = _to_undo(past, decision_id)
    if not reason.strip():
        raise InputError("no reason given; expected --reason TEXT, for those who read the log later")
    config = DataConfig(**data, num_workers=num_workers)
    catalog = load_catalog(config.path, config.source, classes=run.class_names, seed=config.split_seed)
    refuse_other_images(run, catalog.root, [])
    val = validation_of(run, config, catalog)
    named = {name: getattr(undone, name) for name in ("class_name", "prototype", "file", "sha256")}
    decision = Decision(len(past) + 1, now(), who.strip() or login(), "undo", reason.strip(), undoes=undone.id, **named)
    old_head = copy.deepcopy(run.head)
    replaced = _go_back(run, [*past, decision], undone, catalog, device)
    before, *after = scores(run, val, [old_head, run.head] if replaced else [old_head], device, num_workers)
    decision = replace(decision, replaced=tuple(replaced), val_before=before, val_after=after[0] if after else before)
    write_decision(replace(run, root=catalog.root.resolve(), data=data), decision, state)
    return decision


def _to_undo(past: Sequence[Decision], number: int) -> Decision:
    holding = {made.id: made for made in in_force(past)}
    if number in holding:
        return holding[number]
    known = f"expected one of: {listing(list(holding))}" if holding else "nothing is forbidden at present"
    made = next((made for made in past if made.id == number), None)
    if made is None:
        raise InputError(f"no decision {number}; {known}")
    if made.kind not in FORBIDDING:
        raise InputError(f"decision {number} forbids nothing, it is of the kind {made.kind!r}; {known}")
    by = next(other for other in past if other.undoes == number)
    raise InputError(f"decision {number} was undone already (decision {by.id}, {by.time}, by {by.who}); {known}")


@dataclass(frozen=True)
class _Trail:
    """Where a prototype has stood since the last push, the oldest place first.

    Attributes:
        row: of the manager.
        moves: each away from a place, with its decision's place in the log.
        now: where it stands.
    """

    row: int
    moves: list[tuple[int, Replacement]]
    now: Anchor

    @classmethod
    def of(cls, run: Run, row: int, log: Sequence[Decision]) -> _Trail | None:
        manager = run.head.proto_manager
        here, place = manager.anchors[row], manager.slot(row)
        if here is None or not manager.valid_mask[row]:
            return None
        moves, last = list[tuple[int, Replacement]](), here
        for time in range(len(log) - 1, -1, -1):
            for one in log[time].replaced:
                if (one.class_index, one.prototype) == place:
                    if one.new != last:  # a push came between: what was before is past
                        return cls(row, moves, here)
                    moves.insert(0, (time, one))
                    last = one.old
        return cls(row, moves, here)

    def at(self, time: int) -> Anchor:
        """Where it stood when a decision was made."""
        return next((one.old for when, one in self.moves if when >= time), self.now)


def _go_back(
    run: Run, log: Sequence[Decision], undone: Decision, catalog: Catalog, device: torch.device
) -> list[Replacement]:
    """Put prototypes back in the model; returns the records, and changes nothing where it fails."""
    manager = run.head.proto_manager
    run.head.sync_prototypes()
    trails = [found for row in range(len(manager.anchors)) if (found := _Trail.of(run, row, log)) is not None]
    places = {trail.row: _open_places(run, trail, log, undone, catalog) for trail in trails}
    chosen = _without_conflict(trails, places, manager.max_prototypes, level_of(run.folder))
    back = {row: Place.before(move) for row, (_, move) in chosen.items()}
    wrong = sorted({p.anchor.file or "" for p in back.values() if not _is_there(p.anchor, catalog.root)})
    if wrong:
        raise InputError(
            f"prototypes would go back to images that are missing or changed below {catalog.root}: "
            f"{listing(wrong, 3)}; expected the files as they were; nothing was changed"
        )
    back = {row: _with_features(run, place, catalog, device) for row, place in back.items()}
    here = {row: Place.of(manager, row) for row in back}
    for row, place in back.items():
        place.take(manager, row)
    run.head.sync_prototypes()
    return [here[row].replacement(run.class_names[manager.slot(row)[0]], manager, row) for row in back]


def _open_places(
    run: Run, trail: _Trail, log: Sequence[Decision], undone: Decision, catalog: Catalog
) -> list[tuple[int, Replacement]]:
    """The places on a trail that only the undone decision forbade, the first first; none later than where it stands."""
    sample_of = {sample.name: sample for sample in catalog.samples}
    alone, rest = Allowed([undone], run.transform), Allowed(log, run.transform)
    found = []
    for time, move in trail.moves:
        sample = sample_of.get(move.old.file or "")
        if _patch(move.old) == _patch(trail.now):
            break
        if alone.forbids(move.old, sample) and not rest.forbids(move.old, sample):
            found.append((time, move))
    return found


def _without_conflict(
    trails: Sequence[_Trail], places: dict[int, list[tuple[int, Replacement]]], slots: int, level: str
) -> dict[int, tuple[int, Replacement]]:
    """The first place of each prototype that has some, unless another of its class has come there since."""
    left = {row: list(some) for row, some in places.items() if some}
    while True:
        wrong = [row for row in left if _in_the_way(row, left, trails, slots, level)]
        if not wrong:
            return {row: some[0] for row, some in left.items()}
        row = wrong[-1]
        left[row].pop(0)
        if not left[row]:
            del left[row]


def _in_the_way(
    row: int, left: dict[int, list[tuple[int, Replacement]]], trails: Sequence[_Trail], slots: int, level: str
) -> bool:
    """Whether another prototype would stand where this one wants to, and did not stand there beside it before."""
    time, move = left[row][0]
    others = []
    for trail in trails:
        if trail.row != row and trail.row // slots == row // slots:
            there = left[trail.row][0][1].old if trail.row in left else trail.now
            if _patch(there) != _patch(trail.at(time)):
                others.append(there)
    anchor = move.old
    free = taken(others, level).cells((anchor.file, anchor.sha256), anchor.group, anchor.grid)
    return not bool(free[anchor.cell])


def _patch(anchor: Anchor) -> tuple[object, ...]:
    return anchor.file, anchor.sha256, anchor.grid, anchor.cell


def _is_there(anchor: Anchor, root: Path) -> bool:
    return anchor.file is not None and holds(root, anchor.file, anchor.sha256)


def _with_features(run: Run, place: Place, catalog: Catalog, device: torch.device) -> Place:
    """The place with what a live anchor needs; a log of an older version doesn't have it, so it is computed again."""
    manager, anchor = run.head.proto_manager, place.anchor
    if manager.anchor_features is None or place.features is not None:
        return place
    names = [sample.name for sample in catalog.split("train")]
    file = file_within(catalog.root, anchor.file or "")
    if file is None or anchor.file not in names:
        raise InputError(f"{anchor.file} is none of the training images; expected the ones that the run was trained on")
    with preserve_state(run.model):
        pooled, patches = run.model.extract_features(run.transform(read_image(file)).unsqueeze(0).to(device))
        features = pooled[0, 0] if anchor.grid == (1, 1) else patches[0, anchor.cell]
        vector = F.normalize(run.head.proj(features), dim=-1)
    return Place.made_of(anchor, vector, features, names.index(anchor.file))
