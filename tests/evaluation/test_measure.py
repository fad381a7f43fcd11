"""What is measured of a run is what a slow look at it finds; runs side by side; wrong words."""

import json
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import SMALL
from protopush.cli import main
from protopush.data.manifest import DataConfig
from protopush.evaluation.measure import measure, observe
from protopush.runs import progress
from protopush.runs.run import open_run, open_split
from protopush.testing import ProceduralParts


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A local and a global run over drawn spots with masks."""
    root = tmp_path_factory.mktemp("spots")
    manifest = ProceduralParts(60, num_classes=2, size=(48, 64)).write(root / "spots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(root / "cache"))
        for match in ("local", "global"):
            words = ["train", "--data.path", str(manifest), "--out", str(root / match), "--model.match", match]
            assert main([*words, *SMALL]) == 0
    return root


@pytest.fixture(scope="module", params=["local", "global"])
def opened(runs, request):
    run = open_run(runs / request.param)
    dataset, catalog = open_split(DataConfig(**run.data), "test", run.class_names, run.transform, run.folder)
    return run, dataset, {sample.name: sample for sample in catalog.samples}


def test_one_look_sees_what_each_image_shows(opened):
    run, dataset, _ = opened
    seen = observe(run, dataset)
    for i in range(len(dataset)):
        with torch.no_grad():
            features = run.model.backbone(dataset[i][0][None])
            output = run.head(features)
            cells = run.head.embed(features.patches)[0]
        predicted = int(output.logits.argmax())
        terms = output.contributions[0, predicted]
        torch.testing.assert_close(seen.probabilities[i], output.logits[0].softmax(dim=0), atol=1e-5, rtol=1e-4)
        assert int(seen.labels[i]) == dataset.samples[i].label
        prototypes = output.prototypes[predicted]
        maps = (prototypes @ cells.T).view(len(prototypes), *features.regions.raster)
        drawn = maps - maps.amin(dim=(1, 2), keepdim=True)
        torch.testing.assert_close(seen.maps[i], drawn[int(seen.strongest[i])], atol=1e-5, rtol=1e-4)
        assert float(terms[int(seen.strongest[i])]) == pytest.approx(float(terms.max()), abs=1e-5)
        evidence = sum(float(w) * m for w, m in zip(run.head.weights().detach()[predicted], drawn, strict=True))
        torch.testing.assert_close(seen.evidence[i], evidence, atol=1e-4, rtol=1e-4)


def test_localisation_is_that_of_a_slow_look(opened):
    run, dataset, known = opened
    numbers = measure(run, dataset, "test", known, resamples=0, faithfulness=0).numbers
    found, seen = numbers["localization"], observe(run, dataset)
    shares, hits, areas, peaks = [], [], [], []
    for i, sample in enumerate(dataset.samples):
        mask = np.asarray(run.transform.visible(Image.open(sample.mask).convert("RGB")))[..., 0] > 127
        values = seen.maps[i].double().numpy()
        height, width = mask.shape
        large = values.repeat(height // values.shape[0], 0).repeat(width // values.shape[1], 1)
        shares.append(large[mask].sum() / large.sum())
        row, column = np.unravel_index(values.argmax(), values.shape)
        y, x = (2 * row + 1) * height // (2 * values.shape[0]), (2 * column + 1) * width // (2 * values.shape[1])
        hits.append(mask[y, x])
        high, wide = height // values.shape[0], width // values.shape[1]
        peaks.append(mask[row * high : (row + 1) * high, column * wide : (column + 1) * wide].mean())
        areas.append(mask.mean())
    assert found["images"] == len(dataset)
    assert found["activation_on_mask"] == pytest.approx(np.nanmean(shares), abs=1e-6)
    assert found["pointing_game"] == pytest.approx(np.mean(hits))
    assert found["peaks_on_mask"] == pytest.approx(np.mean(peaks))
    assert found["mask_area"] == pytest.approx(np.mean(areas))
    on = []
    for anchor in run.head.proto_manager.anchors:
        x0, y0, x1, y1 = anchor.box
        on.append(np.asarray(Image.open(known[anchor.sample_id].mask))[y0:y1, x0:x1].astype(bool).mean())
    assert found["anchors"] == len(on)
    assert found["anchors_on_mask"] == pytest.approx(np.mean(on))
    assert numbers["faithfulness"] is None
    assert "intervals" not in numbers["classification"]
    if run.head.match == "global":  # its anchors are whole pictures
        assert found["anchors_on_mask"] == pytest.approx(found["anchors_mask_area"], abs=0.02)


def test_faithfulness_is_between_its_bounds_and_repeatable(opened):
    run, dataset, known = opened
    first, again = (
        measure(run, dataset, "test", known, resamples=20, faithfulness=5).numbers["faithfulness"] for _ in range(2)
    )
    assert first == again
    assert first["images"] == 5
    for name in ("insertion", "deletion", "random_insertion", "location_change"):
        assert 0 <= first[name] <= 1
    assert first["relevance_ordering"] == pytest.approx(first["insertion"] - first["random_insertion"], abs=1e-6)
    assert first["activation_change"] >= 0
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_without_masks_there_is_no_localisation(home):
    run = open_run(home / "run")
    dataset, _ = open_split(DataConfig(**run.data), "test", run.class_names, run.transform, run.folder)
    assert measure(run, dataset, "test", {}, faithfulness=0, resamples=0).numbers["localization"] is None


def test_compare_tells_the_same_as_a_table_and_as_json(runs, capsys):
    words = ["compare", str(runs / "local"), str(runs / "global"), "--resamples", "50", "--faithfulness", "3"]
    words += ["--data.num_workers", "0"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["match"] for run in found["runs"]] == ["local", "global"]
    assert {row["group"] for row in found["rows"]} == {"accuracy", "prototypes", "localisation", "faithfulness"}
    for row in found["rows"]:
        for value, interval in zip(row["values"], row["intervals"], strict=True):
            assert (
                interval is None or interval[0] - 1e-9 <= value <= interval[1] + 1e-9 or row["metric"].endswith("error")
            )
    assert main(words) == 0
    table = capsys.readouterr().out
    for row in found["rows"]:
        (line,) = [line for line in table.splitlines() if line.strip().startswith(row["metric"].strip() + "  ")]
        for value in row["values"]:
            assert (str(value) if isinstance(value, int) else f"{value:.3f}") in line


def test_every_long_stage_of_a_report_says_how_far_it_is(runs, tmp_path, capsys, monkeypatch):
    """Without a terminal: lines of each stage, so often that the last one of each is near its end."""
    monkeypatch.setattr(progress, "EVERY", 0.01)
    counts, lines = {}, progress._lines

    @contextmanager
    def counted(what, total):
        with lines(what, total) as advance:
            counts[what] = [total, 0]

            def count(steps):
                counts[what][1] += steps
                advance(steps)

            yield count
            time.sleep(0.05)  # the last line is due

    monkeypatch.setattr(progress, "_lines", counted)
    words = ["report", runs / "local", "--out", tmp_path / "report.html", "--faithfulness", "3", "--resamples", "10"]
    capsys.readouterr()
    assert main([str(word) for word in (*words, "--data.num_workers", "0", "--device", "cpu")]) == 0
    log = capsys.readouterr().err.splitlines()
    stages = [
        "Checking images", "Reading images", "Metrics", "Masks", "Faithfulness", "Neighbours of the prototypes",
        "Checking anchors", "Auditing images", "Replacing what lies outside the boxes", "Writing the page",
    ]  # fmt: skip
    assert list(counts) == stages
    for stage in stages:
        total, done = counts[stage]
        assert 0 < total == done, stage
        assert f"{stage}: {total} of {total}" in log


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["compare", "local"], "one run alone cannot be compared"),
        (["compare", "local", "nowhere"], "no such run folder"),
        (["compare", "local", "global", "--resamples", "-1"], "expected 0 or more"),
        (["report", "nowhere"], "no such run folder"),
        (["report", "local", "--out", "."], "is a folder; expected the HTML file"),
        (["report", "local", "--against", "nowhere"], "no such run folder"),
        (["report", "local", "--data.split", "tset"], "no image in split 'tset'"),
    ],
)
def test_wrong_words_get_one_line(runs, words, problem, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    before = sorted(runs.rglob("*"))
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("protopush: error")]
    assert problem in line
    assert sorted(runs.rglob("*")) == before
