"""The whole page: three tabs."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
from markupsafe import Markup

from protopush.app.decisions_tab import decisions_tab
from protopush.app.explain_tab import explain_tab
from protopush.app.prototypes_tab import prototypes_tab
from protopush.app.run_store import Desk
from protopush.app.upload import Limits
from protopush.app.usage_worker import Lookout

STYLE = Path(__file__).with_name("style.css")
# Of the framework's outermost box, which its own way of adding styles doesn't reach.
HEAD = "<style>@media (max-width: 640px) { .gradio-container > .main { padding: 8px !important; } }</style>"
OLD = (600, 3600)  # every so many seconds, files that nobody has touched for so long are deleted


def build_page(desk: Desk, limits: Limits) -> gr.Blocks:
    """The page for a run."""
    run, lookout = desk.run(), Lookout(desk)
    title = f"Review of {run.folder.resolve().name}"
    page: gr.Blocks
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=OLD, fill_width=True) as page:
        gr.HTML(Markup('<h1 class="pp-title">{}</h1>').format(title))
        with gr.Tabs():
            with gr.Tab("Explain", id="explain"):
                explain_tab(desk, limits)
            with gr.Tab("Prototypes", id="prototypes"):
                prototypes_tab(desk, lookout, page)
            with gr.Tab("Decisions", id="decisions") as tab:
                decisions_tab(desk, tab)
    return page


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
