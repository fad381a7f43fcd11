"""Templates, messages and the theme that the tabs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from protopush import report
from protopush.report.build import environment

STYLES = [Path(report.__file__).parent / "templates" / "macros.css", Path(__file__).parent / "templates" / "app.css"]
# Of the framework's outermost box, which its own way of adding styles doesn't reach.
HEAD = "<style>@media (max-width: 640px) { .gradio-container > .main { padding: 8px !important; } }</style>"
OLD = (600, 3600)  # every so many seconds, files that nobody has touched for so long are deleted
PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # of every event: nothing is called but by the page


def render(piece: str, *values: Any, **context: Any) -> str:
    """A macro of ``templates/tabs.html.j2`` as HTML; all text from files or people is escaped by it."""
    tabs = environment("protopush.app").get_template("tabs.html.j2")
    return str(getattr(tabs.module, piece)(*values, **context))


def message(text: str, kind: str = "note") -> str:
    """A line in a box: ``note``, ``good`` or ``bad``; ``plain`` without one."""
    return render("message", text, kind)


def decision_fields(prefix: str) -> tuple[gr.Textbox, gr.Textbox]:
    """Who decides, and why."""
    who = gr.Textbox(label="Your name (needed)", max_length=200, max_lines=1, elem_id=f"{prefix}-who")
    reason = gr.Textbox(label="Reason (needed)", max_lines=4, lines=2, max_length=2000, elem_id=f"{prefix}-reason")
    return who, reason


def theme() -> gr.themes.Base:
    """Fonts of the reader's own system: nothing is fetched."""
    own = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    sizes = {"text_size": "lg", "spacing_size": "lg", "radius_size": "md"}
    made = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=own, font_mono=mono, **sizes)
    return made.set(  # text and buttons with enough contrast (WCAG 2.2)
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_800",
    )
