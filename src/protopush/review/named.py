"""What the user's words for a prototype or an image mean in a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from protopush.data.images import sha256_of
from protopush.data.manifest import Sample
from protopush.errors import InputError, listing
from protopush.training.run import Run


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
    used = manager.mask()[c].nonzero().flatten().tolist()
    if k not in used:
        raise InputError(f"no prototype {names[c]}:{k}; expected one of: {listing([f'{names[c]}:{i}' for i in used])}")
    anchor = manager.anchors[c * manager.max_prototypes + k]
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
    near = get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {listing(names)}"
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
    slots, digests = run.head.proto_manager.max_prototypes, dict[str, str | None]()
    for row, anchor in enumerate(run.head.proto_manager.anchors):
        if anchor is not None and anchor.file is not None:
            classes.setdefault(anchor.file, row // slots)
            digests[anchor.file] = anchor.sha256
    inside = [name for name in (_relative(path, root) for path in (root / words, Path(words))) if name]
    name = next((name for name in inside if name in classes), None)
    if not inside:
        raise InputError(f"{words} lies outside the data folder {root}; expected one of its images")
    if name is None:
        near = get_close_matches(inside[0], classes, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected a path below {root}"
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
