"""The tab *Explain*: an image, what the model says of it, and which training images that rests on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from protopush.app.html import contributions, message, prediction
from protopush.app.run_store import Desk
from protopush.app.upload import KINDS, Limits, Upload, read_upload
from protopush.data.transforms import View
from protopush.errors import InputError
from protopush.explain import draw_panel, draw_why_not, explain_batch
from protopush.explain.explanation import Explanation
from protopush.models.model_folder import Run

SIDE = 1600  # longest side of the copy that pictures are drawn from
NARROW = 820  # pixels of a screen below which pictures are made for a phone
TOP, PANEL = 10, 3  # classes told, and of these in the panel
WITH_WIDTH = "(value, other) => [value, window.innerWidth]"
WITH_WIDTH_2 = "(value, other, width) => [value, other, window.innerWidth]"


@dataclass(frozen=True)
class Looked:
    """What a page keeps of an image while somebody looks at it: (3, H, W) for the model, and a copy to draw on."""

    name: str
    pixels: Tensor
    view: View
    copy: Image.Image

    @classmethod
    def of(cls, run: Run, upload: Upload) -> Looked:
        """An upload, as the model sees it."""
        view = run.transform.view(upload.image.size)
        pixels = run.transform(upload.image)
        copy = upload.image.copy()
        copy.thumbnail((SIDE, SIDE))
        return cls(upload.name, pixels, view, copy)

    def explain(self, desk: Desk, run: Run, also: tuple[str, ...] = ()) -> Explanation:
        """All that speaks for the most probable classes, and for others that are asked for."""
        batch = self.pixels.unsqueeze(0).to(desk.device)
        top = min(TOP, len(run.class_names))
        return explain_batch(run.model, batch, [self.view], [self.name], run.class_names, top, also)[0]


def explain_tab(desk: Desk, limits: Limits) -> None:
    """Build the tab."""
    about = (
        f"Choose one image ({KINDS}; at most {limits.megabytes:g} MB and {limits.megapixels:g} megapixels). It stays "
        "on the computer that this app runs on, and is deleted when the app ends."
    )
    width = gr.Number(visible=False)
    kept = gr.State(None, time_to_live=3600)
    gr.HTML(message(about, "plain"))
    file = gr.File(label="Image", file_count="single", elem_id="pp-upload", height=150)
    said = gr.HTML(elem_id="pp-said")
    panel = gr.Image(
        visible=False, interactive=False, format="png", elem_id="pp-panel", buttons=["download", "fullscreen"],
        label="Panel: this part of the image looks like that part of a training image", show_label=False,
    )  # fmt: skip
    sums = gr.HTML(elem_id="pp-sums")
    with gr.Column(visible=False) as question:
        gr.HTML("<h3>Why not another class?</h3>")
        other = gr.Dropdown(label="Compare with", choices=[], elem_id="pp-other", filterable=False)
        answer = gr.HTML()
        beside = gr.Image(
            visible=False, interactive=False, format="png", elem_id="pp-why", buttons=["download", "fullscreen"],
            label="Why this class and not that one", show_label=False,
        )  # fmt: skip
    shown = [kept, said, panel, sums, question, other, beside, answer]

    def nothing(text: str = "") -> list[Any]:
        hidden = gr.Image(value=None, visible=False)
        return [None, text, hidden, "", gr.Column(visible=False), gr.Dropdown(choices=[], value=None), hidden, ""]

    def explain(path: str | None, pixels: float | None) -> list[Any]:
        if path is None:
            return nothing()
        try:
            upload, run = read_upload(path, limits), desk.run()
            looked = Looked.of(run, upload)
            explanation = looked.explain(desk, run)
        except InputError as error:
            return nothing(message(str(error), "bad"))
        some = replace(explanation, classes=explanation.classes[:PANEL])
        drawn = draw_panel(some, looked.copy, run.picture, narrow=_is_narrow(pixels))
        others = [name for name in run.class_names if name != explanation.predicted_name]
        return [
            looked,
            prediction(explanation, upload.note),
            gr.Image(value=drawn, visible=True),
            contributions(explanation.classes[0]),
            gr.Column(visible=bool(others)),
            gr.Dropdown(choices=others, value=None),
            gr.Image(value=None, visible=False),
            "",
        ]

    def why_not(looked: Looked | None, name: str | None, pixels: float | None) -> list[Any]:
        hidden = gr.Image(value=None, visible=False)
        if looked is None or name is None:
            return [hidden, message("Choose the image again; this one was forgotten.", "bad") if name else ""]
        try:
            run = desk.run()
            found = looked.explain(desk, run, (name,))
            drawn = draw_why_not(found, name, looked.copy, run.picture, narrow=_is_narrow(pixels))
        except InputError as error:  # since somebody changed the run, it may be the predicted class
            return [hidden, message(str(error), "bad")]
        return [gr.Image(value=drawn, visible=True), ""]

    quiet: dict[str, Any] = {"api_visibility": "private"}
    file.upload(explain, [file, width], shown, js=WITH_WIDTH, **quiet)
    file.clear(lambda: nothing(), None, shown, **quiet)
    other.input(why_not, [kept, other, width], [beside, answer], js=WITH_WIDTH_2, **quiet)


def _is_narrow(pixels: float | None) -> bool:
    return pixels is not None and pixels < NARROW
