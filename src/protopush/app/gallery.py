"""The prototypes of a class as pictures, and all that is known of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from protopush.app.lookout import Use
from protopush.app.pages import facts, message, picture
from protopush.data.images import read_image
from protopush.errors import InputError
from protopush.explain.drawing import COLOURS, part_tile
from protopush.explain.neighbours import Neighbour, Neighbours
from protopush.explain.rows import decimal, file_name, part_and_whole
from protopush.prototypes import Anchor
from protopush.push.certificate import file_within
from protopush.review.decisions import Decision, in_force
from protopush.training.run import Run

TILE, NEAR = 300, 132  # sides in pixels of the page


def slots_of(run: Run, c: int) -> list[int]:
    """The prototypes of a class that are in use."""
    return [int(k) for k in run.head.proto_manager.mask()[c].nonzero().flatten().tolist()]


def anchor_of(run: Run, c: int, k: int) -> Anchor | None:
    """What a prototype stands for."""
    return run.head.proto_manager.anchors[c * run.head.proto_manager.max_prototypes + k]


def pair(run: Run, c: int, k: int) -> tuple[Image.Image, Image.Image]:
    """A prototype's part, and its whole training image with the part framed."""
    return part_and_whole(run.picture(c, k), anchor_of(run, c, k), COLOURS[c % len(COLOURS)], TILE, 22)


def thumbnail(run: Run, c: int, k: int) -> Image.Image:
    """Both, beside each other."""
    part, whole = pair(run, c, k)
    both = Image.new("RGB", (2 * TILE + 8, TILE), (255, 255, 255))
    both.paste(part, (0, 0))
    both.paste(whole, (TILE + 8, 0))
    return both


def details(
    run: Run, c: int, k: int, found: tuple[Neighbours | None, Use | None, str], past: Sequence[Decision], root: Path
) -> str:
    """One prototype: its part and image, where it comes from, how much it is used, what else it is like."""
    name, anchor, (part, whole) = run.class_names[c], anchor_of(run, c, k), pair(run, c, k)
    if anchor is None:
        return Markup("<h2>{} #{}</h2>{}").format(name, k, Markup(message("It stands for no training image yet.")))
    near, use, why = found
    return Markup(
        '<h2>{} #{}</h2><div class="pp-pair"><figure>{}<figcaption>This part</figcaption></figure>'
        "<figure>{}<figcaption>of this training image</figcaption></figure></div>{}{}"
    ).format(
        name,
        k,
        picture(part, f"part of {file_name(anchor)}", TILE),
        picture(whole, f"training image {file_name(anchor)}", TILE),
        facts(_facts(run, c, k, anchor, use, past)),
        _near(run, name, near, root) if near is not None else Markup(message(why)),
    )


def _facts(
    run: Run, c: int, k: int, anchor: Anchor, use: Use | None, past: Sequence[Decision]
) -> list[tuple[str, str]]:
    told = [("Training image", anchor.file or f"sample {anchor.sample_id}")]
    if anchor.group:
        told.append(("Lesion, patient or group", anchor.group))
    told.append(("Similarity of prototype and part", f"{decimal(anchor.similarity_after)} (1 is the very same)"))
    told.append(
        ("Weight", f"{decimal(float(run.head.weights()[c, k].detach()))}: what a similarity of 1 adds to the score")
    )
    if use is not None:
        told.append(
            (
                "Use",
                f"the strongest evidence in {use.strongest} of the {use.predicted} validation images that the model "
                f"calls {run.class_names[c]} ({use.images} in all)",
            )
        )
    mine = [made for made in past if (made.class_name, made.prototype) == (run.class_names[c], k)]
    kept = [made for made in mine if made.kind == "keep" and made.file == anchor.file]
    told += [("Kept", f"by {made.who}: {made.reason}") for made in kept[-1:]]
    forbidden = [made for made in in_force(past) if any((m.class_index, m.prototype) == (c, k) for m in made.replaced)]
    if forbidden:
        told.append(
            (
                "Replaced before",
                f"{len(forbidden)} times; see Decisions" if len(forbidden) > 1 else "once; see Decisions",
            )
        )
    return told


def _near(run: Run, name: str, near: Neighbours, root: Path) -> Markup:
    own, others = (Markup("").join(_tile(run, one, root) for one in some) for some in (near.own, near.others))
    nothing = Markup('<p class="pp-muted">None.</p>')
    return Markup(
        '<h3>Other images of {} that it finds most similar</h3><p class="pp-muted">They should show the same thing.</p>'
        '<div class="pp-near">{}</div>'
        '<h3>Most similar images of other classes</h3><p class="pp-muted">What it may mistake for {}.</p>'
        '<div class="pp-near pp-other">{}</div>'
    ).format(name, own or nothing, name, others or nothing)


def _tile(run: Run, found: Neighbour, root: Path) -> Markup:
    name, file = run.class_names[found.class_index], file_within(root, found.name)
    said = f"{name}, similarity {decimal(found.similarity)}"
    try:
        if file is None:
            raise InputError("outside")
        shown = part_tile(read_image(file), found.box, COLOURS[found.class_index % len(COLOURS)], 2 * NEAR)
    except InputError:
        return Markup('<figure class="pp-gone"><figcaption>{} (picture not found)</figcaption></figure>').format(said)
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(picture(shown, found.name, NEAR), said)
