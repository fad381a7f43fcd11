"""The tab *Decisions*: who decided what and why, how to take it back, and how to take it away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from protopush.app.desk import Desk
from protopush.app.history import effect, told, what
from protopush.app.pages import message
from protopush.errors import InputError
from protopush.review.decisions import in_force

EXPORTS = (
    '<div class="pp-links"><a class="pp-button" href="decisions.csv" download="decisions.csv">Save as table (CSV)</a>'
    '<a class="pp-button" href="decisions.json" download="decisions.json">Save all details (JSON)</a></div>'
)


def decisions_tab(desk: Desk, tab: gr.Tab) -> None:
    """Build the tab; the list is read anew whenever somebody comes to it."""
    log = gr.HTML(elem_id="pp-log")
    gr.HTML(EXPORTS)
    with gr.Column(visible=False, elem_id="pp-take-back") as form:
        gr.HTML("<h3>Undo a decision</h3>")
        number = gr.Dropdown(label="Decision", choices=[], elem_id="pp-number", filterable=False)
        who = gr.Textbox(label="Your name (needed)", max_length=200, max_lines=1, elem_id="pp-undo-who")
        reason = gr.Textbox(label="Reason (needed)", max_lines=4, lines=2, max_length=2000, elem_id="pp-undo-reason")
        undo = gr.Button("Undo", elem_id="pp-undo")
    result = gr.HTML(elem_id="pp-undo-result")

    def show() -> list[Any]:
        try:
            past = desk.decisions()
        except InputError as error:
            return [message(str(error), "bad"), gr.Column(visible=False), gr.Dropdown(choices=[], value=None)]
        holding = [(f"No. {made.id}: {what(made)}", made.id) for made in reversed(in_force(past))]
        return [told(past), gr.Column(visible=bool(holding)), gr.Dropdown(choices=holding, value=None)]

    def take_back(chosen: int | None, why: str, name: str) -> Iterator[list[Any]]:
        if chosen is None:
            yield [message("Choose the decision that is to be undone.", "bad"), *[gr.skip()] * 4]
            return
        yield [message("Undoing, and measuring the effect; this may take a minute."), *[gr.skip()] * 4]
        try:
            made = desk.undo(chosen, why, name)
        except InputError as error:
            yield [message(str(error), "bad"), *show(), gr.skip()]
            return
        yield [
            message(f"Decision no. {chosen} is undone (decision no. {made.id}). {effect(made)}", "good"),
            *show(),
            "",
        ]

    quiet: dict[str, Any] = {"api_visibility": "private"}
    tab.select(show, None, [log, form, number], **quiet).then(lambda: "", None, result, **quiet)
    undo.click(take_back, [number, reason, who], [result, log, form, number, reason], **quiet)
