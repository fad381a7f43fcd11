"""Preprocessing and transforms, from a picture to the pixels that the model sees, and from a cell back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protopush._compat import ensure_policies
from protopush.errors import InputError, first_line, listing

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
RESAMPLING = {name: Image.Resampling[name.upper()] for name in INTERPOLATIONS[:4]}

Box = tuple[int, int, int, int]
NARROW = 10**8  # pixels of a picture that covers the model's input: of a longer one only what is seen is made


@dataclass(frozen=True)
class Preprocessing:
    """How an RGB image becomes a tensor: resize to ``size``, scale to 0..1, subtract ``mean``, divide by ``std``.

    Args:
        mean: one number a channel, in units of 0..1 pixels. Default: ImageNet's.
        std: one number a channel, above 0, in units of 0..1 pixels. Default: ImageNet's.
        size: (height, width) in pixels.
        interpolation: one of ``INTERPOLATIONS``.

    Raises:
        InputError: a value outside of these.

    Example:
        >>> Preprocessing(size=(256, 320)).to_dict()["size"]
        [256, 320]
        >>> Preprocessing.from_dict({"interpolation": "bilinear"}).interpolation
        'bilinear'
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: tuple[int, int] = (224, 224)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                f"mean {self.mean} and std {self.std} do not fit RGB images; expected three numbers each and std "
                "above 0; give them in units of 0..1 pixels"
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise InputError(
                f"size {self.size} is no image size; expected (height, width) in pixels; give two integers"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"unknown interpolation {self.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}; choose one"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them (lists, not tuples); :meth:`from_dict` reads them back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read what :meth:`to_dict` wrote; fields left out keep their defaults, others are an InputError."""
        known = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise InputError(
                f"unknown preprocessing keys: {listing(unknown)}; expected {', '.join(known)}; remove or correct them"
            )
        kinds: dict[str, Any] = {"mean": float, "std": float, "size": int}
        read: dict[str, Any] = dict(values)
        try:
            read |= {key: tuple(map(kind, read[key])) for key, kind in kinds.items() if key in read}
        except (TypeError, ValueError) as cause:
            raise InputError(
                f"preprocessing {dict(values)} cannot be read ({cause}); expected numbers in lists; correct the values"
            ) from cause
        return cls(**read)


@dataclass(frozen=True)
class View:
    """The place of the pixels that the model sees in the original picture. All sizes are (width, height)."""

    original: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    crop: tuple[int, int]

    @classmethod
    def of(cls, original: tuple[int, int], size: tuple[int, int], crop_pct: float = 1.0) -> View:
        """The view of a picture (width, height) that is resized to cover ``size / crop_pct`` and cropped in the centre.

        ``size`` is (height, width), as in :class:`Preprocessing`; the crop keeps the share ``crop_pct`` of the short
        side.

        Example:
            >>> View.of((300, 100), (224, 224))
            View(original=(300, 100), resized=(672, 224), offset=(224, 0), crop=(224, 224))
        """
        (width, height), (crop_height, crop_width) = original, size
        scale = max(crop_width / width, crop_height / height) / crop_pct
        resized = (max(crop_width, round(width * scale)), max(crop_height, round(height * scale)))
        offset = ((resized[0] - crop_width) // 2, (resized[1] - crop_height) // 2)
        return cls(original, resized, offset, (crop_width, crop_height))

    def original_box(self, region: Sequence[float]) -> Box:
        """The pixels of the original picture under a region of the model's input, both (x0, y0, x1, y1).

        x1 and y1 are exclusive, as in ``PIL.Image.crop``; at least one pixel.

        Example:
            >>> View.of((448, 448), (224, 224)).original_box((32, 32, 64, 64))
            (64, 64, 128, 128)
        """
        x0, y0, x1, y1 = (self._back(edge, axis=i % 2) for i, edge in enumerate(region))
        return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)

    @property
    def seen(self) -> Box:
        """The part of the original picture that the model sees."""
        return self.original_box((0, 0, *self.crop))

    def _back(self, edge: float, axis: int) -> int:
        resized = edge + self.offset[axis]
        return min(max(round(resized * self.original[axis] / self.resized[axis]), 0), self.original[axis])


class EvalTransform:
    """Resize to cover, crop the centre, normalise: the same pixels every time.

    Example:
        >>> transform = EvalTransform(Preprocessing())
        >>> transform(Image.new("RGB", (300, 100))).shape
        torch.Size([3, 224, 224])
    """

    def __init__(self, preprocessing: Preprocessing, crop_pct: float = 1.0) -> None:
        if not 0 < crop_pct <= 1:
            raise InputError(f"crop_pct is {crop_pct}; expected a share of the image in (0, 1]")
        if preprocessing.interpolation not in RESAMPLING:
            raise InputError(f"interpolation {preprocessing.interpolation!r}; expected one of {', '.join(RESAMPLING)}")
        self.preprocessing = preprocessing
        self.crop_pct = crop_pct

    def view(self, original: tuple[int, int]) -> View:
        """The geometry that this transform gives a picture of (width, height)."""
        return View.of(original, self.preprocessing.size, self.crop_pct)

    def visible(self, image: Image.Image) -> Image.Image:
        """The picture that the model sees, before normalisation."""
        view, how = self.view(image.size), RESAMPLING[self.preprocessing.interpolation]
        (x, y), (width, height) = view.offset, view.crop
        box = (x, y, x + width, y + height)
        if view.resized[0] * view.resized[1] > NARROW:  # the same but for rounding
            sizes = zip(box, image.size * 2, view.resized * 2, strict=True)
            return image.resize(view.crop, how, box=tuple(min(edge * n / m, n) for edge, n, m in sizes))  # type: ignore[arg-type]
        return (image.resize(view.resized, how) if view.resized != image.size else image).crop(box)

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture as a normalised float32 tensor (3, H, W)."""
        return to_tensor(self.visible(image), self.preprocessing)


class TrainTransform:
    """Random resized crop, flips and a little colour (or a policy of timm's): for a backbone that trains.

    Args:
        preprocessing: the model's input.
        flip_vertical: also flip upside down (dermoscopy, inspection: yes; street scenes: no).
        auto_augment: a policy in timm's words, such as ``rand-m9-mstd0.5-inc1`` (RandAugment, Cubuk et al., 2020).
        random_erasing: chance that a random rectangle is erased (Zhong et al., 2020).
        min_scale: smallest share of the image's area in a crop.

    Raises:
        InputError: timm doesn't know the policy.
    """

    def __init__(
        self, preprocessing: Preprocessing, flip_vertical: bool = True, auto_augment: str = "",
        random_erasing: float = 0.0, min_scale: float = 0.5,
    ) -> None:  # fmt: skip
        ensure_policies()
        from timm.data.transforms_factory import create_transform

        wide = preprocessing.size[1] / preprocessing.size[0]  # crops have the shape of the input, more or less
        try:
            self.augment: Callable[[Image.Image], Tensor] = create_transform(
                (3, *preprocessing.size),
                is_training=True,
                scale=(min_scale, 1.0),
                ratio=(0.8 * wide, 1.25 * wide),
                vflip=0.5 if flip_vertical else 0.0,
                color_jitter=(0.1, 0.1, 0.1, 0.02),
                auto_augment=auto_augment or None,
                interpolation=preprocessing.interpolation,
                mean=preprocessing.mean,
                std=preprocessing.std,
                re_prob=random_erasing,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise InputError(
                f"timm knows no policy {auto_augment!r} ({first_line(error) or type(error).__name__}); expected words "
                "such as rand-m9-mstd0.5-inc1, augmix-m3-w3 or 3a; see timm's documentation of auto_augment"
            ) from error

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture as a normalised float32 tensor (3, H, W), different each time."""
        return self.augment(image)


def to_tensor(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """An RGB picture of the model's size as a normalised float32 tensor (3, H, W)."""
    return normalised(torch.from_numpy(np.array(image)).permute(2, 0, 1), preprocessing).contiguous()


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels uint8 (..., 3, H, W) as the model's input, float32."""
    mean, std = _scale(preprocessing, pixels)
    return (pixels.float() / 255.0 - mean) / std


def oriented(images: Tensor, view: int) -> Tensor:
    """Images (..., H, W) in one of their eight orientations, from 0, upright.

    The bits of ``view`` say what changes places: 1, left and right; 2, top and bottom; 4, after these, rows and
    columns. So the first two are an image and its mirror image, the first four all flips, all eight also quarter turns.

    Example:
        >>> oriented(torch.tensor([[1, 2], [3, 4]]), 1).tolist(), oriented(torch.tensor([[1, 2], [3, 4]]), 4).tolist()
        ([[2, 1], [4, 3]], [[1, 3], [2, 4]])
    """
    axes = [axis for bit, axis in ((1, -1), (2, -2)) if view & bit]
    flipped = images.flip(axes) if axes else images
    return flipped.transpose(-1, -2) if view & 4 else flipped


def as_pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The inverse of :func:`normalised`, rounded to uint8: exact for what was made of 8-bit pixels.

    Example:
        >>> pixels = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
        >>> torch.equal(as_pixels(normalised(pixels, Preprocessing()), Preprocessing()), pixels)
        True
    """
    mean, std = _scale(preprocessing, images)
    return ((images.float() * std + mean) * 255.0).round().clamp(0, 255).to(torch.uint8)


def _scale(preprocessing: Preprocessing, like: Tensor) -> tuple[Tensor, ...]:
    """Mean and std of the channels, (3, 1, 1), on the device of ``like``."""
    return tuple(
        torch.tensor(some, device=like.device).view(3, 1, 1) for some in (preprocessing.mean, preprocessing.std)
    )
