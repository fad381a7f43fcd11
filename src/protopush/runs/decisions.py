"""Log of decisions about prototypes, ``decisions.jsonl``: one a line, none ever removed.

A decision enters a run alone (a lock), with all files that it changes, or not at all.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from protopush.data.files import changing
from protopush.errors import InputError
from protopush.metrics.glossary import metric_text
from protopush.models.model_folder import Run, save_run
from protopush.nn.prototypes import Anchor

FILE = "decisions.jsonl"
FORBIDDING = ("prototype", "image", "mask")
KINDS = (*FORBIDDING, "keep", "undo")
LOCK = ".lock"
PATIENCE = 3600.0  # seconds; a decision on a large data set takes minutes


@dataclass(frozen=True)
class Replacement:
    """A prototype that got another anchor.

    Attributes:
        class_index, class_name, prototype: which.
        old, new: what it stood for and what it stands for.
        old_vector: where it was, base64 of D float32 (little-endian): after a push with momentum, the old anchor alone
            could not bring it back.
        old_features: where it had a live anchor, that anchor's features, base64 of C float32; they make the prototype.
        old_index: the live anchor's place in the training data.
    """

    class_index: int
    class_name: str
    prototype: int
    old: Anchor
    new: Anchor
    old_vector: str
    old_features: str | None = None
    old_index: int | None = None

    @property
    def slot(self) -> tuple[int, int]:
        """(class, prototype)."""
        return self.class_index, self.prototype

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Replacement:
        """Read what :meth:`Decision.to_dict` wrote."""
        anchors = {name: Anchor.from_dict(values[name]) for name in ("old", "new")}
        return cls(**_fields(cls, values) | anchors)


@dataclass(frozen=True)
class Flip:
    """A validation image that the model gives another answer for.

    Attributes:
        file: relative to the data's root.
        label, before, after: classes: the image's own, and what the model said and says.
    """

    file: str
    label: str
    before: str
    after: str


@dataclass(frozen=True)
class Decision:
    """One decision. Attributes that say nothing for its kind are None.

    Attributes:
        id: its number in the run, from 1.
        time: UTC, ISO 8601.
        who, reason: the person's name and words.
        kind: one of :data:`KINDS`.
        class_name, prototype: for a prototype, which one; for an image, its class; for an undo, as in what it undoes.
        file: the image, relative to the data's root.
        sha256: of that file.
        cell, region, box: the patch, as in :class:`protopush.nn.prototypes.Anchor`.
        min_share: for masks: the share of a patch's box that must lie inside.
        unmasked: for masks: how many of the training images have none, and are not restricted.
        undoes: for an undo: the number of the decision that no longer holds.
        replaced: the prototypes that got another anchor by it.
        biases: of each class before and after, where they were moved with it.
        flips: the validation images that the model gives another answer for.
        val_before, val_after: ``n``, ``balanced_accuracy`` and ``auroc`` on the validation images, if there are any.
    """

    id: int
    time: str
    who: str
    kind: str
    reason: str
    class_name: str | None = None
    prototype: int | None = None
    file: str | None = None
    sha256: str | None = None
    cell: int | None = None
    region: tuple[float, float, float, float] | None = None
    box: tuple[int, int, int, int] | None = None
    min_share: float | None = None
    unmasked: int | None = None
    undoes: int | None = None
    replaced: tuple[Replacement, ...] = ()
    biases: dict[str, tuple[float, float]] | None = None
    flips: tuple[Flip, ...] = ()
    val_before: dict[str, Any] | None = None
    val_after: dict[str, Any] | None = None

    @property
    def summary(self) -> str:
        """What was decided, in a few words."""
        name, place = f"{self.class_name} #{self.prototype}", f"{self.file}, cell {self.cell}"
        free = f"; {self.unmasked} training images have no mask and stay unrestricted" if self.unmasked else ""
        return {
            "prototype": f"{name} must not stand for its part of {place}",
            "image": f"no prototype may stand for a part of {self.file}",
            "mask": f"prototypes must lie inside the masks (at least {self.min_share} of the part){free}",
            "keep": f"{name} is kept ({place})",
            "undo": f"decision no. {self.undoes} is undone",
        }[self.kind]

    @property
    def effect(self) -> str:
        """What it has changed, in sentences: new anchors, and the balanced accuracy on the validation images."""
        if self.kind == "keep":
            return "Nothing was changed."
        moved = [f"{one.class_name} #{one.prototype} now stands for a part of {one.new.file}" for one in self.replaced]
        text = "; ".join(moved) + "." if moved else "No prototype was replaced."
        before, after = self.val_before or {}, self.val_after or {}
        was, now = before.get("balanced_accuracy"), after.get("balanced_accuracy")
        if was is None or now is None:
            return f"{text} There are no validation images to measure the effect on."
        change = "unchanged" if round(was, 3) == round(now, 3) else f"{100 * (now - was):+.1f} points"
        numbers = f"{metric_text(was)} before, {metric_text(now)} after ({change})"
        gain = sum((flip.after == flip.label) - (flip.before == flip.label) for flip in self.flips)
        answers = f"; {len(self.flips)} of them get another answer ({gain:+d} right)" if self.flips else ""
        biases = " Biases were moved so that each class is as probable as before on the whole." if self.biases else ""
        return f"{text} Balanced accuracy on {before.get('n')} validation images: {numbers}{answers}.{biases}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _plain(self) | {"replaced": [_plain(one) for one in self.replaced]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """Read what :meth:`to_dict` wrote; of a later version, unknown keys are left out, unknown kinds refused."""
        if values["kind"] not in KINDS:
            raise ValueError(f"the kind {values['kind']!r} is none of: {', '.join(KINDS)}")
        plain = _fields(cls, values)
        for name in ("region", "box"):
            plain[name] = tuple(values[name]) if values.get(name) is not None else None
        plain["replaced"] = tuple(Replacement.from_dict(one) for one in values["replaced"])
        plain["flips"] = tuple(Flip(**one) for one in values.get("flips", ()))
        if values.get("biases") is not None:
            plain["biases"] = {name: (old, new) for name, (old, new) in values["biases"].items()}
        return cls(**plain)


def _plain(record: Replacement | Decision) -> dict[str, Any]:
    """Values for JSON, with the names of ``prototypes.json``."""
    return {"class" if key == "class_name" else key: value for key, value in asdict(record).items()}


def _fields(kind: type[Replacement] | type[Decision], values: Mapping[str, Any]) -> dict[str, Any]:
    named = {key: value for key, value in values.items() if key in kind.__dataclass_fields__}
    return named | {"class_name": values["class"]}


def new_decision(past: Sequence[Decision], kind: str, reason: str, who: str, **named: Any) -> Decision:
    """The decision after those of the past; ``who`` is by default the user's login. No reason is an InputError."""
    if not reason.strip():
        raise InputError("no reason given; expected --reason TEXT, for those who read the log later")
    try:
        who = who.strip() or getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        who = "unknown"
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Decision(len(past) + 1, time, who, kind, reason.strip(), **named)


def load_decisions(folder: Path) -> list[Decision]:
    """The decisions of a run, first to last; none where nothing was ever forbidden.

    Raises:
        InputError: the file is damaged, or holds a kind that this version does not know.
    """
    lines, found = _lines(folder), list[Decision]()
    try:
        for line in lines:
            found += [Decision.from_dict(json.loads(line))]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"damaged file: {folder / FILE}, line {len(found) + 1} ({error}); take it from a copy of the run, or "
            "update protopush"
        ) from error
    return found


def in_force(decisions: Sequence[Decision]) -> list[Decision]:
    """Those that forbid something and were not undone."""
    undone = {made.undoes for made in decisions}
    return [made for made in decisions if made.kind in FORBIDDING and made.id not in undone]


def add_decision(folder: Path, to: Path, decision: Decision) -> None:
    """Write the decisions of ``folder``, as they stand there, and one more into ``to``."""
    line = json.dumps(decision.to_dict(), ensure_ascii=False, allow_nan=False)
    (to / FILE).write_text("\n".join([*_lines(folder), line]) + "\n", encoding="utf-8")


def _lines(folder: Path) -> list[str]:
    """The lines of the log; not ``splitlines``, which also cuts at signs that JSON lets stand in a text."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"damaged file: {folder / FILE} ({error}); take it from a copy of the run") from error
    return [line for line in text.split("\n") if line]


@contextmanager
def alone(folder: Path, waiting: Callable[[], None] = lambda: None, patience: float = PATIENCE) -> Iterator[None]:
    """Be the only one who decides about a run, among all threads and processes; the others wait.

    The run must be opened inside: what was read before may be another's past. ``.lock`` stays in the folder, since
    removing it would let two in. A folder that holds no run isn't touched. ``waiting`` is called if somebody else is
    deciding.

    Raises:
        InputError: somebody else is deciding all that time, or the folder can't be written.
    """
    if not (folder / "config.json").is_file():
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire(timeout=patience)
    except Timeout as error:
        raise InputError(f"another decision about {folder} is still being worked out; try again later") from error
    except OSError as error:
        raise InputError(f"cannot write in {folder} ({error.strerror or error}); ask for the right to") from error
    try:
        yield
    finally:
        lock.release()


def write_decision(run: Run, decision: Decision, state: list[bytes]) -> None:
    """Add a decision to the log, and write the run as it is to be where prototypes were replaced.

    Raises:
        InputError: the folder's state is no longer that from before anything was worked out (:func:`state_of`):
            somebody who held no lock has changed the run meanwhile; it is as that left it.
    """
    with changing(run.folder) as stage:
        if decision.replaced:
            save_run(replace(run, folder=stage), {one.slot for one in decision.replaced}, run)
        add_decision(run.folder, stage, decision)
        if state_of(run.folder) != state:
            raise InputError(f"{run.folder} was changed by another process meanwhile; it is as that left it; try again")


def state_of(folder: Path) -> list[bytes]:
    """What every change of a run changes."""
    files = (folder / name for name in ("config.json", FILE))
    return [file.read_bytes() if file.is_file() else b"" for file in files]
