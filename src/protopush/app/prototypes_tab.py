"""The prototypes of a class as pictures, and all that is known of one of them.

The tab *Prototypes*: what each one stands for, and whether that is to stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup
from PIL import Image

from protopush.app.decisions_tab import effect
from protopush.app.html import facts, message, picture
from protopush.app.run_store import Desk
from protopush.app.usage_worker import Lookout, Use
from protopush.data.images import read_image
from protopush.errors import InputError
from protopush.explain.figure_canvas import part_and_whole, part_tile
from protopush.explain.figure_style import COLOURS, decimal, file_name
from protopush.explain.neighbours import Neighbour, Neighbours
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor
from protopush.push.certificate import file_within
from protopush.runs.decisions import Decision, in_force

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


INTRO = (
    "A prototype is a part of a training image that the model compares new images with. Left the part, right the image "
    "that it comes from. Choose one to look closer, and to keep or forbid it."
)
AGAIN = 3.0  # seconds between looks at what is worked out in the background


def prototypes_tab(desk: Desk, lookout: Lookout, page: gr.Blocks) -> None:
    """Build the tab on a page."""
    run = desk.run()
    chosen = gr.State(None)
    gr.HTML(message(INTRO, "plain"))
    names = list(enumerate(run.class_names))
    kind = gr.Dropdown(
        label="Class", choices=[(name, c) for c, name in names], value=0, elem_id="pp-class", filterable=len(names) > 20
    )
    pictures = gr.Gallery(
        label="Prototypes", show_label=False, columns=4, height="auto", object_fit="contain", allow_preview=False,
        elem_id="pp-gallery", buttons=[], format="jpeg", interactive=False,
    )  # fmt: skip
    told = gr.HTML(elem_id="pp-details")
    again = gr.Timer(AGAIN, active=False)
    with gr.Column(visible=False, elem_id="pp-decide") as form:
        gr.HTML("<h3>Keep it, or forbid it?</h3>")
        who = gr.Textbox(label="Your name (needed)", max_length=200, max_lines=1, elem_id="pp-who")
        reason = gr.Textbox(label="Reason (needed)", max_lines=4, lines=2, max_length=2000, elem_id="pp-reason")
        with gr.Row():
            keep = gr.Button("Keep", elem_id="pp-keep", min_width=120)
            forbid = gr.Button("Forbid and replace", variant="primary", elem_id="pp-forbid", min_width=120)
    result = gr.HTML(elem_id="pp-result")

    def show_class(c: int) -> list[Any]:
        run = desk.run()
        shown = [(thumbnail(run, c, k), f"{run.class_names[c]} #{k}") for k in slots_of(run, c)]
        return [
            gr.Gallery(value=shown, selected_index=None),
            None,
            "",
            gr.Column(visible=False),
            gr.Timer(active=False),
        ]

    def describe(place: tuple[int, int] | None) -> tuple[str, gr.Timer]:
        if place is None:
            return "", gr.Timer(active=False)
        run, (c, k) = desk.run(), place
        found = lookout.of(run, c * run.head.proto_manager.max_prototypes + k)
        text = details(run, c, k, found, desk.decisions(), desk.root(run))
        return text, gr.Timer(active=found[2].startswith("Still"))

    def choose(c: int, event: gr.SelectData) -> list[Any]:
        place = (c, slots_of(desk.run(), c)[int(event.index)])
        return [place, *describe(place), gr.Column(visible=True), ""]

    def decide(place: tuple[int, int] | None, why: str, name: str, forbids: bool) -> Iterator[list[Any]]:
        same = [gr.skip()] * 4
        if place is None:
            yield [message("Choose a prototype first.", "bad"), *same]
            return
        run, (c, k) = desk.run(), place
        label = f"{run.class_names[c]} #{k}"
        if forbids and why.strip() and name.strip():
            text = f"Looking through the training images of {run.class_names[c]} for the next best part. With many "
            yield [message(text + "images this takes a few minutes; you may go on looking meanwhile."), *same]
        try:
            made = (desk.forbid if forbids else desk.keep)(f"{run.class_names[c]}:{k}", why, name)
        except InputError as error:
            yield [message(str(error), "bad"), *same]
            return
        done = f"{label} was replaced" if forbids else f"{label} is kept"
        undo = " It can be undone under Decisions." if forbids else ""
        done = message(f"{done} (decision no. {made.id}). {effect(made)}{undo}", "good")
        now = desk.run()
        shown = [(thumbnail(now, c, j), f"{now.class_names[c]} #{j}") for j in slots_of(now, c)]
        yield [done, gr.Gallery(value=shown), *describe(place), ""]

    def forbid_it(place: tuple[int, int] | None, why: str, name: str) -> Iterator[list[Any]]:
        yield from decide(place, why, name, forbids=True)

    def keep_it(place: tuple[int, int] | None, why: str, name: str) -> Iterator[list[Any]]:
        yield from decide(place, why, name, forbids=False)

    quiet: dict[str, Any] = {"api_visibility": "private"}
    every = [pictures, chosen, told, form, again]
    kind.input(show_class, kind, every, **quiet).then(lambda: "", None, result, **quiet)
    page.load(show_class, kind, every, **quiet)
    pictures.select(choose, kind, [chosen, told, again, form, result], **quiet)
    again.tick(describe, chosen, [told, again], show_progress="hidden", **quiet)
    forbid.click(forbid_it, [chosen, reason, who], [result, pictures, told, again, reason], **quiet)
    keep.click(keep_it, [chosen, reason, who], [result, pictures, told, again, reason], **quiet)
