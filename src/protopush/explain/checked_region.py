"""The region that a prototype truly depends on, found by hiding parts of the picture and measuring again.

A cell's box shows where a similarity stands on the grid; what the cell has seen may lie elsewhere (its receptive field
is often the whole picture). Here the claim is tested: blur these pixels, and the similarity is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from protopush.data.regions import Regions
from protopush.data.transforms import Box, EvalTransform, View, to_tensor
from protopush.errors import InputError
from protopush.explain.explanation import Match
from protopush.explain.figure_style import overlap
from protopush.nn.head import HeadOutput
from protopush.preserve_state import preserve_state

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel


@dataclass(frozen=True)
class Region:
    """The blocks of a picture without which a prototype is no longer found in it.

    Attributes:
        class_index, prototype: whose region.
        boxes: the blocks, in pixels of the upright original picture; none of them can be spared.
        share: of the seen picture that they cover.
        in_box: the share of them that lies in the box of the prototype's best cell (1: the box says all).
        similarity: of the prototype and the whole picture.
        hidden: the same where the region is blurred.
        blurred: the same where everything is blurred.
        reached: whether hiding the region takes away what was asked for; False (and no boxes) where the prototype is
            as similar to the blurred picture as to the sharp one, so that no region explains it.
    """

    class_index: int
    prototype: int
    boxes: list[Box]
    share: float
    in_box: float | None
    similarity: float
    hidden: float
    blurred: float
    reached: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"boxes": [list(box) for box in self.boxes]}


def checked_regions(
    model: ProtoModel,
    image: Image.Image,
    transform: EvalTransform,
    matches: Sequence[Match],
    device: str | torch.device = "cpu",
    blocks: int = 7,
    drop: float = 0.5,
    batch_size: int = 32,
) -> list[Region]:
    """For each match, a smallest set of blocks whose blurring takes its similarity down.

    Blocks are hidden in the order in which hiding each alone hurts (occlusion, Zeiler and Fergus, 2014), until the
    similarity has fallen by ``drop`` of what blurring everything takes away; then each block that turns out not to be
    needed is shown again. The set is minimal (none of its blocks can be spared), if not always the smallest of all. The
    similarity is the model's: the largest over all cells, wherever the peak then is.

    Args:
        model: a :class:`ProtoModel`, on ``device``.
        image: the upright original.
        transform: as in evaluation.
        matches: of the explanation of this picture.
        device: where the model is.
        blocks: of a side; the picture is hidden in blocks x blocks squares, blocks squared forward passes for all
            matches together and some more for each. As many as the grid has cells can be read beside the box of a
            cell; more of them find a smaller region, which is often in many pieces, and take longer.
        drop: the share in (0, 1] of the loss by blurring everything that the region must take away.
        batch_size: pictures a forward pass.

    Raises:
        InputError: ``blocks`` or ``drop`` is out of range.
    """
    if blocks < 1 or not 0 < drop <= 1:
        raise InputError(f"blocks={blocks}, drop={drop}; expected at least 1 block, and a drop in (0, 1]")
    with preserve_state(model):
        hiding = _Hiding(model, image, transform, device, blocks, batch_size)
        every = list(range(blocks * blocks))
        whole, blurred, *alone = hiding.similarities([[], every, *([block] for block in every)])
        return [hiding.region(match, whole, blurred, torch.stack(alone), drop) for match in matches]


class _Hiding:
    """A picture of which any blocks can be blurred, and what the model then finds in it."""

    def __init__(
        self,
        model: ProtoModel,
        image: Image.Image,
        transform: EvalTransform,
        device: str | torch.device,
        blocks: int,
        batch_size: int,
    ) -> None:
        seen = transform.visible(image)
        soft = seen.filter(ImageFilter.GaussianBlur(max(seen.size) / 10))
        self.model, self.batch_size, self.blocks = model, batch_size, blocks
        self.sharp, self.soft = (to_tensor(picture, transform.preprocessing).to(device) for picture in (seen, soft))
        self.view: View = transform.view(image.size)
        down, across = (torch.arange(side) * blocks // side for side in self.sharp.shape[1:])
        self.block_of = (down.unsqueeze(1) * blocks + across).to(device)  # (H, W)

    def similarities(self, hidden: Sequence[Sequence[int]]) -> list[Tensor]:
        """(C, K) for each set of blocks that are blurred."""
        found: list[Tensor] = []
        head = self.model.head
        for start in range(0, len(hidden), self.batch_size):
            some = hidden[start : start + self.batch_size]
            blur = torch.zeros(len(some), self.blocks**2, dtype=torch.bool)
            for row, blocks in enumerate(some):
                blur[row, blocks] = True
            where = blur.to(self.block_of.device)[:, self.block_of].unsqueeze(1)
            output: HeadOutput = head(self.model.backbone(torch.where(where, self.soft, self.sharp)))
            found += output.similarities.double().cpu().unbind()
        return found

    def region(self, match: Match, whole: Tensor, blurred: Tensor, alone: Tensor, drop: float) -> Region:
        """The region of a match: similarities (C, K) of the sharp and of the blurred picture, and (blocks, C, K)."""
        place = (match.class_index, match.prototype)
        before, after = float(whole[place]), float(blurred[place])
        found, hidden = list[int](), before
        if after < before:
            order = alone[:, place[0], place[1]].argsort(stable=True).tolist()
            found, hidden = self._needed(order, place, before - drop * (before - after))
        cells = Regions.grid((self.blocks, self.blocks), (self.sharp.shape[1], self.sharp.shape[2])).boxes
        boxes = [self.view.original_box(cells[block]) for block in sorted(found)]
        seen, area = self.view.seen, sum(overlap(box, box) for box in boxes)
        return Region(
            *place,
            boxes=boxes,
            share=area / overlap(seen, seen),
            in_box=sum(overlap(box, match.box) for box in boxes) / area if boxes else None,
            similarity=before,
            hidden=hidden,
            blurred=after,
            reached=bool(found),
        )

    def _needed(self, order: list[int], place: tuple[int, int], target: float) -> tuple[list[int], float]:
        """The shortest beginning of ``order`` that is enough (all of it always is), less what can be spared of it."""
        blocks, hidden = order, target
        for start in range(1, len(order) + 1, self.batch_size):
            some = [order[:end] for end in range(start, min(start + self.batch_size, len(order) + 1))]
            values = [float(found[place]) for found in self.similarities(some)]
            enough = [end for end, value in enumerate(values) if value <= target]
            if enough:
                blocks, hidden = some[enough[0]], values[enough[0]]
                break
        before = 0
        while len(blocks) != before:  # what could not be spared before may be sparable after a change
            before = len(blocks)
            for block in reversed(blocks):  # the one that hurts least first
                fewer = [other for other in blocks if other != block]
                (found,) = self.similarities([fewer])
                if fewer and float(found[place]) <= target:
                    blocks, hidden = fewer, float(found[place])
        return blocks, hidden
