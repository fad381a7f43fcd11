"""Explanations add up, and boxes lie where the evidence is."""

import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from helpers import cell_box, save_turned
from protopush.backbones.create import Features
from protopush.data.regions import Regions
from protopush.data.transforms import EvalTransform, Preprocessing, View
from protopush.errors import InputError
from protopush.explain import explain_image
from protopush.models.model import ProtoModel
from protopush.nn.head import HeadOptimal
from protopush.nn.prototypes import Anchor

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
        return Features(patches.mean(1, keepdim=True), patches, Regions.grid(GRID, tuple(images.shape[2:])))


def brightness_model(match="local", top_patches=1):
    """Class ``bright`` has one prototype that likes bright cells; class ``dark`` two, that like dark and grey ones."""
    head = HeadOptimal(2, 2, [2, 1], embed_dim=2, max_prototypes=3, match=match, top_patches=top_patches)
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


@pytest.mark.parametrize(("match", "top_patches"), [("local", 1), ("local", 3), ("local", 1000), ("global", 3)])
def test_every_logit_is_the_sum_of_what_is_shown(marked_file, match, top_patches):
    model = brightness_model(match, top_patches).eval()
    explanation = explain_image(model, marked_file, TRANSFORM, NAMES)
    expected = model(TRANSFORM(marked_picture()).unsqueeze(0)).logits[0].detach()
    assert sorted(len(evidence.matches) for evidence in explanation.classes) == [1, 2]  # unused slots are not shown
    for evidence in explanation.classes:
        assert evidence.logit == pytest.approx(float(expected[evidence.class_index]), abs=1e-6)
        assert evidence.contributions_sum + evidence.bias == pytest.approx(evidence.logit, abs=1e-5)
        for shown in evidence.matches:
            assert shown.contribution == pytest.approx(shown.similarity * shown.weight, abs=1e-5)
            counted = sorted(shown.values)[-top_patches:]
            assert shown.similarity == pytest.approx(sum(counted) / len(counted), abs=1e-6)
            assert shown.values[shown.cell] == pytest.approx(max(shown.values), abs=1e-6)
            boxes = [explanation.view.original_box(box) for box in shown.regions.boxes]
            assert len(shown.more) == len(counted) - 1
            assert sorted(shown.values[boxes.index(box)] for box in (shown.box, *shown.more)) == counted
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
    assert cell_box(View.of((300, 100), (200, 200)), 9, GRID) == MARKED


def test_the_box_is_the_marked_place_of_the_file(marked_file):
    explanation = explain_image(brightness_model(), marked_file, TRANSFORM, NAMES)
    found = bright_match(explanation)
    assert (found.cell, len(found.map), len(found.map[0]), found.box) == (9, *GRID, MARKED)
    assert explanation.image_size == (300, 100)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_the_box_of_a_turned_photo_is_in_upright_pixels(tmp_path, orientation):
    save_turned(marked_picture(), tmp_path / "turned.png", orientation)
    explanation = explain_image(brightness_model(), tmp_path / "turned.png", TRANSFORM, NAMES)
    assert explanation.image_size == (300, 100)
    assert bright_match(explanation).box == MARKED


def test_a_global_match_is_the_whole_view(marked_file):
    found = bright_match(explain_image(brightness_model("global"), marked_file, TRANSFORM, NAMES))
    assert (found.cell, found.map, found.box) == (0, ((found.similarity,),), (100, 0, 200, 100))


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
