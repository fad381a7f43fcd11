"""The prototypes of each class as a page shows them: the part, the image that it comes from, and what else it is like.

Boxes lie over pictures as HTML, so that the pixels below stay as they were.
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from protopush.data.images import read_image
from protopush.data.transforms import Box, View
from protopush.errors import InputError
from protopush.explain.figure_canvas import Crop, anchor_part, with_map
from protopush.explain.figure_style import Map, Rect, decimal, drawn_sees, scaled, surroundings
from protopush.explain.neighbours import Neighbour, Neighbours
from protopush.metrics.glossary import metric_text
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor
from protopush.push.certificate import PROBLEMS, AnchorCheck, file_within

OWN, OTHERS = 3, 2  # neighbours shown of the prototype's class and of others
MOST = 600  # prototypes shown in all
QUALITY = 80
SHARP = 1.5  # pixels of the file to one of the page, for finer screens


class Frame(NamedTuple):
    """A box over a picture, in percent of the picture; ``colour`` numbers the page's palette from 0.

    A thin one is around all that was seen for a box.
    """

    x: float
    y: float
    width: float
    height: float
    label: str = ""
    colour: int = 0
    thin: bool = False


class Picture(NamedTuple):
    """An inline picture (``data:image/jpeg;base64,...``), its size in CSS pixels where there is room, and its words."""

    uri: str
    width: int
    height: int
    alt: str
    frames: tuple[Frame, ...] = ()


def embed(picture: Image.Image, width: int, height: int, alt: str, sharp: float = SHARP) -> Picture:
    """A picture as large as it can be in ``width`` x ``height`` CSS pixels; its file is never larger than its source.

    Example:
        >>> shown = embed(Image.new("RGB", (400, 200)), 100, 100, "grey")
        >>> shown.width, shown.height, shown.uri[:23]
        (100, 50, 'data:image/jpeg;base64,')
    """
    scale = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    if scale * sharp < 1:
        stored = (max(1, round(size[0] * sharp)), max(1, round(size[1] * sharp)))
        picture = picture.resize(stored, Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.convert("RGB").save(data, format="JPEG", quality=QUALITY, optimize=True)
    return Picture("data:image/jpeg;base64," + b64encode(data.getvalue()).decode("ascii"), *size, alt)


def part(
    picture: Image.Image, box: Rect, side: int, alt: str, colour: int = 0, sharp: float = SHARP,
    sees: Rect | None = None,
) -> Picture:  # fmt: skip
    """The box, framed, with its surroundings (:func:`protopush.explain.figure_style.surroundings`)."""
    x0, y0, x1, y1 = map(round, surroundings(box, picture.size, sees))
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    shown = embed(picture.crop((x0, y0, x1, y1)), side, side, alt, sharp)
    here, seen = ((one[0] - x0, one[1] - y0, one[2] - x0, one[3] - y0) for one in (box, sees or box))
    return framed(shown, [here], (x1 - x0, y1 - y0), colours=[colour], sees=[seen])


def framed(
    shown: Picture, boxes: Sequence[Rect], size: tuple[float, float], labels: Sequence[str] = (),
    colours: Sequence[int] = (0,), sees: Sequence[Rect | None] = (),
) -> Picture:  # fmt: skip
    """The picture with boxes over it, which are in pixels of the picture at (width, height) ``size``.

    Where more is seen than a box (``sees``), and not the whole picture (None), that has a thin frame.
    """
    frames, drawn = [], [(i, one, True) for i, one in enumerate(sees) if one is not None and one != boxes[i]]
    for i, box, thin in [*drawn, *((i, box, False) for i, box in enumerate(boxes))]:
        x0, y0, x1, y1 = (round(edge, 2) for edge in scaled(box, size, (100, 100)))
        label, colour = labels[i] if labels and not thin else "", colours[i % len(colours)]
        frames.append(Frame(x0, y0, round(x1 - x0, 2), round(y1 - y0, 2), label, colour, thin))
    return shown._replace(frames=tuple(frames))


def heat(picture: Image.Image, similarities: Map, view: View, side: int, alt: str, even: bool = False) -> Picture:
    """A similarity map (rows, columns) over its picture, the original or a smaller copy; ``view`` is the original's.

    The result fits in a square of ``side`` CSS pixels; ``even`` as in :func:`protopush.explain.figure_style.upsampled`.
    """
    small = picture.copy()
    small.thumbnail((round(side * SHARP), round(side * SHARP)))
    return embed(with_map(small, similarities, view, even), side, side, alt)


@dataclass(frozen=True, eq=False)
class Cards:
    """Prototypes as a page shows them, each picture made once.

    Args:
        root: the folder of the training images now.
        neighbours: by (class, slot).
        numbers: of the prototypes, as :func:`protopush.metrics.prototype_quality.prototype_metrics` gives them.
        sides: CSS pixels of a part, of its image, and of a neighbour's part.
        sharp: pixels to a CSS pixel.
    """

    run: Run
    root: Path
    neighbours: Mapping[tuple[int, int], Neighbours] = field(default_factory=dict)
    checks: Sequence[AnchorCheck] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    sides: tuple[int, int, int] = (132, 176, 72)
    sharp: float = SHARP
    _drawn: dict[tuple[int, int], tuple[Picture | None, Picture | None]] = field(default_factory=dict, init=False)

    @cached_property
    def reach(self) -> str:
        """What the model sees of an image for a patch (:attr:`protopush.data.regions.Regions.reach`)."""
        return self.run.head.compared(self.run.model.backbone.regions).reach

    def classes(self) -> list[dict[str, Any]]:
        """All classes in label order, with their cards; ``left_out`` more of a class are not shown."""
        manager = self.run.head.proto_manager
        limit = max(1, MOST // manager.num_classes)
        diversity, coverage = ((self.numbers.get(name) or {}).get("per_class") for name in ("diversity", "coverage"))
        found = []
        for c, name in enumerate(self.run.class_names):
            slots = manager.used_of(c)
            share = coverage[c]["share"] if coverage and coverage[c] is not None else None
            facts = [("diversity", diversity[c] if diversity else None), ("coverage", share)]
            known = [(title, decimal(value)) for title, value in facts if value is not None]
            cards, left_out = [self.card(c, k) for k in slots[:limit]], len(slots[limit:])
            row = {"ident": f"class-{c}", "name": name, "facts": known, "cards": cards, "left_out": left_out}
            found.append(row)
        return found

    def card(self, c: int, k: int) -> dict[str, Any]:
        """One prototype: its pictures, where it comes from, what is wrong with it, and what else it is like."""
        anchor = self.run.head.proto_manager.anchor(c, k)
        shown, source = self.pictures(c, k)
        near, missing = self.neighbours.get((c, k)), ""
        if anchor is None:
            missing = "Never pushed: it stands for no training image yet, so there is nothing to show."
        elif source is None:
            missing = "The run keeps no picture of its training image."
            if shown is not None:
                missing = "Its training image is not shared: the part is all that the model sees of it."
        return {
            "ident": ident(c, k),
            "name": f"{self.run.class_names[c]} #{k}",
            "class_name": self.run.class_names[c],
            "part": shown,
            "source": source,
            "file": "" if anchor is None else anchor.file or f"sample {anchor.sample_id}",
            "facts": [] if anchor is None else self._facts(c, k, anchor),
            "missing": missing,
            "problem": self._faults.get((self.run.class_names[c], k), ""),
            "own": [self._near(one) for one in near.own[:OWN]] if near else [],
            "others": [self._near(one) for one in near.others[:OTHERS]] if near else [],
        }

    @cached_property
    def _faults(self) -> dict[tuple[str, int], str]:
        """What is wrong with anchors that don't hold; one that was never pushed has words of its own."""
        wrong = [check for check in self.checks if not check.holds and check.fault != "no_anchor"]
        return {(check.class_name, check.prototype): PROBLEMS[check.fault] for check in wrong}

    def pictures(self, c: int, k: int) -> tuple[Picture | None, Picture | None]:
        """The part that a prototype stands for and its training image; None where there is no picture."""
        if (c, k) not in self._drawn:
            self._drawn[c, k] = self._draw(c, k)
        return self._drawn[c, k]

    def _draw(self, c: int, k: int) -> tuple[Picture | None, Picture | None]:
        anchor = self.run.head.proto_manager.anchor(c, k)
        source = self.run.source(c, k) if anchor is not None else None
        if anchor is None or source is None:
            return None, None
        (side, whole, _), name = self.sides, anchor.file or f"sample {anchor.sample_id}"
        found, here, there = anchor_part(source, anchor, self.reach), None, None
        if not isinstance(source, Crop):
            there = embed(source, whole, whole, f"training image {name}", self.sharp)
        if found is not None:
            picture, box, sees = found
            here = part(picture, box, side, f"cell {anchor.cell} of {name}", sharp=self.sharp, sees=sees)
            there = there and framed(there, [box], picture.size, sees=[sees])
        return here, there

    def _facts(self, c: int, k: int, anchor: Anchor) -> list[tuple[str, str]]:
        before, after = decimal(anchor.similarity), decimal(anchor.similarity_after)
        facts = [("similarity", after)]
        if before != after:
            facts.append(("before the push", before))
        if anchor.runner_up is not None:
            facts.append(("ahead of the next by", metric_text(anchor.similarity - anchor.runner_up)))
        facts.append(("weight", decimal(float(self.run.head.weights()[c, k].detach()))))
        if anchor.group:
            facts.append(("group", anchor.group))
        return facts if anchor.verified else [*facts, ("unverified", "the data set could not name the patch")]

    def _near(self, found: Neighbour) -> dict[str, Any]:
        picture, name = self._parts.get((found.name, found.box)), self.run.class_names[found.class_index]
        shown = picture and picture._replace(alt=f"cell {found.cell} of {found.name}, class {name}")
        return {"picture": shown, "file": found.name, "class_name": name, "similarity": found.similarity}

    @cached_property
    def _parts(self) -> dict[tuple[str, Box], Picture]:
        """The parts of all neighbours, each file decoded once; what can't be read, or lies elsewhere, lacks."""
        shown = (one for near in self.neighbours.values() for one in (*near.own[:OWN], *near.others[:OTHERS]))
        found: dict[tuple[str, Box], Picture] = {}
        distinct = sorted({(one.name, one.box): one for one in shown}.items(), key=lambda item: item[0])
        for name, places in groupby(distinct, key=lambda item: item[0][0]):
            file, side = file_within(self.root, name), self.sides[2]
            try:
                picture = read_image(file) if file is not None else None
            except InputError:
                continue
            if picture is not None:
                for place, one in places:
                    sees = drawn_sees(one, self.reach, picture.size, picture.size)
                    found[place] = part(picture, one.box, side, "", sharp=self.sharp, sees=sees)
        return found


def ident(c: int, k: int) -> str:
    """A prototype's anchor in the page: of numbers alone, so that no name can break it."""
    return f"prototype-{c}-{k}"
