"""The prototypes of each class: the part, the image that it comes from, and what else it is like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from protopush.data.transforms import Box
from protopush.explain.figure_style import decimal, scaled
from protopush.explain.neighbours import Neighbour, Neighbours
from protopush.metrics.glossary import metric_text
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor
from protopush.push.certificate import PROBLEMS, AnchorCheck
from protopush.report.inline_pictures import SHARP, Picture, embed, framed, part, parts

OWN, OTHERS = 3, 2  # neighbours shown of the prototype's class and of others
MOST = 600  # prototypes shown in all


@dataclass(frozen=True, eq=False)
class Cards:
    """Prototypes as a page shows them, each picture made once.

    Args:
        run: whose prototypes.
        root: the folder of the training images now.
        neighbours: by (class, slot).
        checks: of the anchors.
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
            found.append(
                {
                    "ident": f"class-{c}",
                    "name": name,
                    "facts": [(title, decimal(value)) for title, value in facts if value is not None],
                    "cards": [self.card(c, k) for k in slots[:limit]],
                    "left_out": len(slots[limit:]),
                }
            )
        return found

    def card(self, c: int, k: int) -> dict[str, Any]:
        """One prototype: its pictures, where it comes from, what is wrong with it, and what else it is like."""
        anchor = self.anchor(c, k)
        shown, source = self.pictures(c, k)
        missing = ""
        if anchor is None:
            missing = "Never pushed: it stands for no training image yet, so there is nothing to show."
        elif source is None:
            missing = "The run keeps no picture of its training image."
        near = self.neighbours.get((c, k))
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

    def anchor(self, c: int, k: int) -> Anchor | None:
        """What a prototype stands for."""
        return self.run.head.proto_manager.anchor(c, k)

    def pictures(self, c: int, k: int) -> tuple[Picture | None, Picture | None]:
        """The part that a prototype stands for and its training image; None where there is no picture."""
        if (c, k) not in self._drawn:
            self._drawn[c, k] = self._draw(c, k)
        return self._drawn[c, k]

    def _draw(self, c: int, k: int) -> tuple[Picture | None, Picture | None]:
        anchor = self.anchor(c, k)
        picture = self.run.picture(c, k) if anchor is not None else None
        if anchor is None or picture is None:
            return None, None
        side, whole, _ = self.sides
        name = anchor.file or f"sample {anchor.sample_id}"
        source = embed(picture, whole, whole, f"training image {name}", self.sharp)
        if anchor.box is None or anchor.image_size is None:
            return None, source
        box = scaled(anchor.box, anchor.image_size, picture.size)
        here = part(picture, box, side, f"cell {anchor.cell} of {name}", sharp=self.sharp)
        return here, framed(source, [box], picture.size)

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
        picture = self._parts.get((found.name, found.box))
        name = self.run.class_names[found.class_index]
        alt = f"cell {found.cell} of {found.name}, class {name}"
        return {
            "picture": picture and picture._replace(alt=alt),
            "file": found.name,
            "class_name": name,
            "similarity": found.similarity,
        }

    @cached_property
    def _parts(self) -> dict[tuple[str, Box], Picture]:
        """The parts of all neighbours."""
        shown = (one for near in self.neighbours.values() for one in (*near.own[:OWN], *near.others[:OTHERS]))
        return parts(self.root, ((one.name, one.box) for one in shown), self.sides[2], self.sharp)


def ident(c: int, k: int) -> str:
    """A prototype's anchor in the page: of numbers alone, so that no name can break it."""
    return f"prototype-{c}-{k}"
