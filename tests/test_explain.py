"""Explanations add up, boxes lie where the evidence is, and the pictures show just that."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import nn
from torch.nn import functional as F

from protopush.backbones import Features
from protopush.data.preprocessing import Preprocessing
from protopush.data.transforms import EvalTransform, View
from protopush.errors import InputError
from protopush.explain import ClassEvidence, Explanation, Match, draw_gallery, draw_panel, explain_image
from protopush.explain.drawing import COLOURS, draw_box, fit_text
from protopush.head_optimal import HeadOptimal
from protopush.model import ProtoModel
from protopush.prototypes import Anchor

GRID = (4, 4)
# A 300x100 picture is resized to 600x200 and cropped to its middle: columns 100 to 200, in cells of 25x25 pixels.
TRANSFORM = EvalTransform(Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), size=(200, 200), interpolation="bilinear"))
MARKED = (125, 50, 150, 75)  # row 2, column 1
NAMES = ["dark", "bright"]


class Brightness(nn.Module):
    """Each cell's feature is (brightness, darkness) of its pixels."""

    preprocessing = TRANSFORM.preprocessing
    channels = 2

    def forward(self, images):
        mean = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), GRID).flatten(2).transpose(1, 2)
        patches = torch.cat([mean, 1 - mean], dim=-1)
        return Features(patches.mean(1, keepdim=True), patches, GRID)


def brightness_model(match="local"):
    """Class ``bright`` has one prototype that likes bright cells; class ``dark`` two, that like dark and grey ones."""
    head = HeadOptimal(2, 2, [2, 1], embed_dim=2, max_prototypes=3, match=match)
    head.proj = nn.Identity()
    with torch.no_grad():
        head.proto_manager.prototypes[:2] = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        head.proto_manager.prototypes[3] = torch.tensor([1.0, 0.0])
        head.connections.copy_(torch.tensor([[0.3, -0.2, 0.1], [0.7, 0.2, 0.4]]))
        head.bias.copy_(torch.tensor([0.25, -0.5]))
    return ProtoModel(Brightness(), head)


def marked_picture(size=(300, 100), box=MARKED):
    picture = Image.new("RGB", size, (20, 20, 20))
    picture.paste((250, 250, 250), box)
    return picture


@pytest.fixture
def marked_file(tmp_path):
    path = tmp_path / "marked.png"
    marked_picture().save(path)
    return path


def bright_match(explanation):
    (evidence,) = [some for some in explanation.classes if some.class_name == "bright"]
    return evidence.matches[0]


@pytest.mark.parametrize("match", ["local", "global"])
def test_every_logit_is_the_sum_of_what_is_shown(marked_file, match):
    model = brightness_model(match).eval()
    explanation = explain_image(model, marked_file, TRANSFORM, NAMES)
    expected = model(TRANSFORM(marked_picture()).unsqueeze(0)).logits[0].detach()
    assert sorted(len(evidence.matches) for evidence in explanation.classes) == [1, 2]  # unused slots are not shown
    for evidence in explanation.classes:
        assert evidence.logit == pytest.approx(float(expected[evidence.class_index]), abs=1e-6)
        assert evidence.contributions_sum + evidence.bias == pytest.approx(evidence.logit, abs=1e-5)
        for shown in evidence.matches:
            assert shown.contribution == pytest.approx(shown.similarity * shown.weight, abs=1e-5)
        contributions = [shown.contribution for shown in evidence.matches]
        assert contributions == sorted(contributions, reverse=True)
    assert {e.bias for e in explanation.classes} == {0.25, -0.5}
    probabilities = [evidence.probability for evidence in explanation.classes]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    assert explanation.predicted == int(expected.argmax())
    assert explanation.predicted_name == NAMES[explanation.predicted]
    assert explanation.probability == probabilities[0] > 0.5


def test_view_brings_a_cell_back_to_the_original_pixels():
    assert View.of((300, 100), (200, 200)).cell_box(9, GRID) == MARKED


def test_the_box_is_the_marked_place_of_the_file(marked_file):
    explanation = explain_image(brightness_model(), marked_file, TRANSFORM, NAMES)
    found = bright_match(explanation)
    assert (found.cell, found.grid, found.box) == (9, GRID, MARKED)
    assert explanation.image_size == (300, 100)


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)],
)
def test_the_box_of_a_turned_photo_is_in_upright_pixels(tmp_path, orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    marked_picture().transpose(undo).save(tmp_path / "turned.png", exif=exif)
    explanation = explain_image(brightness_model(), tmp_path / "turned.png", TRANSFORM, NAMES)
    assert explanation.image_size == (300, 100)
    assert bright_match(explanation).box == MARKED


def test_a_global_match_is_the_whole_view(marked_file):
    found = bright_match(explain_image(brightness_model("global"), marked_file, TRANSFORM, NAMES))
    assert (found.cell, found.grid, found.box) == (0, (1, 1), (100, 0, 200, 100))


def test_json_round_trip(marked_file):
    model = brightness_model()
    anchor = Anchor("x", 3, GRID, 0.5, 1.0, file="a/x.png", box=(0, 0, 25, 25), image_size=(100, 100))
    model.head.proto_manager.anchors[3] = anchor
    explanation = explain_image(model, marked_file, TRANSFORM, NAMES)
    plain = explanation.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    for values, evidence in zip(plain["classes"], explanation.classes, strict=True):
        assert values["contributions_sum"] + values["bias"] == pytest.approx(values["logit"], abs=1e-5)
        assert len(values["matches"]) == len(evidence.matches)
    (bright,) = [values["matches"][0] for values in plain["classes"] if values["class_name"] == "bright"]
    assert bright["box"] == list(MARKED)
    assert Anchor.from_dict(bright["anchor"]) == anchor
    assert {
        m["anchor"] for values in plain["classes"] if values["class_name"] == "dark" for m in values["matches"]
    } == {None}


def test_explaining_leaves_the_model_as_it_was(marked_file):
    model = brightness_model()
    model.head.proj = nn.Dropout(0.9)
    in_eval_mode = explain_image(model.eval(), marked_file, TRANSFORM, NAMES)
    model.train()
    model.backbone.eval()
    state = torch.get_rng_state()
    assert explain_image(model, marked_file, TRANSFORM, NAMES) == in_eval_mode
    assert model.head.training
    assert not model.backbone.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_top_classes(marked_file):
    model = brightness_model()
    assert len(explain_image(model, marked_file, TRANSFORM, NAMES, top_classes=1).classes) == 1
    assert len(explain_image(model, marked_file, TRANSFORM, NAMES, top_classes=9).classes) == 2
    with pytest.raises(InputError, match="top_classes is 0"):
        explain_image(model, marked_file, TRANSFORM, NAMES, top_classes=0)


def test_bad_input_is_named(marked_file, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    model = brightness_model()
    with pytest.raises(InputError, match=r"bad\.png"):
        explain_image(model, tmp_path / "bad.png", TRANSFORM, NAMES)
    with pytest.raises(InputError, match="3 class names for a model of 2"):
        explain_image(model, marked_file, TRANSFORM, ["a", "b", "c"])
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"logits of .*marked\.png.*finite"):
        explain_image(model, marked_file, TRANSFORM, NAMES)


# Pictures.

GREY = (90, 91, 92)
PINK = (250, 0, 250)


def an_anchor(**changes):
    values = {"file": "a/x.png", "box": (50, 50, 100, 100), "image_size": (400, 200), **changes}
    return Anchor("x", 3, GRID, 0.5, 0.9, **values)


def an_explanation(matches, name="mel", size=(300, 100), file="folder/picture.png", others=1):
    total = sum(match.contribution for match in matches)
    names = [name, *(f"other {i}" for i in range(others))]
    classes = [ClassEvidence(i, text, 0.8 / (i + 1) ** 2, total + 0.1, 0.1, matches) for i, text in enumerate(names)]
    return Explanation(file, size, 0, name, 0.8, classes)


def a_match(k=0, box=(100, 25, 125, 50), anchor=None, contribution=1.0):
    return Match(0, k, contribution / 2, 2.0, contribution, 5, GRID, box, anchor)


def where(picture, colour):
    """(x0, y0, x1, y1) around all pixels of exactly this colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=-1))
    assert len(rows), f"no pixel of colour {colour}"
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def count(picture, colour):
    return int((np.asarray(picture) == colour).all(axis=-1).sum())


def test_draw_box_frames_the_box_and_leaves_its_inside():
    picture = Image.new("RGB", (60, 40), GREY)
    draw_box(picture, (20, 10, 40, 30), COLOURS[0], line=3)
    assert where(picture, COLOURS[0]) == (20, 10, 40, 30)
    assert count(picture, COLOURS[0]) == 20 * 20 - 14 * 14
    assert count(picture.crop((23, 13, 37, 27)), GREY) == 14 * 14
    assert {picture.getpixel((19, 20)), picture.getpixel((40, 20))} == {(255, 255, 255)}
    assert {picture.getpixel((18, 20)), picture.getpixel((41, 20))} == {(0, 0, 0)}


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (59, 39, 60, 40), (10.2, 10.2, 10.4, 10.4), (0, 0, 60, 40)])
def test_draw_box_of_any_size(box):
    picture = Image.new("RGB", (60, 40), GREY)
    draw_box(picture, box, COLOURS[0])
    assert count(picture, COLOURS[0]) >= 1


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (900, 300), (40, 40)])
def test_panel_draws_the_box_at_its_place_and_keeps_the_aspect(size):
    width, height = size
    box = (width // 2, height // 2, width // 2 + width // 5, height // 2 + height // 5)
    panel = draw_panel(an_explanation([a_match(box=box)], size=size), Image.new("RGB", size, GREY), lambda c, k: None)
    large = panel.crop((0, 0, 600, panel.height))
    x0, y0, x1, y1 = where(large, GREY)
    assert (x1 - x0) / (y1 - y0) == pytest.approx(width / height, rel=0.02)
    inside = large.crop((x0, y0, x1, y1))
    scale = (x1 - x0) / width
    # the number beside the box has its colour too: take the row and the column through the box's middle
    pixels = (np.asarray(inside) == COLOURS[0]).all(axis=-1)
    across = np.flatnonzero(pixels[round((box[1] + box[3]) / 2 * scale)])
    down = np.flatnonzero(pixels[:, round(box[2] * scale) - 2])
    assert [across.min(), across.max() + 1] == pytest.approx([box[0] * scale, box[2] * scale], abs=1.5)
    assert [down.min(), down.max() + 1] == pytest.approx([box[1] * scale, box[3] * scale], abs=1.5)


def test_a_smaller_copy_of_the_image_gives_the_same_panel():
    matches = [a_match(anchor=an_anchor())]
    panels = [
        draw_panel(an_explanation(matches), Image.new("RGB", size, GREY), lambda c, k: None)
        for size in ((300, 100), (150, 50))
    ]
    assert panels[0].tobytes() == panels[1].tobytes()


def marked_source(size):
    """The anchor's part in pink, in a picture of another size than the anchor's original (400x200)."""
    source = Image.new("RGB", size, (0, 90, 0))
    scale = size[0] / 400
    source.paste(PINK, tuple(round(edge * scale) for edge in (50, 50, 100, 100)))
    return source


@pytest.mark.parametrize("size", [(400, 200), (200, 100), (800, 400)])
def test_the_anchor_is_cropped_from_a_picture_of_any_size(size):
    panel = draw_panel(
        an_explanation([a_match(anchor=an_anchor())]),
        Image.new("RGB", (300, 100), GREY),
        lambda c, k: marked_source(size),
    )
    # the part is half as wide as its tile of 168 pixels: 84 with 3 of frame on each side; the whole picture is 216 wide
    pink = count(panel, PINK)
    assert 74 * 74 <= pink <= 78 * 78 + 27 * 27
    gallery = draw_gallery(["mel"], lambda c, k: an_anchor(), lambda c, k: marked_source(size), 1, 1)
    assert 58 * 58 <= count(gallery, PINK) <= 62 * 62 + 20 * 20


def test_the_picture_is_asked_for_by_class_and_slot():
    asked = []
    matches = [a_match(k=4, anchor=an_anchor()), a_match(k=1, anchor=an_anchor()), a_match(k=2)]
    draw_panel(an_explanation(matches), Image.new("RGB", (300, 100)), lambda c, k: asked.append((c, k)))
    assert asked == [(0, 4), (0, 1)]  # the third has no anchor, hence no picture


def test_matches_of_one_cell_all_stay_visible():
    matches = [a_match(k=k, contribution=5.0 - k) for k in range(5)]
    panel = draw_panel(an_explanation(matches), Image.new("RGB", (300, 100), GREY), lambda c, k: None)
    large = panel.crop(tuple(map(int, where(panel.crop((0, 0, 600, panel.height)), GREY))))
    badge = 24 * 24
    middle = large.crop((0, round(37.5 / 100 * large.height), large.width, round(37.5 / 100 * large.height) + 1))
    for colour in COLOURS[:5]:
        assert count(large, colour) > badge * 0.6, "a number is hidden"
        assert count(middle, colour) >= 2, "a frame is hidden"


def test_rows_and_footer_grow_with_the_prototypes():
    matches = [a_match(k=k, anchor=an_anchor(), contribution=3.0 - k / 2) for k in range(10)]
    image = Image.new("RGB", (300, 100), GREY)
    heights = [draw_panel(an_explanation(matches), image, lambda c, k: None, rows=rows).height for rows in (5, 10, 20)]
    assert heights[0] < heights[1] == heights[2]
    with pytest.raises(InputError, match="rows is 0"):
        draw_panel(an_explanation(matches), image, lambda c, k: None, rows=0)


@pytest.mark.parametrize(
    "anchor",
    [
        None,
        an_anchor(),
        an_anchor(box=None, image_size=None),
        an_anchor(file=None, verified=False),
        an_anchor(file="x" * 300 + ".png"),
    ],
)
@pytest.mark.parametrize("mode", [None, "RGB", "L", "RGBA"])
def test_panel_and_gallery_stand_whatever_is_missing(anchor, mode):
    name = "a class name\nthat never ends " * 20
    matches = [a_match(anchor=anchor, contribution=c) for c in (1.0, 0.0, -2.0)]
    explanation = an_explanation(matches, name=name, file="y" * 300 + ".png", others=0)

    def source_of(c, k):
        return Image.new(mode, (40, 20)) if mode else None

    panel = draw_panel(explanation, Image.new("L", (300, 100), 90), source_of)
    gallery = draw_gallery([name, "b"], lambda c, k: anchor if c else None, source_of, 2, 1)
    for picture in (panel, gallery):
        assert picture.mode == "RGB"
        assert 600 < picture.width <= 2400
        assert 200 < picture.height < 2400
        pixels = np.asarray(picture)
        assert (pixels[:, :24] == 255).all(), "something overflows the left margin"
        assert (pixels[:, -24:] == 255).all(), "something overflows the right margin"


def test_a_model_of_one_slot_and_one_class():
    explanation = an_explanation([a_match(contribution=0.0)], others=0)
    assert count(draw_panel(explanation, Image.new("RGB", (300, 100), GREY), lambda c, k: None), COLOURS[0]) > 100
    gallery = draw_gallery(["only"], lambda c, k: an_anchor(), lambda c, k: None, 1, 1)
    assert gallery.height < 500


def test_gallery_of_seven_classes_and_ten_prototypes():
    asked = []

    def source_of(c, k):
        asked.append((c, k))
        return marked_source((400, 200))

    def draw(per_class):
        return draw_gallery([f"class {c}" for c in range(7)], lambda c, k: an_anchor(), source_of, 7, 10, per_class)

    few, every = draw(5), draw(10)
    assert asked == [(c, k) for c in range(7) for k in range(5)] + [(c, k) for c in range(7) for k in range(10)]
    assert few.width == every.width <= 2400
    assert few.height < every.height <= 4000
    assert all(count(every, colour) > 1000 for colour in COLOURS)  # one for each class
    with pytest.raises(InputError, match="per_class is 0"):
        draw(0)


def test_gallery_passes_over_empty_slots():
    gallery = draw_gallery(
        ["a", "b"],
        lambda c, k: an_anchor() if (c, k) in {(0, 1), (1, 3)} else None,
        lambda c, k: marked_source((400, 200)),
        2,
        4,
    )
    assert count(gallery, PINK) <= 2 * (62 * 62 + 20 * 20)


@pytest.mark.parametrize("text", ["w" * 500, "i" * 500, "Nävus größer " * 40, "one two\nthree\tfour " * 30])
@pytest.mark.parametrize("width", [30, 100, 333])
def test_fit_text_never_overflows(text, width):
    fitted = fit_text(text, 16, width)
    ascii_font = ImageFont.load_default(16)
    assert "..." in fitted
    assert "\n" not in fitted
    if text.isascii():
        assert width * 0.6 - 12 < ascii_font.getlength(fitted) <= width


def test_fit_text_keeps_short_text_and_both_ends_of_long():
    assert fit_text("ISIC_0024306.jpg", 16, 300) == "ISIC_0024306.jpg"
    fitted = fit_text("lesion_" * 20 + "0024306.jpg", 16, 200)
    assert fitted.startswith("lesion_")
    assert fitted.endswith("4306.jpg")


@pytest.mark.parametrize("name", ["Nävus", "дерма", "ναevus"])
def test_letters_beyond_ascii_are_drawn(name):
    """Pillow's own font would draw every one of them as the same empty box."""
    beyond = [letter for letter in name if not letter.isascii()]

    def drawn(letter):
        return draw_gallery([letter * 6], lambda c, k: None, lambda c, k: None, 1, 1).tobytes()

    assert all(drawn(letter) != drawn("\uffff") for letter in beyond)
