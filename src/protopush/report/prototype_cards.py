"""The prototypes of each class: the part, the image that it comes from, and what else it is like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

from protopush.explain.figure_style import scaled
from protopush.explain.neighbours import Neighbour, Neighbours
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor
from protopush.push.certificate import PROBLEMS
from protopush.report.cases import Training
from protopush.report.context import Fact, Near, Picture, PrototypeCard, PrototypeClass
from protopush.report.inline_pictures import SHARP, Shelf, embed, framed, part

PART, SOURCE, NEAR = 132, 176, 72
OWN, OTHERS = 3, 2  # neighbours shown of the prototype's class and of others
MOST = 600  # prototypes shown in all
FULL = 200  # prototypes up to which pictures are sharp and neighbours shown


@dataclass
class Gallery:
    """Makes the cards.

    Args:
        run: whose prototypes.
        root: the folder of the training images now.
        neighbours: by class and slot; None where they were not looked for.
        faults: (class, slot) to what is wrong with its anchor.
        numbers: of the prototypes, as :func:`protopush.metrics.prototype_quality.prototype_metrics` tells them.
    """

    run: Run
    root: Path
    neighbours: Sequence[Sequence[Neighbours | None]] | None
    faults: dict[tuple[int, int], str]
    numbers: Mapping[str, Any]

    @cached_property
    def count(self) -> int:
        """Prototypes in use."""
        return int(self.run.head.proto_manager.valid_mask.sum())

    @cached_property
    def sharp(self) -> float:
        """Pixels to a CSS pixel: fewer where there are more prototypes, so that the page stays about as large."""
        return SHARP * min(1.0, sqrt(FULL / self.count))

    @cached_property
    def shelf(self) -> Shelf:
        """The training images."""
        return Shelf(self.root, self.sharp)

    def classes(self) -> list[PrototypeClass]:
        """All classes, in label order."""
        manager = self.run.head.proto_manager
        limit = max(1, MOST // manager.num_classes)
        found = []
        for c, name in enumerate(self.run.class_names):
            slots = manager.mask()[c].nonzero().flatten().tolist()
            cards = [self._card(c, k) for k in slots[:limit]]
            found.append(PrototypeClass(f"class-{c}", name, self._of_class(c), cards, len(slots) - len(cards)))
        return found

    def _of_class(self, c: int) -> list[Fact]:
        """What was measured of all prototypes of a class."""
        diversity = (self.numbers.get("diversity") or {}).get("per_class")
        coverage = (self.numbers.get("coverage") or {}).get("per_class")
        facts = []
        if diversity and diversity[c] is not None:
            facts.append(Fact("diversity", f"{diversity[c]:.2f}"))
        if coverage and coverage[c] is not None:
            facts.append(Fact("coverage", f"{coverage[c]['share']:.2f}"))
        return facts

    def training(self, c: int, k: int) -> Training:
        """What an explanation shows of a prototype."""
        anchor = self._anchor(c, k)
        here, source = self._pictures(c, k, anchor, PART, SOURCE)
        name = f"{self.run.class_names[c]}:{k}"
        return Training(here, source, ident(c, k), name, _file(anchor))

    def _anchor(self, c: int, k: int) -> Anchor | None:
        manager = self.run.head.proto_manager
        return manager.anchors[c * manager.max_prototypes + k]

    def _card(self, c: int, k: int) -> PrototypeCard:
        anchor = self._anchor(c, k)
        here, source = self._pictures(c, k, anchor, PART, SOURCE)
        near = self._near(c, k)
        return PrototypeCard(
            ident=ident(c, k),
            number=k,
            part=here,
            source=source,
            file=_file(anchor),
            facts=[] if anchor is None else _facts(anchor),
            missing="" if source is not None else _why_missing(anchor),
            own=[self._neighbour(one) for one in near.own[:OWN]] if near else [],
            others=[self._neighbour(one) for one in near.others[:OTHERS]] if near else [],
            problem=self.faults.get((c, k), ""),
        )

    def _near(self, c: int, k: int) -> Neighbours | None:
        told = self.neighbours is not None and self.count <= MOST
        return self.neighbours[c][k] if told and self.neighbours is not None else None

    def _pictures(
        self, c: int, k: int, anchor: Anchor | None, side: int, whole: int
    ) -> tuple[Picture | None, Picture | None]:
        picture = self.run.picture(c, k) if anchor is not None else None
        if anchor is None or picture is None:
            return None, None
        name = _file(anchor)
        source = embed(picture, whole, whole, f"training image {name}", self.sharp)
        if anchor.box is None or anchor.image_size is None:
            return None, source
        box = scaled(anchor.box, anchor.image_size, picture.size)
        here = part(picture, box, side, f"cell {anchor.cell} of {name}", sharp=self.sharp)
        return here, framed(source, [box], picture.size)

    def _neighbour(self, found: Neighbour) -> Near:
        name = self.run.class_names[found.class_index]
        alt = f"cell {found.cell} of {found.name}, class {name}"
        return Near(self.shelf.part(found.name, found.box, NEAR, alt), found.name, name, found.similarity)


def ident(c: int, k: int) -> str:
    """A prototype's anchor in the page: of numbers alone, so that no name can break it."""
    return f"prototype-{c}-{k}"


def _file(anchor: Anchor | None) -> str:
    return "" if anchor is None else anchor.file or f"sample {anchor.sample_id}"


def _why_missing(anchor: Anchor | None) -> str:
    if anchor is None:
        return "Never pushed: it stands for no training image yet, so there is nothing to show."
    return "The run keeps no picture of its training image."


def _facts(anchor: Anchor) -> list[Fact]:
    facts = [Fact("similarity", _similarity(anchor.similarity_after))]
    if anchor.similarity_after - anchor.similarity > 5e-4:
        facts.append(Fact("before the push", _similarity(anchor.similarity)))
    if anchor.runner_up is not None:
        facts.append(Fact("ahead of the next by", f"{anchor.similarity - anchor.runner_up:.3f}"))
    if anchor.group:
        facts.append(Fact("group", anchor.group))
    if not anchor.verified:
        facts.append(Fact("unverified", "the data set could not name the patch"))
    return facts


def _similarity(value: float) -> str:
    return f"{value:.3f}"


def faults_of(checks: Sequence[Any], class_names: Sequence[str]) -> dict[tuple[int, int], str]:
    """(class, slot) to what is wrong, of the anchors that don't hold; one never pushed is told elsewhere."""
    number = {name: c for c, name in enumerate(class_names)}
    return {
        (number[check.class_name], check.prototype): PROBLEMS[check.fault]
        for check in checks
        if not check.holds and check.fault != "no_anchor"
    }
