"""Undoing a decision: what it forbade may be an anchor again, and each prototype goes back to where it stood before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from protopush.data.images import read_image
from protopush.data.manifest import Catalog, DataConfig
from protopush.errors import InputError, listing
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.certificate import file_within
from protopush.runs.candidates import Slot
from protopush.runs.decisions import FORBIDDING, Decision, Replacement, in_force, load_decisions, new_decision, state_of
from protopush.runs.outcome import Care, carry_out
from protopush.runs.reanchor import Allowed, level_of, put_back, standing, taken, text_of
from protopush.runs.review import holds, refuse_other_images
from protopush.runs.split_record import open_catalog

Move = tuple[int, Replacement]  # away from a place, with its decision's place in the log
Moves = dict[Slot, list[Move]]
Here = dict[Slot, Replacement]  # where each prototype stands


def undo(
    run: Run, decision_id: int, data: dict[str, Any], device: torch.device, reason: str, who: str = "",
    num_workers: int = 0, dry_run: bool = False, catalog: Catalog | None = None,
) -> Decision:  # fmt: skip
    """Undo one decision, and write that into the run as a decision of its own; the first stays in the log.

    A prototype goes back to the first place it ever stood at that this decision alone has forbidden: the very anchor
    and the very numbers. It stays where it is if another decision forbids that place, if another prototype of its class
    has taken it since (the patch; the image or group where the run gives each prototype its own), or if a push has
    moved it on.

    The arguments are those of :func:`protopush.runs.review.forbid`; ``who`` is by default the user's login name.

    Raises:
        InputError: no such decision, it forbids nothing or was undone before, or an image that a prototype would go
            back to isn't there any more; the run is as it was.
    """
    state, past = state_of(run.folder), load_decisions(run.folder)
    undone = _to_undo(past, decision_id)
    named = {name: getattr(undone, name) for name in ("class_name", "prototype", "file", "sha256")}
    decision = new_decision(past, "undo", reason, who, undoes=undone.id, **named)
    catalog = catalog or open_catalog(DataConfig(**data), run.class_names, run.folder)
    refuse_other_images(run, catalog.root, [])
    new_run = replace(run, root=catalog.root.resolve(), data=data)

    def change(_: Sequence[Anchor]) -> list[Replacement]:
        return _go_back(run, [*past, decision], undone, catalog, device)

    return carry_out(new_run, decision, change, catalog, device, num_workers, state, Care(dry_run))


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


def _moves(slot: Slot, now: Anchor, log: Sequence[Decision]) -> list[Move]:
    """How a prototype has come to where it stands now since the last push, the oldest move first."""
    moves, last = list[Move](), now
    for time in range(len(log) - 1, -1, -1):
        for one in log[time].replaced:
            if one.slot == slot:
                if one.new != last:  # a push came between: what was before is past
                    return moves
                moves.insert(0, (time, one))
                last = one.old
    return moves


def _go_back(
    run: Run, log: Sequence[Decision], undone: Decision, catalog: Catalog, device: torch.device
) -> list[Replacement]:
    """Put prototypes back in the model; returns the records, and changes nothing where it fails."""
    manager = run.head.proto_manager
    run.head.sync_prototypes()
    here = {slot: standing(run, slot) for slot in manager.used_slots() if manager.anchor(*slot) is not None}
    moves = {slot: _moves(slot, one.old, log) for slot, one in here.items()}
    places = _open_places(run, here, moves, log, undone, catalog)
    chosen = _without_conflict(here, moves, places, level_of(run.folder))
    old = [move.old for move in chosen]
    wrong = {a.file or "" for a in old if a.file is None or not holds(catalog.root, a.file, a.sha256)}
    if wrong:
        raise InputError(
            f"prototypes would go back to images that are missing or changed below {catalog.root}: "
            f"{listing(sorted(wrong), 3)}; expected the files as they were; nothing was changed"
        )
    for move in [_with_features(run, move, catalog, device) for move in chosen]:
        put_back(manager, move)
    if chosen and undone.biases:
        _move_biases_back(run, undone.biases)
    run.head.sync_prototypes()
    return [replace(here[one.slot], new=standing(run, one.slot).old) for one in chosen]


@torch.no_grad()
def _move_biases_back(run: Run, biases: Mapping[str, tuple[float, float]]) -> None:
    """Biases as they were, exactly where nothing else has moved them since."""
    bias = run.head.bias
    for c, name in enumerate(run.class_names):
        old, new = biases[name]
        bias[c] = old if float(bias[c]) == new else bias[c] + (old - new)


def _open_places(
    run: Run, here: Here, moves: Moves, log: Sequence[Decision], undone: Decision, catalog: Catalog
) -> Moves:
    """The places that only the undone decision forbade, the first first; none later than where a prototype stands."""
    sample_of = {sample.name: sample for sample in catalog.samples}
    alone, rest = Allowed([undone], run.transform), Allowed(log, run.transform)
    found: Moves = {}
    for slot, trail in moves.items():
        for time, move in trail:
            sample = sample_of.get(move.old.file or "")
            if _patch(move.old) == _patch(here[slot].old):
                break
            if alone.forbids(move.old, sample) and not rest.forbids(move.old, sample):
                found.setdefault(slot, []).append((time, move))
    return found


def _without_conflict(here: Here, moves: Moves, left: Moves, level: str) -> list[Replacement]:
    """The first of each prototype's open places, unless another of its class has come there since."""

    def in_the_way(slot: Slot) -> bool:
        """Whether another prototype would stand where this one wants to, and did not stand there beside it before."""
        time, move = left[slot][0]
        others = []
        for other in moves:
            if other != slot and other[0] == slot[0]:
                there = left[other][0][1].old if other in left else here[other].old
                before = next((one.old for when, one in moves[other] if when >= time), here[other].old)
                if _patch(there) != _patch(before):
                    others.append(there)
        anchor = move.old
        free = taken(others, level).cells((anchor.file, anchor.sha256), anchor.group, [anchor.region])
        return not bool(free)

    while wrong := [slot for slot in left if in_the_way(slot)]:
        left[wrong[-1]].pop(0)
        left = {slot: some for slot, some in left.items() if some}
    return [some[0][1] for some in left.values()]


def _patch(anchor: Anchor) -> tuple[object, ...]:
    return anchor.file, anchor.sha256, anchor.region


def _with_features(run: Run, move: Replacement, catalog: Catalog, device: torch.device) -> Replacement:
    """The move with what a live anchor needs; a log of an older version doesn't have it, so it is computed again."""
    anchor = move.old
    if not run.head.proto_manager.is_live or move.old_features is not None:
        return move
    names = [sample.name for sample in catalog.split("train")]
    file = file_within(catalog.root, anchor.file or "")
    if file is None or anchor.file not in names:
        raise InputError(f"{anchor.file} is none of the training images; expected the ones that the run was trained on")
    with preserve_state(run.model):
        pooled, patches = run.model.extract_features(run.transform(read_image(file)).unsqueeze(0).to(device))
        features = pooled[0, 0] if anchor.pooled else patches[0, anchor.cell]
        vector = F.normalize(run.head.proj(features), dim=-1)
    index = names.index(anchor.file)
    return replace(move, old_vector=text_of(vector), old_features=text_of(features), old_index=index)
