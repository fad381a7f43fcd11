"""The tab *Explain*: an image, what the model says of it, and which training images that rests on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from protopush.app.page import PRIVATE, message, render
from protopush.app.run_store import RunStore
from protopush.app.upload import KINDS, Limits, Upload, read_upload
from protopush.data.transforms import View
from protopush.errors import InputError
from protopush.explain import draw_panel, draw_why_not, explain_batch
from protopush.explain.explanation import ClassEvidence, Explanation
from protopush.models.model_folder import Run
from protopush.report.cases import contribution_rows

NARROW = 820  # pixels of a screen below which pictures are made for a phone
TOP, PANEL, LINES = 10, 3, 10  # classes listed, of these in the panel, and prototypes listed
WITH_WIDTH = "(value, other) => [value, window.innerWidth]"
WITH_WIDTH_2 = "(value, other, width) => [value, other, window.innerWidth]"


@dataclass(frozen=True)
class Shown:
    """What a page keeps of an image while it is shown: (3, H, W) for the model, and a copy to draw on."""

    name: str
    pixels: Tensor
    view: View
    copy: Image.Image

    @classmethod
    def of(cls, run: Run, upload: Upload) -> Shown:
        """An upload, as the model sees it."""
        return cls(upload.name, run.transform(upload.image), run.transform.view(upload.image.size), upload.copy())

    def explain(self, store: RunStore, run: Run, also: tuple[str, ...] = ()) -> Explanation:
        """All that counts for the most probable classes, and for others that are asked for."""
        batch, top = self.pixels.unsqueeze(0).to(store.device), min(TOP, len(run.class_names))
        return explain_batch(run.model, batch, [self.view], [self.name], run.class_names, top, also)[0]


def contributions(evidence: ClassEvidence) -> str:
    """What each prototype adds to the score of a class, and that this is the whole score, as HTML."""
    return render("contributions", evidence, contribution_rows(evidence)[:LINES], evidence.matches[LINES:])


def explain_tab(store: RunStore, limits: Limits) -> None:
    """Build the tab."""
    about = (
        f"Choose one image ({KINDS}; at most {limits.megabytes:g} MB and {limits.megapixels:g} megapixels). It stays "
        "on the computer that this app runs on, and is deleted when the app ends."
    )
    picture: dict[str, Any] = {
        "visible": False, "interactive": False, "format": "png", "buttons": ["download", "fullscreen"],
        "show_label": False,
    }  # fmt: skip
    width = gr.Number(visible=False)
    kept = gr.State(None, time_to_live=3600)
    gr.HTML(message(about, "plain"))
    file = gr.File(label="Image", file_count="single", elem_id="pp-upload", height=150)
    said = gr.HTML(elem_id="pp-said")
    panel = gr.Image(elem_id="pp-panel", label="This part looks like that part of a training image", **picture)
    sums = gr.HTML(elem_id="pp-sums")
    with gr.Column(visible=False) as question:
        gr.HTML("<h3>Why not another class?</h3>")
        other = gr.Dropdown(label="Compare with", choices=[], elem_id="pp-other", filterable=False)
        answer = gr.HTML()
        beside = gr.Image(elem_id="pp-why", label="Why this class and not that one", **picture)
    shown = [kept, said, panel, sums, question, other, beside, answer]

    def nothing(text: str = "") -> list[Any]:
        hidden = gr.Image(value=None, visible=False)
        return [None, text, hidden, "", gr.Column(visible=False), gr.Dropdown(choices=[], value=None), hidden, ""]

    def explain(path: str | None, pixels: float | None) -> list[Any]:
        if path is None:
            return nothing()
        try:
            upload, run = read_upload(path, limits), store.run()
            image = Shown.of(run, upload)
            explanation = image.explain(store, run)
        except InputError as error:
            return nothing(message(str(error), "bad"))
        some = replace(explanation, classes=explanation.classes[:PANEL])
        drawn = draw_panel(some, image.copy, run.source, narrow=(pixels or NARROW) < NARROW)
        others = [name for name in run.class_names if name != explanation.predicted_name]
        first = [image, render("prediction", explanation, upload.note), gr.Image(value=drawn, visible=True)]
        asked = [gr.Column(visible=bool(others)), gr.Dropdown(choices=others, value=None)]
        return [*first, contributions(explanation.classes[0]), *asked, gr.Image(value=None, visible=False), ""]

    def why_not(image: Shown | None, name: str | None, pixels: float | None) -> list[Any]:
        hidden = gr.Image(value=None, visible=False)
        if image is None or name is None:
            return [hidden, message("Choose the image again; this one was forgotten.", "bad") if name else ""]
        try:
            run = store.run()
            found = image.explain(store, run, (name,))
            drawn = draw_why_not(found, name, image.copy, run.source, narrow=(pixels or NARROW) < NARROW)
        except InputError as error:  # since somebody changed the run, it may be the predicted class
            return [hidden, message(str(error), "bad")]
        return [gr.Image(value=drawn, visible=True), ""]

    file.upload(explain, [file, width], shown, js=WITH_WIDTH, **PRIVATE)
    file.clear(lambda: nothing(), None, shown, **PRIVATE)
    other.input(why_not, [kept, other, width], [beside, answer], js=WITH_WIDTH_2, **PRIVATE)
