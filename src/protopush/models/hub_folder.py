"""Folder to be shared: a run's own format, without what only concerns this computer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protopush.backbones.create import Backbone
from protopush.data.files import changing, read_json, write_json
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError
from protopush.models.crops import crop_name, has_crops
from protopush.models.model_card import MARK, card
from protopush.models.model_folder import Run, picture_name, save_pictures, save_run
from protopush.nn.head import HeadOptimal
from protopush.nn.prototypes import Anchor

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel

NOT_SHARED = "(not shared)"  # in place of folders of this computer
TRAINED = ("config.yaml", "checkpoints", "decisions.jsonl")  # what only a run that training wrote holds


def save(model: ProtoModel, folder: Path) -> None:
    """Write a model as :meth:`ProtoModel.save_pretrained` says: whole, or not at all."""
    check(model)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; expected a folder to save the model in; choose another one")
    if any((folder / name).exists() for name in TRAINED):
        raise InputError(
            f"{folder} is a run that training wrote, which would no longer know where its images are; expected another "
            "folder; choose one"
        )
    _make(folder)
    with changing(folder) as stage:
        run = _run_of(model, stage)
        save_pictures(run, crops_only=True)
        _copy_pictures(model, run)
        save_run(replace(run, root=Path(NOT_SHARED)))
        _forget_groups(stage / "prototypes.json")
        numbers = _copy_numbers(model, stage)
        readme = folder / "README.md"
        if not readme.is_file() or MARK in readme.read_text(encoding="utf-8", errors="replace"):
            (stage / "README.md").write_text(card(model, numbers), encoding="utf-8")
        stale = {file.name for file in (folder / "prototypes").glob("class*.*")}
        stale -= {file.name for file in (stage / "prototypes").iterdir()} if (stage / "prototypes").is_dir() else set()
    for name in stale:  # of prototypes that now stand for something else
        (folder / "prototypes" / name).unlink(missing_ok=True)
    if numbers is None:
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def check(model: ProtoModel) -> None:
    """Whether a folder could hold the model.

    Raises:
        InputError: it couldn't.
    """
    if not isinstance(model.backbone, Backbone):
        kind = type(model.backbone).__name__
        raise InputError(f"the backbone is a {kind}; wrap it with protopush.create_backbone first")
    if not isinstance(model.head, HeadOptimal):
        raise InputError(f"the head is a {type(model.head).__name__}; expected a HeadOptimal, which a folder can hold")
    classes = model.head.proto_manager.num_classes
    if model.class_names and len(model.class_names) != classes:
        raise InputError(
            f"{len(model.class_names)} class names for a model of {classes} classes; expected one for each, in label "
            "order; set model.class_names"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror or error}); choose another folder") from error


def _run_of(model: ProtoModel, folder: Path) -> Run:
    """The model as a run in ``folder``, its root where it was read from: for pictures, not to be named."""
    recorded: dict[str, Any] = dict(model.origin.config) if model.origin is not None else {}
    names = list(model.class_names) or [f"class {c}" for c in range(model.head.proto_manager.num_classes)]
    data = {"source": "auto", "split_seed": 0} | recorded.get("data", {}) | {"path": NOT_SHARED}
    transform = EvalTransform(model.backbone.preprocessing, recorded.get("crop_pct", 1.0))
    return Run(model, names, transform, Path(recorded.get("root", NOT_SHARED)), data, folder)


def _copy_pictures(model: ProtoModel, run: Run) -> None:
    """Pictures of the folder that the model was read from, where the prototype still stands for the same thing."""
    for name, source in _known_pictures(model):
        target = run.folder / "prototypes" / name
        if source.is_file() and not target.exists():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)


def _known_pictures(model: ProtoModel) -> Iterator[tuple[str, Path]]:
    if model.origin is None or not (model.origin.folder / "prototypes.json").is_file():
        return
    for entry in read_json(model.origin.folder / "prototypes.json")["prototypes"]:
        slot, before = (entry["class_index"], entry["prototype"]), entry["anchor"]
        anchor, crops = model.head.proto_manager.anchor(*slot), has_crops(model)
        same = ("file", "sha256", "region") if crops else ("file", "sha256")
        if before and anchor and all(getattr(anchor, key) == getattr(Anchor.from_dict(before), key) for key in same):
            name = crop_name(*slot) if crops else picture_name(*slot)
            yield name, model.origin.folder / "prototypes" / name


def _forget_groups(certificate: Path) -> None:
    """Groups are patients, as often as not."""
    values = read_json(certificate)
    for entry in values["prototypes"]:
        if entry["anchor"] is not None:
            entry["anchor"]["group"] = None
    write_json(certificate, values)


def _copy_numbers(model: ProtoModel, stage: Path) -> Path | None:
    """``metrics.jsonl``, if the model is still the one that it was measured on."""
    if model.origin is None:
        return None
    metrics = model.origin.folder / "metrics.jsonl"
    if (
        not metrics.is_file()
        or read_json(stage / "config.json")["weights_sha256"] != model.origin.config["weights_sha256"]
    ):
        return None
    return Path(shutil.copyfile(metrics, stage / "metrics.jsonl"))
