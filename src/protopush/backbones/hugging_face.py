"""Vision models of transformers (Wolf et al., 2020), from the Hugging Face hub or a folder.

Everything is read from a folder: the one that was given, or the hub's, which huggingface_hub keeps in its cache. So
there is one place that needs a network, and it says so at once when there is none.
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
from protopush.backbones.dry_run import probe, reached
from protopush.backbones.hf_preprocessing import PROCESSOR_FILES, preprocessing_in, side_lengths
from protopush.data.transforms import Preprocessing
from protopush.errors import InputError, first_line, listing

CONFIGS = ["config.json", *PROCESSOR_FILES]
# In the order of preference. The .bin files hold pickles, which transformers reads with weights_only=True.
WEIGHTS = (
    ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"],
)
# Parameters that become tokens in front of the cells.
PREFIX_PARAMETERS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
# Tokens in front that no parameter tells of: DINOv3's ConvNeXt puts the pooled feature there.
MORE_PREFIX_TOKENS = {"dinov3_convnext": 1}
NEW_NORMS = "hidden_states_norms"  # a backbone class adds one to each stage: it starts at 1 and 0, always the same
# Left out of a recipe: the labels of a dropped classifier, where the checkpoint lay, and the kernel of its attention,
# which may be the name of code in the hub.
NOT_ARCHITECTURE = (
    "id2label", "label2id", "_name_or_path", "transformers_version", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal",
)  # fmt: skip
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
        self.num_prefix_tokens = sum(p.numel() // p.shape[-1] for p in prefixes)
        self.num_prefix_tokens += MORE_PREFIX_TOKENS.get(config.model_type, 0)
        self.patch_size = side_lengths(getattr(config, "patch_size", None))
        self.image_size = side_lengths(getattr(config, "image_size", None))
        self.interpolates = "interpolate_pos_encoding" in signature(net.forward).parameters

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to a map (B, C, h, w) or to tokens (B, N, C).

        Images of another size than the checkpoint's get interpolated position embeddings, where the model can.
        """
        # Not always: for images of the very size, some models interpolate wrongly where that is not square.
        resized = self.interpolates and tuple(images.shape[-2:]) != self.image_size
        output = self.net(pixel_values=images, **({"interpolate_pos_encoding": True} if resized else {}))
        maps: tuple[Tensor, ...] | None = getattr(output, "feature_maps", None)
        last: Tensor = output.last_hidden_state if maps is None else maps[-1]
        return last

    forward = forward_features


def hugging_face_model(
    name: str, pretrained: bool, options: Mapping[str, Any], look: Mapping[str, Any]
) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    """A vision model of transformers, what its images should look like, and its recipe.

    Of a model for images and text (CLIP, SigLIP) the vision tower is taken. A checkpoint of a backbone class, and any
    with ``out_features`` or ``out_indices`` among the options, is opened as ``AutoBackbone``, whose last stage is the
    default; all others as ``AutoModel``. Parameters are float32, whatever the checkpoint holds.

    Args:
        name: a model of the hub, or a folder as ``save_pretrained`` writes it.
        pretrained: load the checkpoint's weights.
        options: ``revision`` of the hub's model; ``config``, a dict, in the place of the checkpoint's; all others are
            fields of that config.
        look: overrides of the preprocessing; they do not change the model.

    Raises:
        InputError: transformers is not installed, no such model or no network, unknown options, weights that are
            missing or do not fit.
    """
    _require_transformers(name)
    fields = {key: value for key, value in options.items() if key not in ("revision", "config")}
    told = options.get("config")
    folder = _folder(name, options.get("revision"), pretrained) if told is None or pretrained else None
    with _quiet():
        config = _config(name, told, folder)
        _set(config, fields, name)
        net, missing = _load(name, config, folder if pretrained else None)
    preprocessing = preprocessing_in(folder, getattr(config, "image_size", None)) if folder else Preprocessing()
    model = HuggingFaceModel(net)
    if missing:
        _settle_missing(model, missing, {**preprocessing.to_dict(), **look}["size"], name)
    kept = json.loads(config.to_json_string(use_diff=False))
    kept = {key: value for key, value in kept.items() if key not in NOT_ARCHITECTURE}
    return model, preprocessing, {"name_or_module": f"hf:{name}", "config": kept}


def _require_transformers(name: str) -> None:
    ensure_torchvision()  # transformers imports torchvision where it finds it
    try:
        import transformers  # noqa: F401
    except ImportError as cause:
        raise InputError(
            f"hf:{name} needs transformers ({first_line(cause)}); expected the extra hf; "
            'run: pip install "protopush[hf]"'
        ) from cause


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
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=CONFIGS))
        for patterns in WEIGHTS if weights else ():
            if not _has_weights(folder):
                snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as cause:
        raise InputError(
            f"cannot get {name} from the Hugging Face hub ({type(cause).__name__}: {first_line(cause)}); expected its "
            "name there and a network connection, or the model in the cache; correct the name (private or gated: run "
            "`hf auth login`), or give hf:<a folder that holds it>"
        ) from cause
    return folder


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for patterns in WEIGHTS for pattern in patterns[:2])


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers tells of left-out and made-up weights at length; what matters of that is checked here."""
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


def _config(name: str, told: Mapping[str, Any] | None, folder: Path | None) -> Any:
    from transformers import AutoConfig

    try:
        if told is not None:
            kept = {key: value for key, value in told.items() if key not in NOT_ARCHITECTURE}
            config: Any = AutoConfig.for_model(**kept)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as cause:
        raise InputError(
            f"transformers cannot read the config of hf:{name} ({first_line(cause)}); expected a config.json of one of "
            "its own models (no code from the hub is run); check the checkpoint, or update transformers"
        ) from cause
    config = getattr(config, "vision_config", config)
    if config.model_type in REFUSED:
        raise InputError(
            f"hf:{name} is a {config.model_type}; expected a vision model of transformers with cells in order; "
            f"{REFUSED[config.model_type]}"
        )
    return config


def _set(config: Any, fields: Mapping[str, Any], name: str) -> None:
    """Set fields of a config that it has."""
    unknown = [key for key in fields if not hasattr(config, key)]
    if unknown:
        near = get_close_matches(unknown[0], list(config.to_dict()), n=3)
        raise InputError(
            f"hf:{name} takes no {listing(unknown)}; expected fields of its {type(config).__name__}; "
            + (f"did you mean {', '.join(near)}?" if near else "correct them")
        )
    for key, value in fields.items():
        setattr(config, key, value)
    if "out_features" in fields or "out_indices" in fields:
        config.architectures = ["AutoBackbone"]


def _load(name: str, config: Any, folder: Path | None) -> tuple[nn.Module, list[str]]:
    """The model of a config, with the folder's weights or random ones, and the parameters that the folder lacks."""
    from transformers import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING

    maps = any(str(kind).endswith("Backbone") for kind in config.architectures or ())
    classes = MODEL_FOR_BACKBONE_MAPPING if maps or type(config) not in MODEL_MAPPING else MODEL_MAPPING
    try:
        kind: Any = classes[type(config)]
        net, found = kind(config), {"missing_keys": ()}
        if folder is not None:
            net, found = kind.from_pretrained(
                str(folder),
                config=config,
                dtype=torch.float32,
                local_files_only=True,
                weights_only=True,
                output_loading_info=True,
            )
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


def _settle_missing(model: HuggingFaceModel, missing: list[str], size: Any, name: str) -> None:
    """Refuse a checkpoint without weights that matter; make the others (of an unused pooler) the same every time."""
    missing = [key for key in missing if NEW_NORMS not in key]
    needed = reached(probe(model, (int(size[0]), int(size[1])), f"hf:{name}", with_graph=True))
    parameters = dict(model.net.named_parameters())
    lacking = [key for key in missing if key not in parameters or id(parameters[key]) in needed]
    if lacking:
        raise InputError(
            f"the checkpoint of hf:{name} lacks {listing(lacking, limit=5)}; expected all weights that the features "
            "depend on; choose a whole checkpoint of this architecture"
        )
    with torch.no_grad():
        for key in missing:
            parameters[key].zero_()
