"""The tab *Decisions*: who decided what and why, how to take it back, and the record as files to take away."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from protopush.app.page import PRIVATE, decision_fields, message, render
from protopush.app.run_store import RunStore
from protopush.errors import InputError
from protopush.runs.decisions import Decision, in_force

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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(COLUMNS)
    holding = {made.id for made in in_force(decisions)}
    for made in decisions:
        writer.writerow([_cell(value) for value in _row(made, made.id in holding)])
    return "\ufeff" + text.getvalue()  # so that Excel reads UTF-8


def _row(made: Decision, holds: bool) -> list[Any]:
    before, after = made.val_before or {}, made.val_after or {}
    moved = "; ".join(
        f"{one.class_name} #{one.prototype}: {one.old.file} cell {one.old.cell} -> {one.new.file} cell {one.new.cell}"
        for one in made.replaced
    )
    what = [made.id, made.time, made.who, made.kind, made.reason, made.class_name, made.prototype, made.file, made.cell]
    scores = [some.get(name) for name in ("balanced_accuracy", "auroc") for some in (before, after)]
    return [*what, made.min_share, made.undoes, "yes" if holds else "no", moved, before.get("n"), *scores]


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value


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
