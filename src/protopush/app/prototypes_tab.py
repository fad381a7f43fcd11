"""The tab *Prototypes*: what each one stands for, all that is known of it, and whether it is to stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from protopush.app.page import PRIVATE, decision_fields, message, render
from protopush.app.run_store import RunStore, UsageWorker, Use
from protopush.errors import InputError
from protopush.explain.figure_canvas import part_and_whole
from protopush.explain.figure_style import COLOURS
from protopush.explain.neighbours import Neighbours
from protopush.models.model_folder import Run
from protopush.report.prototype_cards import Cards
from protopush.runs.decisions import Decision, in_force

TILE, NEAR = 300, 132  # sides in pixels of the page
AGAIN = 3.0  # seconds between requests for what is computed in the background
INTRO = (
    "A prototype is a part of a training image that the model compares new images with. Left the part, right the image "
    "that it comes from. Choose one to see it closer, and to keep or forbid it."
)


def thumbnails(run: Run, c: int) -> list[tuple[Image.Image, str]]:
    """Each prototype of a class: its part beside its training image, and its name."""
    found, cards = [], Cards(run, run.root)
    for k in run.head.proto_manager.used_of(c):
        part, whole = part_and_whole(run.picture(c, k), cards.anchor(c, k), COLOURS[c % len(COLOURS)], TILE, 22)
        both = Image.new("RGB", (2 * TILE + 8, TILE), (255, 255, 255))
        both.paste(part, (0, 0))
        both.paste(whole, (TILE + 8, 0))
        found.append((both, f"{run.class_names[c]} #{k}"))
    return found


def details(
    run: Run, c: int, k: int, found: tuple[Neighbours | None, Use | None, str], past: Sequence[Decision], root: Path
) -> str:
    """One prototype as HTML: its part and image, where it comes from, how much it is used, what else it is like."""
    near, use, why = found
    cards = Cards(run, root, {(c, k): near} if near is not None else {}, sides=(TILE, TILE, NEAR))
    card = cards.card(c, k)
    card["facts"] += _decided(run.class_names[c], k, card["file"], use, past)
    return render("details", card, why)


def _decided(name: str, k: int, file: str, use: Use | None, past: Sequence[Decision]) -> list[tuple[str, str]]:
    """How much a prototype is used, and what people have decided about it."""
    facts = []
    if use is not None:
        often = f"the strongest evidence in {use.strongest} of the {use.predicted} validation images that the model "
        facts.append(("use", f"{often}calls {name} ({use.images} in all)"))
    kept = [made for made in past if (made.kind, made.class_name, made.prototype, made.file) == ("keep", name, k, file)]
    facts += [("kept", f"by {made.who}: {made.reason}") for made in kept[-1:]]
    moves = [one for made in in_force(past) for one in made.replaced if (one.class_name, one.prototype) == (name, k)]
    if moves:
        facts.append(("replaced before", f"{len(moves)} times; see Decisions" if moves[1:] else "once; see Decisions"))
    return facts


def prototypes_tab(store: RunStore, worker: UsageWorker, page: gr.Blocks) -> None:
    """Build the tab on a page."""
    chosen = gr.State(None)
    gr.HTML(message(INTRO, "plain"))
    names = [(name, c) for c, name in enumerate(store.run().class_names)]
    kind = gr.Dropdown(label="Class", choices=names, value=0, elem_id="pp-class", filterable=len(names) > 20)
    pictures = gr.Gallery(
        label="Prototypes", show_label=False, columns=4, height="auto", object_fit="contain", allow_preview=False,
        elem_id="pp-gallery", buttons=[], format="jpeg", interactive=False,
    )  # fmt: skip
    known = gr.HTML(elem_id="pp-details")
    again = gr.Timer(AGAIN, active=False)
    with gr.Column(visible=False, elem_id="pp-decide") as form:
        gr.HTML("<h3>Keep it, or forbid it?</h3>")
        who, reason = decision_fields("pp")
        with gr.Row():
            keep = gr.Button("Keep", elem_id="pp-keep", min_width=120)
            forbid = gr.Button("Forbid and replace", variant="primary", elem_id="pp-forbid", min_width=120)
    result = gr.HTML(elem_id="pp-result")

    def show_class(c: int) -> list[Any]:
        gallery = gr.Gallery(value=thumbnails(store.run(), c), selected_index=None)
        return [gallery, None, "", gr.Column(visible=False), gr.Timer(active=False)]

    def describe(place: tuple[int, int] | None) -> tuple[str, gr.Timer]:
        if place is None:
            return "", gr.Timer(active=False)
        run, (c, k) = store.run(), place
        found = worker.of(run, run.head.proto_manager.index(c, k))
        text = details(run, c, k, found, store.decisions(), store.root(run))
        return text, gr.Timer(active=found[2].startswith("Still"))

    def choose(c: int, event: gr.SelectData) -> list[Any]:
        place = (c, store.run().head.proto_manager.used_of(c)[int(event.index)])
        return [place, *describe(place), gr.Column(visible=True), ""]

    def decide(place: tuple[int, int] | None, why: str, name: str, forbids: bool) -> Iterator[list[Any]]:
        same = [gr.skip()] * 4
        if place is None:
            yield [message("Choose a prototype first.", "bad"), *same]
            return
        class_name, (c, k) = store.run().class_names[place[0]], place
        if forbids and why.strip() and name.strip():
            text = f"Searching the training images of {class_name} for the next best part. With many images this takes "
            yield [message(text + "a few minutes; you may go on with other prototypes meanwhile."), *same]
        try:
            made = (store.forbid if forbids else store.keep)(f"{class_name}:{k}", why, name)
        except InputError as error:
            yield [message(str(error), "bad"), *same]
            return
        done = f"{class_name} #{k} {'was replaced' if forbids else 'is kept'} (decision no. {made.id}). {made.effect}"
        done += " It can be undone under Decisions." if forbids else ""
        yield [message(done, "good"), gr.Gallery(value=thumbnails(store.run(), c)), *describe(place), ""]

    every = [pictures, chosen, known, form, again]
    kind.input(show_class, kind, every, **PRIVATE).then(lambda: "", None, result, **PRIVATE)
    page.load(show_class, kind, every, **PRIVATE)
    pictures.select(choose, kind, [chosen, known, again, form, result], **PRIVATE)
    again.tick(describe, chosen, [known, again], show_progress="hidden", **PRIVATE)
    for button, forbids in ((forbid, True), (keep, False)):
        after = [result, pictures, known, again, reason]
        button.click(partial(decide, forbids=forbids), [chosen, reason, who], after, **PRIVATE)
