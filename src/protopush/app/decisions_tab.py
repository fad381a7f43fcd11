"""The decisions about a run: told on the page, and as files to take away.

The tab *Decisions*: who decided what and why, how to take it back, and how to take it away.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import gradio as gr
from markupsafe import Markup

from protopush.app.html import message
from protopush.app.run_store import Desk
from protopush.errors import InputError
from protopush.runs.decisions import Decision, in_force

COLUMNS = (
    "id", "time", "who", "kind", "reason", "class", "prototype", "file", "cell", "min_share", "undoes", "in_force",
    "replaced", "n_val", "balanced_accuracy_before", "balanced_accuracy_after", "auroc_before", "auroc_after",
)  # fmt: skip


def as_json(decisions: Sequence[Decision]) -> str:
    """All that is recorded of every decision."""
    return json.dumps([made.to_dict() for made in decisions], indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(decisions: Sequence[Decision]) -> str:
    """A table with one decision a line, for a spreadsheet; no cell is a formula there, whatever people have written."""
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
    told = [made.id, made.time, made.who, made.kind, made.reason, made.class_name, made.prototype, made.file, made.cell]
    scores = [some.get(name) for name in ("balanced_accuracy", "auroc") for some in (before, after)]
    return [*told, made.min_share, made.undoes, "yes" if holds else "no", moved, before.get("n"), *scores]


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value


def told(decisions: Sequence[Decision]) -> str:
    """All decisions, the newest first."""
    if not decisions:
        return '<p class="pp-muted">Nobody has decided anything yet. Choose a prototype under Prototypes.</p>'
    undone = {made.undoes: made.id for made in decisions if made.undoes is not None}
    return Markup('<ol class="pp-log" reversed>{}</ol>').format(
        Markup("").join(_entry(made, undone.get(made.id)) for made in reversed(decisions))
    )


def _entry(made: Decision, undone_by: int | None) -> Markup:
    state = Markup('<span class="pp-tag">undone by no. {}</span>').format(undone_by) if undone_by else ""
    return Markup(
        '<li value="{}"><div class="pp-what"><b>No. {}: {}</b> {}</div><div class="pp-why">“{}”</div>'
        '<div class="pp-muted">{}, {}</div><div>{}</div></li>'
    ).format(made.id, made.id, what(made), state, made.reason, made.who, when(made.time), effect(made))


def what(made: Decision) -> str:
    """A decision in a few words."""
    name = f"{made.class_name} #{made.prototype}"
    return {
        "prototype": f"{name} must not stand for its part of {made.file}",
        "image": f"no prototype may stand for {made.file}",
        "mask": f"prototypes must lie inside the masks ({made.min_share} of the part)",
        "keep": f"{name} is kept ({made.file})",
        "undo": f"decision no. {made.undoes} is undone",
    }[made.kind]


def effect(made: Decision) -> str:
    """What a decision has changed."""
    if made.kind == "keep":
        return "Nothing was changed."
    moved = [f"{one.class_name} #{one.prototype} now stands for a part of {one.new.file}" for one in made.replaced]
    text = "; ".join(moved) + "." if moved else "No prototype was replaced."
    before, after = made.val_before or {}, made.val_after or {}
    was, is_now = before.get("balanced_accuracy"), after.get("balanced_accuracy")
    if was is None or is_now is None:
        return f"{text} There are no validation images to measure the effect on."
    change = "unchanged" if round(was, 3) == round(is_now, 3) else f"{100 * (is_now - was):+.1f} points"
    accuracy = (
        f"Balanced accuracy on {before.get('n')} validation images: {was:.1%} before, {is_now:.1%} after ({change})."
    )
    return f"{text} {accuracy}"


def when(time: str) -> str:
    """For people.

    Example:
        >>> when("2026-03-01T09:05:00+00:00")
        '1 March 2026, 09:05 UTC'
    """
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        return time
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


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
