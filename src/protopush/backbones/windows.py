"""Windows: crops of the image that the backbone sees alone, so that a patch depends on its box and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.data.regions import Region, Regions
from protopush.errors import InputError

FULL = "full"
# Pixels of all windows in one forward pass, which bounds the memory. On a CPU 64 windows of 64 pixels: what they become
# fits its cache, and a pass over many images takes two thirds of the time. Elsewhere as many as 42 images of 224.
PIXELS_AT_ONCE = {"cpu": 2**18}
PIXELS_ELSEWHERE = 2**21


@dataclass(frozen=True)
class Windows:
    """Which windows an image is cut into.

    Args:
        size: side in pixels of the model's input, or several; ``"full"`` is the whole image as one window.
        stride: from one window to the next, in pixels, one for each size; half the size by default.
        input: the side that each window is enlarged to (bilinear) before the backbone; by default none is.

    Raises:
        InputError: a size, stride or input below 1, or not one stride for each size.

    Example:
        >>> Windows.of({"size": 56, "stride": 28}).regions((224, 224)).boxes[:2]
        ((0.0, 0.0, 56.0, 56.0), (28.0, 0.0, 84.0, 56.0))
        >>> len(Windows.of(64).regions((224, 224))), len(Windows.of([64, "full"]).regions((224, 224)))
        (36, 37)
    """

    size: tuple[int | str, ...]
    stride: tuple[int, ...]
    input: int | None = None

    @classmethod
    def of(cls, given: int | str | Sequence[int | str] | Mapping[str, Any], input: int | None = None) -> Windows:
        """Windows from a size, sizes, or a mapping with ``size`` and ``stride``."""
        values = dict(given) if isinstance(given, Mapping) else {"size": given}
        if not {"size"} <= set(values) <= {"size", "stride"}:
            raise InputError(f"windows are {values}; expected size and stride, such as {{size: 64, stride: 32}}")
        size, stride = (_several(values.get(key)) for key in ("size", "stride"))
        sides = [side for side in size if side != FULL]
        stride = stride or tuple(max(1, side // 2) for side in sides if isinstance(side, int))
        numbers = [*sides, *stride, *_several(input)]
        if not size or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise InputError(
                f"windows are {values}, window_input {input}; expected whole numbers of pixels above 0 ({FULL!r} as a "
                "size: the whole image)"
            )
        if len(stride) != len(sides):
            raise InputError(
                f"windows of {len(sides)} sizes have {len(stride)} strides; expected one for each, none for {FULL!r}"
            )
        return cls(size, stride, input)

    def largest(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the largest picture that the backbone gets of an image of ``size``."""
        heights, widths = zip(*self.sizes(size), strict=True)
        return max(heights), max(widths)

    def sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) of what the backbone gets, for each run of windows of one size in an image of ``size``."""
        found = []
        for (x0, y0, x1, y1), *_ in _runs(self.regions(size).boxes):
            found.append((self.input, self.input) if self.input else (int(y1 - y0), int(x1 - x0)))
        return found

    def regions(self, size: tuple[int, int]) -> Regions:
        """The windows of an image of ``size`` (height, width), size by size and row by row.

        They cover the image to its borders: where strides do not fill it, the last window ends at the border.
        """
        return _regions(self, tuple(size))


class WindowedModel(nn.Module):
    """A backbone that sees each window alone: images (B, 3, H, W) to one feature a window (B, L, C).

    The feature is the mean over the cells of the window's feature map. Whatever the network (convolution,
    attention, squeeze-and-excitation), it is a function of the window's pixels; only a norm that takes its statistics
    from the batch mixes windows, which then count as seeing the whole image.

    Args:
        backbone: a :class:`protopush.backbones.Backbone`.
        windows: which.

    Source: BagNets (Brendel and Bethge, 2019) bound what a feature sees by the network; here the crop does.
    """

    def __init__(self, backbone: nn.Module, windows: Windows) -> None:
        super().__init__()
        self.backbone = backbone
        self.windows = windows
        self.local = not _mixes_batch(backbone)

    def regions(self, size: tuple[int, int]) -> Regions:
        """The windows of an image of ``size`` (height, width)."""
        found = self.windows.regions(size)
        return found if self.local else Regions(found.size, found.boxes, Regions.whole(size).boxes * len(found))

    def forward(self, images: Tensor) -> Tensor:
        """Images to (B, L, C), in the order of :meth:`regions`."""
        return torch.cat(self.over_windows(images, self._pooled), dim=1)

    def forward_black(self, image: Tensor) -> Tensor:
        """:meth:`forward` of a black image (1, 3, H, W): its windows of one size are alike, and one of them is run."""
        runs = _runs(self.windows.regions((image.shape[2], image.shape[3])).boxes)
        return torch.cat([self._run(image, some[:1], self._pooled).expand(-1, len(some), -1) for some in runs], dim=1)

    def over_windows(self, images: Tensor, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """``function`` of the windows, for those of each size (B, windows of that size, ...).

        ``function`` takes crops (N, 3, h, w), as many as memory allows, to (N, ...).
        """
        boxes = self.windows.regions((images.shape[2], images.shape[3])).boxes
        return [self._run(images, some, function) for some in _runs(boxes)]

    def crops(self, images: Tensor, boxes: Sequence[Region]) -> Tensor:
        """The pixels of boxes of one size in each image, window by window: (len(boxes) * B, 3, h, w)."""
        cut = [images[:, :, int(y0) : int(y1), int(x0) : int(x1)] for x0, y0, x1, y1 in boxes]
        return torch.cat(cut)

    def embed(self, crops: Tensor) -> Tensor:
        """The feature of each crop (N, 3, h, w) alone: (N, C)."""
        return self._pooled(self.resized(crops))

    def resized(self, crops: Tensor) -> Tensor:
        """Crops (N, 3, h, w) as the backbone gets them."""
        side = self.windows.input
        if side and tuple(crops.shape[2:]) != (side, side):
            crops = F.interpolate(crops, size=(side, side), mode="bilinear", align_corners=False)
        return crops

    def _pooled(self, crops: Tensor) -> Tensor:
        pooled: Tensor = self.backbone(crops).pooled
        return pooled.squeeze(1)

    def _run(self, images: Tensor, boxes: Sequence[Region], function: Callable[[Tensor], Tensor]) -> Tensor:
        """The function of windows of one size, (B, len(boxes), ...), in as many passes as memory asks for."""
        x0, y0, x1, y1 = boxes[0]
        pixels = int((x1 - x0) * (y1 - y0)) if not self.windows.input else self.windows.input**2
        step = len(boxes)
        if not torch.compiler.is_exporting():  # an exported graph has no batch size to divide by
            limit = PIXELS_AT_ONCE.get(images.device.type, PIXELS_ELSEWHERE)
            step = max(1, limit // (pixels * max(1, len(images))))
        crops = (self.crops(images, boxes[at : at + step]) for at in range(0, len(boxes), step))
        found = torch.cat([function(self.resized(some)) for some in crops])  # window by window, in each all images
        return found.view(len(boxes), -1, *found.shape[1:]).transpose(0, 1)


def _mixes_batch(model: nn.Module) -> bool:
    """Whether a norm takes its statistics from the batch even in evaluation, so that images see each other."""
    norms = (nn.modules.batchnorm._BatchNorm,)
    return any(isinstance(module, norms) and module.running_mean is None for module in model.modules())


def _several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _runs(boxes: Sequence[Region]) -> list[list[Region]]:
    """The boxes in their order, divided where the size changes."""
    runs: list[list[Region]] = []
    for box in boxes:
        if runs and _side(runs[-1][0]) == _side(box):
            runs[-1].append(box)
        else:
            runs.append([box])
    return runs


def _side(box: Region) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin on an axis of ``length`` pixels: the last one ends at its end."""
    last = max(0, length - side)
    return [*range(0, last, stride), last]


@lru_cache(maxsize=256)
def _regions(windows: Windows, size: tuple[int, int]) -> Regions:
    boxes: list[Region] = []
    height, width = size
    strides = iter(windows.stride)
    for side in windows.size:
        if isinstance(side, str):
            boxes.append((0.0, 0.0, float(width), float(height)))
            continue
        stride = next(strides)
        boxes += [
            (float(x), float(y), float(min(x + side, width)), float(min(y + side, height)))
            for y in _starts(height, side, stride)
            for x in _starts(width, side, stride)
        ]
    found = tuple(dict.fromkeys(boxes))  # in a small image, windows of several sizes are the image
    return Regions(size, found, found)
