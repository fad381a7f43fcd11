"""Folder of a model: weights, configuration, certificate and pictures; read without unpickling anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from protopush.backbones.create import Backbone, create_backbone
from protopush.backbones.weights import misfit
from protopush.data.files import finish_change, read_json, write_atomic, write_json
from protopush.data.images import read_image, sha256_of
from protopush.data.shards import is_file
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError, first_line
from protopush.models.crops import has_crops, save_crop
from protopush.models.stored_run import Run as Run
from protopush.models.stored_run import current_versions, recorded_versions, version_change
from protopush.models.stored_run import picture_name as picture_name
from protopush.nn.head import HeadOptimal
from protopush.nn.priors import read_prior
from protopush.push.certificate import certificate, file_within, refuse_newer, restore_anchors

FORMAT = 1
PRIORS = ("prior", "train_shares")  # of a model, by class in config.json; null where they are not known
PICTURE_SIDE = 640  # longest side of the anchors' pictures that a run keeps


@dataclass(frozen=True)
class Origin:
    """The run folder that a model was read from, and what its ``config.json`` said then."""

    folder: Path
    config: Mapping[str, Any]


def save_run(run: Run, changed: Collection[tuple[int, int]] | None = None, before: Run | None = None) -> None:
    """Write ``model.safetensors``, ``prototypes/*``, ``prototypes.png``, ``prototypes.json``, last ``config.json``.

    Of pictures those of the slots that have ``changed`` alone, where the others are those of the run ``before``.

    Raises:
        InputError: the folder can't be written, or the backbone is a module of your own, which no name could reopen.
    """
    head, folder = run.head, run.folder
    backbone = run.model.backbone
    if not isinstance(backbone, Backbone):
        raise InputError(f"the backbone is a {type(backbone).__name__}; wrap it with protopush.create_backbone first")
    state = {key: value.detach().cpu().contiguous() for key, value in run.model.state_dict().items()}
    weights = folder / "model.safetensors"
    write_atomic(weights, lambda temporary: save_file(state, temporary))
    digest = sha256_of(weights)
    save_pictures(run, changed)
    _save_gallery(run, head.compared(backbone.regions).reach, before or run)
    write_json(folder / "prototypes.json", certificate(head.proto_manager, run.class_names, digest))
    manager = head.proto_manager
    write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "versions": current_versions(),
            "weights_sha256": digest,
            "backbone": {"name": backbone.name, "channels": backbone.channels, "recipe": backbone.recipe},
            "preprocessing": backbone.preprocessing.to_dict(),
            "crop_pct": run.transform.crop_pct,
            "head": {
                "num_classes": manager.num_classes,
                "num_prototypes": manager.mask().sum(dim=1).tolist(),
                "max_prototypes": manager.max_prototypes,
                "embed_dim": manager.dim,
                "match": head.match,
                "top_patches": head.top_patches,
                "anchoring": head.anchoring,
                **({} if manager.anchor_crops is None else {"crop_size": manager.anchor_crops.shape[3]}),
            },
            "classes": list(run.class_names),
            **{name: _by_class(getattr(run.model, name), run.class_names) for name in PRIORS},
            "root": str(run.root),
            "data": run.data,
        },
    )


def _by_class(shares: Sequence[float] | None, class_names: Sequence[str]) -> dict[str, float] | None:
    return None if shares is None else dict(zip(class_names, shares, strict=True))


def save_pictures(run: Run, changed: Collection[tuple[int, int]] | None = None, crops_only: bool = False) -> None:
    """Write ``prototypes/*.jpg`` of the slots that have ``changed``, or all, if the anchors' files are below the root.

    Of a local model also the crops (``*.png``); where they are ``crops_only``, no patient's whole image.
    """
    manager, crops = run.head.proto_manager, has_crops(run.model)
    for c, k in manager.used_slots() if changed is None else changed:
        anchor = manager.anchor(c, k)
        if anchor is None or anchor.file is None:
            continue
        file = file_within(run.root, anchor.file)
        if file is None or not is_file(file):
            continue
        picture = read_image(file)
        if crops:
            save_crop(run, (c, k), anchor, picture)
        if crops and crops_only:
            continue
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        target = run.folder / "prototypes" / picture_name(c, k)
        write_atomic(target, lambda temporary, p=picture: p.save(temporary, format="JPEG", quality=92))  # type: ignore[misc]


def _save_gallery(run: Run, reach: str, before: Run) -> None:
    """``prototypes.png``: each class's prototypes as crops, beside their source images; some are there from before."""
    from protopush.explain import draw_gallery  # here, so that opening a model does not import what draws

    manager = run.head.proto_manager
    gallery = draw_gallery(
        run.class_names,
        manager.anchor,
        lambda c, k: run.source(c, k) or before.source(c, k),
        manager.num_classes,
        manager.max_prototypes,
        per_class=manager.max_prototypes,
        reach=reach,
    )
    write_atomic(run.folder / "prototypes.png", lambda file: gallery.save(file, format="PNG", compress_level=1))


def read_run(
    folder: str | Path, model_class: type[Any], backbone: nn.Module | None = None, check_weights: bool = True
) -> Run:
    """The run in a folder, its model rebuilt.

    Args:
        folder: as :func:`save_run` wrote it.
        model_class: what the model is made of; it takes the backbone and the head.
        backbone: the module itself, where it is one of your own, which no name could build again.
        check_weights: refuse weights other than those that the run saved; False: for who reports what no longer holds.

    Raises:
        InputError: a file is missing or damaged, or of a newer format.
    """
    folder = Path(folder)
    finish_change(folder)
    if not folder.is_dir():
        raise InputError(f"no such run folder: {folder}; expected one that `protopush train --out` wrote")
    if (folder / "metrics.jsonl").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"the run in {folder} did not come to its end; go on with protopush train --resume")
    config = read_json(folder / "config.json")
    refuse_newer(config, FORMAT, str(folder / "config.json"))
    try:
        features = _rebuild(config, backbone)
        model = model_class(features, HeadOptimal(features.channels, **config["head"]))
        classes, transform = list(config["classes"]), EvalTransform(features.preprocessing, config["crop_pct"])
        root, data, digest = Path(config["root"]), dict(config["data"]), config["weights_sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"damaged file: {folder / 'config.json'} ({error!r}); take it from a copy of the run"
        ) from error
    _load_weights(model, folder / "model.safetensors", digest if check_weights else None, config)
    restore_anchors(model.head.proto_manager, read_json(folder / "prototypes.json"))
    model.class_names = classes
    for name in PRIORS:
        if (shares := config.get(name)) is not None:  # runs of before have none
            setattr(model, name, read_prior(shares, classes, None, f"{name} in {folder / 'config.json'}"))
    model.origin = Origin(folder.absolute(), config)
    return Run(model.eval(), classes, transform, root, data, folder)


def _rebuild(config: Mapping[str, Any], module: nn.Module | None) -> Backbone:
    """The backbone of a run, without weights and without a network."""
    recorded = config["backbone"]
    recipe: dict[str, Any] = recorded.get("recipe") or {"name_or_module": recorded["name"]}  # once, only the name
    if module is not None:
        recipe = {key: recipe[key] for key in ("name", "layout", "prefix_tokens") if key in recipe}
        recipe["name_or_module"] = module
    if "name_or_module" not in recipe:
        raise InputError(
            f"the backbone {recorded['name']} of this run is a module of your own; expected that module; "
            "open the run with protopush.load(folder, backbone=module)"
        )
    try:
        return create_backbone(pretrained=False, **_without_files(recipe), **config["preprocessing"])
    except InputError as error:  # a library may have dropped the model, or an option of it
        change = version_change(recorded_versions(config))
        raise InputError(f"{error}; the run was {change}" if change else str(error)) from error


def _without_files(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that reads no other weights (timm's ``checkpoint_path``) than the run's: a folder may be anybody's."""
    kept = {key: value for key, value in recipe.items() if key != "checkpoint_path"}
    if "parts" in kept:
        kept["parts"] = [_without_files(part) for part in kept["parts"]]
    return kept


def _load_weights(model: nn.Module, file: Path, digest: str | None, config: Mapping[str, Any]) -> None:
    """Load a run's weights; where whole ones do not fit, say which change of versions lies between."""
    if not file.is_file():
        raise InputError(f"no such file: {file}; the run is incomplete: train it again or take a copy")
    if digest is not None and sha256_of(file) != digest:
        raise InputError(
            f"damaged file: {file} (its sha256 is not the one in config.json); expected the weights that this run "
            "saved; take them from a copy of the run"
        )
    try:
        state = load_file(file)
    except Exception as error:  # safetensors raises its own type
        raise InputError(f"damaged file: {file} ({first_line(error)}); take it from a copy of the run") from error
    if found := misfit(model.state_dict(), state):
        advice = version_change(recorded_versions(config)) or "take the run's files from one copy"
        raise InputError(f"the weights in {file} do not fit the model that config.json describes ({found}); {advice}")
    model.load_state_dict(state)
