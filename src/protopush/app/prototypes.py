"""The tab *Prototypes*: what each one stands for, and whether that is to stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from protopush.app.desk import Desk
from protopush.app.gallery import details, slots_of, thumbnail
from protopush.app.history import effect
from protopush.app.lookout import Lookout
from protopush.app.pages import message
from protopush.errors import InputError

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
