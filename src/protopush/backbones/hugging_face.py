"""Vision models of transformers (Wolf et al., 2020), from the Hugging Face hub or a folder.

Everything is read from a folder: the given one, or the hub's in the cache of huggingface_hub. So one place alone needs
a network, and says so at once when there is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protopush._compat import ensure_torchvision
from protopush.backbones.layouts import dry_run, reached
from protopush.backbones.timm_models import BuiltModel
from protopush.data.transforms import Preprocessing
from protopush.errors import InputError, first_line, listing

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
INTERPOLATION_OF = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers
# In the order of preference. The .bin files hold pickles, which transformers reads with weights_only=True.
WEIGHTS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
)
# Parameters that become tokens in front of the cells.
PREFIX_PARAMETERS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
MORE_PREFIX_TOKENS = {"dinov3_convnext": 1}  # that no parameter makes: its pooled feature
# Left out of a recipe: the labels of a dropped classifier, where the checkpoint lay, and the kernel of its attention,
# which may be the name of code in the hub.
NOT_ARCHITECTURE = ("id2label", "label2id", "_name_or_path", "transformers_version", "attn_implementation")
REFUSED = {
    "vit_mae": "it shuffles its cells at random; load its weights into a ViT of timm: vit_base_patch16_224.mae",
    "timm_wrapper": "it is one of timm's; give hf-hub:<model> instead of hf:<model>",
    "timm_backbone": "it is one of timm's; give timm's own name",
}


class HuggingFaceModel(nn.Module):
    """A vision model of transformers, read as timm's are: images to the last map, or to tokens.

    Args:
        net: an ``AutoModel`` (its last hidden state is taken) or an ``AutoBackbone`` with one feature map.

    Attributes:
        num_prefix_tokens: class, distillation and register tokens in front of the cells.
        patch_size: pixels of a token of the first stage, (height, width) or one number for both, where there is one.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        config: Any = net.config
        prefixes = [p for name, p in net.named_parameters() if name.rpartition(".")[2] in PREFIX_PARAMETERS]
        more = MORE_PREFIX_TOKENS.get(config.model_type, 0)
        self.num_prefix_tokens = sum((p.numel() // p.shape[-1] for p in prefixes), start=more)
        self.patch_size = getattr(config, "patch_size", None)
        self.image_size = _side_lengths(getattr(config, "image_size", None))
        self.interpolates = "interpolate_pos_encoding" in signature(net.forward).parameters

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to a map (B, C, h, w) or to tokens (B, N, C).

        Images of another size than the checkpoint's get interpolated position embeddings, where the model can.
        """
        # Not always: for images of the very size, some models interpolate wrongly where that is not square.
        resized = self.interpolates and tuple(images.shape[-2:]) != self.image_size
        output = self.net(pixel_values=images, **({"interpolate_pos_encoding": True} if resized else {}))
        last: Tensor = output.feature_maps[-1] if hasattr(output, "feature_maps") else output.last_hidden_state
        return last

    forward = forward_features


def hugging_face_model(
    name: str, pretrained: bool, options: Mapping[str, Any], preprocessing: Mapping[str, Any]
) -> BuiltModel:
    """A vision model of transformers, its preprocessing, and its recipe.

    Of a model for images and text (CLIP, SigLIP) the vision tower is taken. A checkpoint of a backbone class, and any
    with ``out_features`` or ``out_indices`` among the options, is opened as ``AutoBackbone``, whose last stage is the
    default; all others as ``AutoModel``. Parameters are float32, whatever the checkpoint holds.

    Args:
        name: a model of the hub, or a folder as ``save_pretrained`` writes it.
        pretrained: load the checkpoint's weights.
        options: ``revision`` of the hub's model; ``config``, a dict, in the place of the checkpoint's; all others are
            fields of that config.
        preprocessing: overrides; they do not change the model.

    Raises:
        InputError: transformers is not installed, no such model or no network, unknown options, weights that are
            missing or do not fit.
    """
    ensure_torchvision()  # transformers imports torchvision where it finds it
    try:
        import transformers  # noqa: F401
    except ImportError as cause:
        needed = f"hf:{name} needs transformers ({first_line(cause)}); expected the extra hf"
        raise InputError(f'{needed}; run: pip install "protopush[hf]"') from cause
    needs_folder = pretrained or options.get("config") is None
    folder = _folder(name, options.get("revision"), pretrained) if needs_folder else None
    with _quiet():
        config = _config(name, options, folder)
        net, missing = _load(name, config, folder if pretrained else None)
    own = _preprocessing_in(folder, getattr(config, "image_size", None)) if folder else Preprocessing()
    model = HuggingFaceModel(net)
    if missing:
        _check_missing(model, missing, {**own.to_dict(), **preprocessing}["size"], name)
    plain = json.loads(config.to_json_string(use_diff=False))
    return model, own, {"name_or_module": f"hf:{name}", "config": _architecture(plain)}


def read_processor(processor: Mapping[str, Any], size: tuple[int, int]) -> Preprocessing:
    """The preprocessing of an image processor of transformers.

    Args:
        processor: a ``preprocessor_config.json``.
        size: (height, width) in pixels, where it has none.

    Raises:
        InputError: values that no preprocessing can have.

    Example:
        >>> processor = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}, "resample": 2}
        >>> read_processor({**processor, "image_mean": [0.5] * 3, "do_center_crop": True}, (518, 518)).to_dict()
        {'mean': [0.5, 0.5, 0.5], 'std': [0.229, 0.224, 0.225], 'size': [224, 224], 'interpolation': 'bilinear'}
    """
    if processor.get("do_flip_channel_order"):
        raise InputError(
            "the image processor wants BGR images (do_flip_channel_order); expected one for RGB; choose another model, "
            "timm has most of these families for RGB"
        )
    normalised = processor.get("do_normalize", True)
    cropped = processor.get("crop_size") if processor.get("do_center_crop", True) else None
    values = {
        "mean": (processor.get("image_mean") or Preprocessing.mean) if normalised else (0.0,) * 3,
        "std": (processor.get("image_std") or Preprocessing.std) if normalised else (1.0,) * 3,
        "size": _side_lengths(cropped or processor.get("size")) or size,
        "interpolation": INTERPOLATION_OF.get(processor.get("resample", 3), Preprocessing.interpolation),
    }
    own = Preprocessing.from_dict(values)
    # Some scale pixels to another range than 0..1 first; mean and std are here in units of 0..1.
    factor = round(255 * processor.get("rescale_factor", 1 / 255), 6)
    offset = float(bool(processor.get("rescale_offset")))
    mean, std = [(m + offset) / factor for m in own.mean], [s / factor for s in own.std]
    return Preprocessing.from_dict({**values, "mean": mean, "std": std})


def _preprocessing_in(folder: Path, image_size: Any) -> Preprocessing:
    """What the image processor of a checkpoint does; ImageNet's preprocessing where there is none."""
    size = _side_lengths(image_size) or Preprocessing.size
    for file in (folder / name for name in PROCESSOR_FILES if (folder / name).is_file()):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            processor = values.get("image_processor") or (values if file.name == PROCESSOR_FILES[0] else {})
        except (OSError, ValueError, AttributeError) as cause:
            raise InputError(
                f"cannot read {file} ({first_line(cause)}); expected the JSON of an image processor; "
                "take it from a copy of the checkpoint"
            ) from cause
        if processor:
            return read_processor(processor, size)
    return read_processor({}, size)


def _side_lengths(size: Any) -> tuple[int, int] | None:
    """(height, width) of a size in any of the forms of configs: 224, [224, 224], {"shortest_edge": 224}, ..."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge") or size.get("longest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return (size, size) if isinstance(size, int) else None


def _folder(name: str, revision: str | None, weights: bool) -> Path:
    """The folder of a checkpoint: the given one, or the hub's in the cache, filled with what is needed."""
    given = Path(name).expanduser()
    if name and given.is_dir():
        return given
    if not name or name.startswith((".", "/", "~")):
        raise InputError(f"no such folder: {name!r}; expected one that save_pretrained wrote; correct hf:{name}")
    from huggingface_hub import snapshot_download

    # snapshot_download tries once, so that it is quick to say that there is no network; from_pretrained tries for long.
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", *PROCESSOR_FILES]))
        for patterns in WEIGHTS if weights else ():
            if not any(any(folder.glob(pattern)) for kinds in WEIGHTS for pattern in kinds[:2]):
                snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as cause:
        raise InputError(
            f"cannot get {name} from the Hugging Face hub ({type(cause).__name__}: {first_line(cause)}); expected its "
            "name there and a network connection, or the model in the cache; correct the name, run `hf auth login` "
            "(private or gated models), or give hf:<a folder that holds it>"
        ) from cause
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what transformers reports of left-out and made-up weights; what matters of that is checked here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not any(name in key for name in NOT_ARCHITECTURE)}


def _config(name: str, options: Mapping[str, Any], folder: Path | None) -> Any:
    """The vision part of the given config, or of the folder's, with the fields set that the options name."""
    from transformers import AutoConfig

    fields = {key: value for key, value in options.items() if key not in ("revision", "config")}
    try:
        if options.get("config") is not None:
            config: Any = AutoConfig.for_model(**_architecture(options["config"]))
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as cause:
        raise InputError(
            f"transformers cannot read the config of hf:{name} ({first_line(cause)}); expected a config.json of one of "
            "its own models (no code from the hub is run); check the checkpoint, or update transformers"
        ) from cause
    config = getattr(config, "vision_config", config)
    kind = config.model_type
    if kind in REFUSED:
        raise InputError(f"hf:{name} is a {kind}; expected a vision model with cells in order; {REFUSED[kind]}")
    if unknown := [key for key in fields if not hasattr(config, key)]:
        near = get_close_matches(unknown[0], list(config.to_dict()), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "correct them"
        raise InputError(
            f"hf:{name} takes no {listing(unknown)}; expected fields of its {type(config).__name__}; {hint}"
        )
    for key, value in fields.items():
        setattr(config, key, value)
    if "out_features" in fields or "out_indices" in fields:
        config.architectures = ["AutoBackbone"]
    return config


def _load(name: str, config: Any, folder: Path | None) -> tuple[nn.Module, list[str]]:
    """The model of a config, with the folder's weights or random ones, and the parameters that the folder lacks."""
    from transformers import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING

    maps = any(str(kind).endswith("Backbone") for kind in config.architectures or ())
    classes = MODEL_FOR_BACKBONE_MAPPING if maps or type(config) not in MODEL_MAPPING else MODEL_MAPPING
    only_here = {"local_files_only": True, "weights_only": True, "output_loading_info": True}
    try:
        kind: Any = classes[type(config)]
        if folder is None:
            net, found = kind(config), {"missing_keys": ()}
        else:
            net, found = kind.from_pretrained(str(folder), config=config, dtype=torch.float32, **only_here)
    except Exception as cause:
        raise InputError(
            f"transformers cannot build hf:{name} ({type(cause).__name__}: {first_line(cause)}); expected a vision "
            "model, with weights in safetensors or as a state dict of tensors; check the checkpoint"
        ) from cause
    if len(getattr(net, "out_features", ("last",))) != 1:
        raise InputError(
            f"hf:{name} gives the maps {listing(net.out_features)}; expected one; choose it with out_features=[name]"
        )
    return net, sorted(found["missing_keys"])


def _check_missing(model: HuggingFaceModel, missing: list[str], size: Any, name: str) -> None:
    """Refuse a checkpoint without weights that matter; make the others (of an unused pooler) the same every time."""
    # A backbone class adds a norm to each stage: it starts at 1 and 0, always the same.
    missing = [key for key in missing if "hidden_states_norms" not in key]
    needed = reached(dry_run(model, (int(size[0]), int(size[1])), f"hf:{name}", with_graph=True))
    own = dict(model.net.named_parameters())
    if lacking := [key for key in missing if key not in own or id(own[key]) in needed]:
        raise InputError(
            f"the checkpoint of hf:{name} lacks {listing(lacking, limit=5)}; expected all weights that the features "
            "depend on; choose a whole checkpoint of this architecture"
        )
    with torch.no_grad():
        for key in missing:
            own[key].zero_()
