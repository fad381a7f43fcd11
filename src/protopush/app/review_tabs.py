"""The tabs *Prototypes*, to keep or forbid what each one stands for, and *Decisions*, to take that back or save it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from protopush.app.page import PRIVATE, decision_fields, message, render
from protopush.app.run_store import RunStore, UsageWorker, Use
from protopush.data.images import read_image
from protopush.data.shards import is_file
from protopush.data.table import spreadsheet_cell
from protopush.errors import InputError
from protopush.explain.figure_canvas import part_and_whole
from protopush.explain.figure_style import COLOURS, REACH
from protopush.explain.neighbours import Neighbours
from protopush.models.model_folder import Run
from protopush.push.certificate import file_within
from protopush.report.prototype_cards import Cards, embed, framed, part
from protopush.runs.decisions import Decision, in_force

TILE, NEAR = 300, 132  # sides in pixels of the page
FLIPS = 10  # answers that would change, named one by one
TO_DETAILS = "() => document.querySelector('#pp-details').scrollIntoView({behavior: 'smooth', block: 'nearest'})"
AGAIN = 3.0  # seconds between requests for what is computed in the background
INTRO = {
    "local": "A prototype is a part of a training image that the model compares new images with. Left the part, right "
    "the image that it comes from.",
    "global": "A prototype is a training image that the model compares new images with, each as a whole. Left what it "
    "sees of it, right all of it.",
}
SEARCHING = (
    "Searching the training images of {} for the next best part. Where none is known yet and images are many, this "
    "takes a few minutes; you may go on with other prototypes meanwhile."
)
CHOOSE = "Choose one to see it closer, and to keep or forbid it."


def thumbnails(run: Run, c: int) -> list[tuple[Image.Image, str]]:
    """Each prototype of a class: its part beside its training image, and its name."""
    found, manager, reach = [], run.head.proto_manager, run.head.compared(run.model.backbone.regions).reach
    for k in manager.used_of(c):
        ink = COLOURS[c % len(COLOURS)]
        part, whole = part_and_whole(run.source(c, k), manager.anchor(c, k), ink, TILE, 22, reach)
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
    card = Cards(run, root, {(c, k): near} if near is not None else {}, sides=(TILE, TILE, NEAR)).card(c, k)
    name, facts = run.class_names[c], card["facts"]
    if use is not None:
        often = f"the strongest evidence in {use.strongest} of the {use.predicted} validation images that the model "
        facts.append(("use", f"{often}calls {name} ({use.images} in all)"))
    this = ("keep", name, k, card["file"])
    kept = [made for made in past if (made.kind, made.class_name, made.prototype, made.file) == this]
    facts += [("kept", f"by {made.who}: {made.reason}") for made in kept[-1:]]
    moves = [one for made in in_force(past) for one in made.replaced if (one.class_name, one.prototype) == (name, k)]
    if moves:
        facts.append(("replaced before", f"{len(moves)} times; see Decisions" if moves[1:] else "once; see Decisions"))
    return render("details", card, why)


def would_be(run: Run, made: Decision, root: Path) -> str:
    """What forbidding would do, as HTML: the part that would take the place, and the answers that would change."""
    pictures = []
    for one in made.replaced:
        file, box = file_within(root, one.new.file or ""), one.new.box
        if file is not None and is_file(file) and box is not None:
            picture = read_image(file)
            whole = framed(
                embed(picture, TILE, TILE, "its training image"), [box], picture.size, colours=[one.class_index]
            )
            pictures.append((part(picture, box, TILE, "the part", one.class_index, sees=one.new.sees), whole))
    return render("what_if", made, pictures, made.flips[:FLIPS])


def prototypes_tab(store: RunStore, worker: UsageWorker, page: gr.Blocks) -> None:
    """Build the tab on a page."""
    chosen = gr.State(None)
    run = store.run()
    seen = f" {REACH[run.model.backbone.regions.reach]}" if run.head.match == "local" else ""
    gr.HTML(message(f"{INTRO[run.head.match]} {CHOOSE}{seen}", "plain"))
    names = [(name, c) for c, name in enumerate(run.class_names)]
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
            ask = gr.Button("What would replace it?", elem_id="pp-ask", min_width=120)
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
            yield [message(SEARCHING.format(class_name)), *same]
        try:
            made = (store.forbid if forbids else store.keep)(f"{class_name}:{k}", why, name)
        except InputError as error:
            yield [message(str(error), "bad"), *same]
            return
        done = f"{class_name} #{k} {'was replaced' if forbids else 'is kept'} (decision no. {made.id}). {made.effect}"
        done += " It can be undone under Decisions." if forbids else ""
        yield [message(done, "good"), gr.Gallery(value=thumbnails(store.run(), c)), *describe(place), ""]

    def what_if(place: tuple[int, int] | None) -> Iterator[str]:
        if place is None:
            yield message("Choose a prototype first.", "bad")
            return
        run, (c, k) = store.run(), place
        yield message(SEARCHING.format(run.class_names[c]))
        try:
            yield would_be(run, store.what_if(f"{run.class_names[c]}:{k}"), store.root(run))
        except InputError as error:
            yield message(str(error), "bad")

    ask.click(what_if, chosen, result, **PRIVATE)
    every = [pictures, chosen, known, form, again]
    kind.input(show_class, kind, every, **PRIVATE).then(lambda: "", None, result, **PRIVATE)
    page.load(show_class, kind, every, **PRIVATE)
    picked = pictures.select(choose, kind, [chosen, known, again, form, result], **PRIVATE)
    picked.then(None, js=TO_DETAILS, **PRIVATE)  # below ten pictures nobody would see that something has come
    again.tick(describe, chosen, [known, again], show_progress="hidden", **PRIVATE)
    for button, forbids in ((forbid, True), (keep, False)):
        after = [result, pictures, known, again, reason]
        button.click(partial(decide, forbids=forbids), [chosen, reason, who], after, **PRIVATE)


COLUMNS = (
    "id", "time", "who", "kind", "reason", "class", "prototype", "file", "cell", "min_share", "undoes", "in_force",
    "replaced", "n_val", "balanced_accuracy_before", "balanced_accuracy_after", "auroc_before", "auroc_after",
)  # fmt: skip
EXPORTS = (
    '<div class="pp-links"><a class="pp-button" href="decisions.csv" download="decisions.csv">Save as table (CSV)</a>'
    '<a class="pp-button" href="decisions.json" download="decisions.json">Save all details (JSON)</a></div>'
)


def as_json(decisions: Sequence[Decision]) -> str:
    """All that is recorded of every decision."""
    return json.dumps([made.to_dict() for made in decisions], indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(decisions: Sequence[Decision]) -> str:
    """A table with one decision a line, for a spreadsheet; no cell is a formula there, no matter who wrote what."""
    text, holding = io.StringIO(), {made.id for made in in_force(decisions)}
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for made in decisions:
        before, after = made.val_before or {}, made.val_after or {}
        moved = "; ".join(
            f"{one.class_name} #{one.prototype}: {one.old.file} cell {one.old.cell} -> {one.new.file} cell "
            f"{one.new.cell}"
            for one in made.replaced
        )
        what = [made.id, made.time, made.who, made.kind, made.reason, made.class_name, made.prototype, made.file]
        how = [made.cell, made.min_share, made.undoes, "yes" if made.id in holding else "no", moved, before.get("n")]
        scores = [some.get(name) for name in ("balanced_accuracy", "auroc") for some in (before, after)]
        writer.writerow([_cell(value) for value in (*what, *how, *scores)])
    return "\ufeff" + text.getvalue()  # so that Excel reads UTF-8


def _cell(value: Any) -> Any:
    return spreadsheet_cell(value) if isinstance(value, str) else "" if value is None else value


def decisions_tab(store: RunStore, tab: gr.Tab) -> None:
    """Build the tab; the list is read again whenever somebody comes to it."""
    log = gr.HTML(elem_id="pp-log")
    gr.HTML(EXPORTS)
    with gr.Column(visible=False, elem_id="pp-take-back") as form:
        gr.HTML("<h3>Undo a decision</h3>")
        number = gr.Dropdown(label="Decision", choices=[], elem_id="pp-number", filterable=False)
        who, reason = decision_fields("pp-undo")
        undo = gr.Button("Undo", elem_id="pp-undo")
    result = gr.HTML(elem_id="pp-undo-result")

    def show() -> list[Any]:
        try:
            past = store.decisions()
        except InputError as error:
            return [message(str(error), "bad"), gr.Column(visible=False), gr.Dropdown(choices=[], value=None)]
        holding = [(f"No. {made.id}: {made.summary}", made.id) for made in reversed(in_force(past))]
        return [render("log", past), gr.Column(visible=bool(holding)), gr.Dropdown(choices=holding, value=None)]

    def take_back(chosen: int | None, why: str, name: str) -> Iterator[list[Any]]:
        same = [gr.skip()] * 4
        if chosen is None:
            yield [message("Choose the decision that is to be undone.", "bad"), *same]
            return
        yield [message("Undoing, and measuring the effect; this may take a minute."), *same]
        try:
            made = store.undo(chosen, why, name)
        except InputError as error:
            yield [message(str(error), "bad"), *show(), gr.skip()]
            return
        done = f"Decision no. {chosen} is undone (decision no. {made.id}). {made.effect}"
        yield [message(done, "good"), *show(), ""]

    tab.select(show, None, [log, form, number], **PRIVATE).then(lambda: "", None, result, **PRIVATE)
    undo.click(take_back, [number, reason, who], [result, log, form, number, reason], **PRIVATE)
