"""The benchmark runs and writes what it should; how fast anything is, is none of a test's business."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import protopush
from helpers import make_images, make_masked_images

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {"images": 2, "pixels": 64, "maps": 40, "few": 4, "many": 8, "rank-images": 4, "windowed": 4, "repetitions": 1}


@pytest.fixture
def push_speed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cabrnet_push
    import push_speed

    monkeypatch.setattr(cabrnet_push, "why_not", lambda: "not installed")
    return push_speed


def run(push_speed: ModuleType, out: Path, *cases: str) -> dict[str, Any]:
    sizes = [word for name, number in TINY.items() for word in (f"--{name}", str(number))]
    assert push_speed.main(["--cases", *cases, *sizes, "--out", str(out)]) == 0
    return json.loads(out.read_text())


def check(comparison: dict[str, Any]) -> None:
    assert comparison["timings"].keys() == comparison["medians"].keys()
    for timings in comparison["timings"].values():
        assert len(timings) == TINY["repetitions"]
        assert all(value > 0 for value in timings)
    for result in comparison["results"]:
        assert result.keys() == {"name", "unit", "values", "median", "goal", "reached"}
        assert (result["goal"] is None) == (result["reached"] is None)


def test_the_push_alone_and_beside_another(push_speed, tmp_path, capsys):
    found = run(push_speed, tmp_path / "new" / "speed.json", "b", "e")
    assert {"date", "torch", "threads", "cpus", "sizes", "cases"} <= found.keys()
    assert found["cases"].keys() == {"b", "e"}
    for case in found["cases"].values():
        assert {comparison["setting"].split(",")[0] for comparison in case["comparisons"]} == {"7x10", "200x10"}
        for comparison in case["comparisons"]:
            check(comparison)
    assert found["cases"]["b"]["comparisons"][0]["results"][0]["goal"] == "<= 0.05"
    beside = found["cases"]["e"]["comparisons"][0]
    assert beside["remarks"] == {"cabrnet": "not installed"}
    assert beside["timings"].keys() == {"protopush", "straightforward", "loader"}
    assert "not installed" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["speed.json"]  # no draft is left


def test_the_straightforward_push_does_the_same(push_speed):
    import straightforward
    import torch
    from ready_maps import ReadyMaps, labelled, training_loader
    from torch.nn import functional as F

    dataset = labelled(F.normalize(torch.randn(20, 9, 8), dim=-1), 3)
    ours, theirs = ReadyMaps(3, 4, 8), ReadyMaps(3, 4, 8)
    theirs.load_state_dict(ours.state_dict())
    protopush.push_prototypes(ours, training_loader(dataset), "cpu", momentum=0.9)
    straightforward.push(theirs, training_loader(dataset), momentum=0.9)
    moved = F.normalize(theirs.head.proto_manager.prototypes, dim=-1)
    assert torch.allclose(moved, ours.head.proto_manager.prototypes, atol=1e-6)


@pytest.mark.slow
def test_every_other_case(push_speed, tmp_path):
    found = run(push_speed, tmp_path / "speed.json", "a", "c", "d", "f")
    assert found["cases"].keys() == {"a", "c", "d", "f"}
    for case in found["cases"].values():
        for comparison in case["comparisons"]:
            check(comparison)


@pytest.mark.parametrize(
    "words",
    [["--cases", "z"], ["--images", "0"], ["--repetitions", "many"], ["--out", "."], ["--out", "{file}/a.json"]],
)
def test_bad_arguments_are_one_line_and_exit_code_2(push_speed, tmp_path, capsys, words):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit) as stopped:
        push_speed.main([word.format(file=file) for word in words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words[0] in said


def test_help_tells_every_case(push_speed, capsys):
    with pytest.raises(SystemExit):
        push_speed.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {case}  " in said for case in "abcdef")


def test_live_fine_tuning_and_explanations(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import explain_speed
    import live_speed

    words = ["--batch", "2", "--pixels", "96", "--repetitions", "1", "--out", str(tmp_path / "speed.json")]
    assert live_speed.main(["--backbones", "test_resnet", *words]) == 0
    (found,) = json.loads((tmp_path / "speed.json").read_text())["comparisons"]
    check(found)
    assert found["setting"] == "test_resnet, batches of 2, 70 crops, processors"
    took, ratio = found["medians"], found["results"][-2]
    seconds = [took[f"{side}: step"] + took[f"{side}: refresh"] / 100 for side in ("crops", "stored")]
    assert (ratio["name"], ratio["median"]) == ("crops / stored", seconds[0] / seconds[1])
    assert explain_speed.main(words) == 0
    whole, windows, _ = json.loads((tmp_path / "speed.json").read_text())["comparisons"]
    check(whole)
    check(windows)
    assert windows["setting"] == "batch of 2, 96 pixels, 4 windows"
    assert windows["results"][0]["goal"] == "<= 1.1"


@pytest.mark.slow
def test_a_service_beside_the_bare_forward_pass(monkeypatch, home, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve_speed

    words = ["--requests", "32", "--repetitions", "1", "--out", str(tmp_path / "speed.json")]
    assert serve_speed.main([str(home / "run"), str(home / "images"), *words]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())["comparisons"]
    for one, clients in zip(found[::2], ("1 client", "8 clients", "32 clients"), strict=True):
        check(one)
        assert one["setting"] == f"test_resnet, {clients}"
        assert [result["unit"] for result in one["results"]] == ["/s", "", "ms", "ms"]
    for one in found[1::2]:
        check(one)


def test_the_docs_show_what_a_service_costs():
    found = json.loads((BENCHMARKS / "results" / "serve_speed.json").read_text())["comparisons"]
    text = (BENCHMARKS.parent / "docs" / "serve.md").read_text(encoding="utf-8")
    for clock, processors, clients in zip(found[::2], found[1::2], (1, 8, 32), strict=True):
        second, _, middle, most = (result["median"] for result in clock["results"])
        (ratio,) = processors["results"]
        row = f"| {clients} | {second:.1f} | {middle:.0f} ms | {most:.0f} ms | {ratio['median']:.2f} |"
        assert row in text


def test_the_docs_show_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import anchoring

    rows = json.loads((BENCHMARKS / "results" / "anchoring.json").read_text())["rows"]
    assert {row["arm"] for row in rows} == set(anchoring.ARMS)
    docs = (BENCHMARKS.parent / "docs" / "anchoring.md").read_text(encoding="utf-8")
    assert anchoring.markdown(anchoring.summary(rows)) in docs


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    make_images(tmp_path / "images", ["bird", "cat", "dog"], 10)
    lines = [
        f"images/{name}/{i:03d}.png,{name},{split}"
        for name in ("bird", "cat", "dog")
        for i, split in enumerate(["train"] * 6 + ["val"] * 2 + ["test"] * 2)
    ]
    path = tmp_path / "manifest.csv"
    path.write_text("\n".join(["image,label,split", *lines]))
    return path


@pytest.mark.slow
def test_accuracy_runs_every_arm_once(manifest, tmp_path, capsys):
    import accuracy

    out, arms = tmp_path / "accuracy.json", [*accuracy.ARMS, *accuracy.MORE]
    words = [str(manifest), "--seeds", "0", "--positive", "cat", "--backbone", "test_resnet", "--epochs", "5",
             "--head-epochs", "5", "--tuned-epochs", "1", "--image-size", "96", "--workers", "0", "--batch-size", "8",
             "--rates", "1e-3", "3e-2", "--runs", str(tmp_path / "runs"), "--out", str(out),
             "--set", "model.pretrained=false", "model.num_prototypes=2", "trainer.device=cpu"]  # fmt: skip
    assert accuracy.main([*words, "--arms", accuracy.MORE[0]]) == 2
    assert "run that arm first" in capsys.readouterr().err
    assert accuracy.main([*words, "--throughput", "1", "--arms", *arms]) == 0
    found = json.loads(out.read_text())
    assert [row["arm"] for row in found["rows"]] == arms
    for row in found["rows"]:
        assert (row["epochs"] >= 5) if row["arm"] in accuracy.MORE else row["epochs"] == 5 + ("tuned" in row["arm"])
        assert all(0 <= row["test"][name] <= 1 for name in accuracy.METRICS)
        assert row["val_score"] == row["val_scores"][f"{row['rate']:g}"] == max(row["val_scores"].values())
        assert row["val_scores"].keys() == {"0.001", "0.03"}
        assert 0 < row["seconds"] < row["seconds_of_all"]
    assert found["throughput"]["median"] > 0
    assert found["setup"]["image_size"] == 96
    table = capsys.readouterr().out
    later = len(arms) - arms.index("fine-tuned, real patches")
    assert table.count("| fine-tuned, real patches |") == later + 1  # as it grew, and at the end
    before = out.read_bytes()
    assert accuracy.main([*words, "--arms", *arms]) == 0  # all is there: nothing is run again
    assert out.read_bytes() == before


def test_the_black_box_on_windows_sees_the_mean_of_its_windows(manifest):
    import accuracy
    import torch
    from black_box import without_prototypes

    from protopush.training.setup import prepare

    options = accuracy._options([str(manifest), "--workers", "0", "--backbone", "test_resnet", "--set",
                                 "model.pretrained=false", "model.image_size=96", "trainer.device=cpu"])  # fmt: skip
    found = {}
    for arm in ("frozen, black box on windows", "frozen, real patches"):
        job = prepare(accuracy.config_of(arm, 0, 1e-3, options))
        found[arm] = (without_prototypes(job) if "black box" in arm else job).model.eval()
    black, ours = found.values()
    images = torch.randn(2, 3, 96, 96)
    assert black.backbone.regions == ours.backbone.regions
    crops = [images[..., y : y + 64, x : x + 64] for y in (0, 32) for x in (0, 32)]
    inner = ours.backbone.model.backbone
    mean = sum(inner(crop).pooled[:, 0] for crop in crops) / 4
    expected = mean @ black.head.linear.weight.T + black.head.linear.bias
    assert torch.allclose(black(images).logits, expected, atol=1e-5)


@pytest.mark.parametrize("levels", [2, 7, 10**6])
@pytest.mark.parametrize("specificity", [0.0, 0.29, 0.9, 1.0])
def test_sensitivity_at_a_specificity_is_that_of_the_best_threshold(monkeypatch, levels, specificity):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accuracy
    import torch

    generator = torch.Generator().manual_seed(levels)
    for count in (2, 11, 100):
        scores = torch.randint(0, levels, (count,), generator=generator) / levels  # with few levels: many ties
        positive = torch.rand(count, generator=generator) < 0.3
        positive[:2] = torch.tensor([True, False])
        thresholds = [*scores.tolist(), 2.0]
        best = max(
            float((scores[positive] >= threshold).float().mean())
            for threshold in thresholds
            if float((scores[~positive] < threshold).double().mean()) >= specificity - 1e-9
        )
        assert accuracy.sensitivity_at(specificity, scores, positive) == best


def test_the_docs_show_the_accuracies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import accuracy

    rows = json.loads((BENCHMARKS / "results" / "accuracy.json").read_text())["rows"]
    assert {row["arm"] for row in rows} >= {arm for arm in accuracy.ARMS if arm.startswith("frozen")}
    docs = (BENCHMARKS.parent / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert accuracy.markdown(accuracy.summary(rows)) in docs
    for name in ("accuracy_last_layers", "accuracy_places", "accuracy_with_image"):
        rows = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["rows"]
        assert accuracy.markdown(accuracy.summary(rows)) in docs


def test_starts_are_what_they_say(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import numpy as np
    import starts
    import torch

    random = np.random.default_rng(0)
    centres = np.eye(6)[:4]
    patches = np.concatenate([centre + 0.05 * random.normal(size=(30 * 2**i, 6)) for i, centre in enumerate(centres)])
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    owner = np.repeat(range(4), [30, 60, 120, 240])
    expected = np.stack([patches[owner == i].mean(axis=0) for i in range(4)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = starts.k_means(patches, 4, np.random.default_rng(2))  # a seed that begins with one patch of each cluster
    assert np.allclose(found[np.argmax(found @ centres.T, axis=0)], expected, atol=1e-9)
    assert np.array_equal(found, starts.k_means(patches, 4, np.random.default_rng(2)))
    assert np.allclose(np.linalg.norm(starts.k_means(np.repeat(patches[:1], 9, axis=0), 4, random), axis=1), 1)
    for few in (patches[:3], patches[:0]):
        assert starts.k_means(few, 4, random) is few
    around = starts.class_means(patches, 500, np.random.default_rng(2))
    mean = patches.mean(axis=0) / np.linalg.norm(patches.mean(axis=0))
    assert np.allclose(np.linalg.norm(around, axis=1), 1)
    assert around.mean(axis=0) / np.linalg.norm(around.mean(axis=0)) @ mean > 0.999
    assert 0.9 < (around @ mean).min() < (around @ mean).max() <= 1
    assert len(starts.class_means(patches[:0], 4, random)) == 0
    assert torch.allclose(
        starts.frequency_bias(torch.tensor([1, 5, 0])), -torch.tensor([1 / 2, 5 / 2, 1 / 2]).log(), atol=1e-6
    )
    array = np.arange(5 * 3 * 2, dtype=np.float16).reshape(5, 3, 2)
    chosen, items = np.array([False, True, False, True, True]), [(torch.from_numpy(patches), 0) for patches in array]
    rows = {tuple(row) for row in array[chosen].reshape(-1, 2).tolist()}
    drawn = [tuple(row) for row in starts.some_patches(items, chosen, 7, random).tolist()]
    assert len(set(drawn)) == 7
    assert set(drawn) < rows
    assert {tuple(row) for row in starts.some_patches(items, chosen, 100, random).tolist()} == rows
    assert starts.some_patches(items, ~(chosen | True), 7, random).shape == (0, 2)


@pytest.mark.slow
def test_starts_and_diversity_are_measured(manifest, tmp_path, monkeypatch, capsys):
    import diversity
    import starts

    from protopush.training.config import ModelConfig

    tiny = partial(ModelConfig, pretrained=False, num_prototypes=2, image_size=96)
    monkeypatch.setattr(starts, "ModelConfig", tiny)
    monkeypatch.setattr(diversity, "ModelConfig", tiny)
    words = [str(manifest), "--backbone", "test_resnet", "--seeds", "0", "1"]
    out = tmp_path / "starts.json"
    arguments = [*words, "--rare", "cat", "--epochs", "6", "--out", str(out)]
    assert starts.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["seed"], row["arm"]) for row in rows] == [(seed, arm) for seed in (0, 1) for arm in starts.ARMS]
    between = {row["arm"]: row["nearest_classes"] for row in rows if row["seed"] == 0}
    assert between["class mean"] == between["class mean, frequency bias"] < between["random"]
    before = out.read_bytes()
    assert starts.main(arguments) == 0
    assert out.read_bytes() == before
    out = tmp_path / "diversity.json"
    assert diversity.main([*words, "--epochs", "6", "--start", "3", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 2 * 3
    found = {(row["patches"], row["arm"]): row for row in rows if row["seed"] == 1}
    for patches in diversity.PATCHES:
        first, second = (found[patches, arm]["before the first push"] for arm in ("local", "global push"))
        assert first == second  # until then the same model
        assert found[patches, "local"]["after it"] != found[patches, "global push"]["after it"]
    for row in rows:
        assert row["before the first push"]["images"] is None
        assert 1 <= row["hard push at the end"]["images"] <= 2
        assert all(0 <= row[when]["distance"] <= 2 and 1 <= row[when]["rank"] <= 2 for when in diversity.WHEN)
    assert capsys.readouterr().out.count("| last map | global |") == 1


def test_diversity_measures_what_it_says(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import diversity
    import torch

    from protopush.nn.prototypes import PrototypeManager

    vectors = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    energy = torch.linalg.eigvalsh((vectors @ vectors.T).double()).clamp(min=0).sqrt()
    shares = energy / energy.sum()
    assert diversity.effective_rank(vectors) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-6)
    assert diversity.effective_rank(torch.eye(8)[:5]) == pytest.approx(5)
    assert diversity.effective_rank(vectors[:1].expand(5, 8)) == pytest.approx(1, abs=1e-5)
    manager = PrototypeManager(2, [3, 1], 8, 4)
    found = diversity.measured(manager)
    own = manager.unit()[0, :3].detach()
    pairs = [float((own[i] - own[j]).norm()) for i in range(3) for j in range(i)]
    assert found["distance"] == pytest.approx(sum(pairs) / 3, rel=1e-6)
    assert found["rank"] == pytest.approx((diversity.effective_rank(own) + 1) / 2)
    assert (found["alike"], found["images"]) == (0, None)


@pytest.mark.parametrize("name", ["diversity", "starts"])
def test_the_push_page_shows_what_was_measured(monkeypatch, name):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["rows"]
    docs = (BENCHMARKS.parent / "docs" / "push.md").read_text(encoding="utf-8")
    assert importlib.import_module(name).markdown(rows) in docs


@pytest.mark.slow
def test_the_docs_show_the_receptive_fields(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import receptive_fields

    rows = json.loads((BENCHMARKS / "results" / "receptive_fields.json").read_text())["rows"]
    assert {(row["backbone"], row["stage"]) for row in rows} == {
        (name, stage) for name, stages in receptive_fields.STAGES.items() for stage in stages
    }
    docs = (BENCHMARKS.parent / "docs" / "local.md").read_text(encoding="utf-8")
    assert receptive_fields.markdown(rows) in docs
    # One backbone's shallow stages again, from the start; what is there isn't measured a second time.
    monkeypatch.setattr(receptive_fields, "STAGES", {"resnet18": (1, 2)})
    out = tmp_path / "fields.json"
    assert receptive_fields.main(["--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == [
        row for row in rows if row["backbone"] == "resnet18" and row["stage"] in (1, 2)
    ]
    before = out.read_bytes()
    monkeypatch.setattr(receptive_fields, "measured", None)
    assert receptive_fields.main(["--out", str(out)]) == 0
    assert out.read_bytes() == before
    assert capsys.readouterr().out.count("| resnet18 | 2 | 128 | 28 x 28 |") == 2


@pytest.mark.slow
def test_priors_are_measured_on_shifted_tests(home, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import priors

    words = [str(home / "run"), "--images", "3", "--logits", str(tmp_path / "logits.pt")]
    printed = []
    for _ in range(2):  # the second time from the file
        capsys.readouterr()
        assert priors.main(words) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    rows = {row[1]: row[2:-1] for line in printed[0].splitlines()[3:] for row in [[*map(str.strip, line.split("|"))]]}
    assert [*rows] == [
        "validation", "test", "test, classes drawn alike", "some of the test", "the same, JPEG of quality 30",
        "the same, a colour cast", "test, biases off by chance: mean of 20", "test, biases off by chance: lowest of 20",
    ]  # fmt: skip
    run = protopush.open_run(home / "run", device="cpu")
    for cell, prior in zip(rows["test"][1:], ("data", "balanced"), strict=False):
        found = run.evaluate(prior=prior)
        assert cell == f"{found['balanced_accuracy']:.3f} / {found['accuracy']:.3f}"
    with pytest.raises(SystemExit) as stopped:
        priors.main([str(tmp_path / "none")])
    assert stopped.value.code == 2


@pytest.mark.slow  # three processes of their own
def test_last_layers_on_stored_outputs_are_measured_beside_all(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    import last_layers

    out = tmp_path / "last_layers.json"
    words = [str(make_masked_images(tmp_path)), "--images", "8", "--repetitions", "1", "--windows", "48",
             "--out", str(out), "--set", "model.backbone=resnet18", "model.pretrained=false",
             "model.image_size=96"]  # fmt: skip
    assert last_layers.main(words) == 0
    found = json.loads(out.read_text())
    assert [*found["median"]] == ["all", "last, images", "last, stored"]
    for row in found["median"].values():
        assert row["seconds"] > 0
        assert row["megabytes"] > 100
    assert capsys.readouterr().out.count("s an epoch") == 3


def test_the_quick_form_finds_what_has_moved(monkeypatch, tmp_path, capsys):
    """Fewer images make another setting of the same figure; only ratios can move."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("bench")
    for name, (script, _, files) in bench.QUICK.items():
        assert (BENCHMARKS / script).is_file()
        committed = [json.loads((BENCHMARKS / "results" / file).read_text()) for file in files]
        text = json.dumps(committed[0]).replace("batch of 32, ", "batch of 4, ").replace("500 images, ", "64 images, ")
        pairs = bench.held_against(json.loads(text.replace("70 crops, ", "9 crops, ")), committed)
        assert len(pairs) == len(list(bench.figures(committed[0])))
        assert len({before.key for before, _ in pairs}) == len(pairs)
        assert not any(bench.has_moved(before, now) for before, now in pairs)
        ratios = [pair for pair in pairs if not pair[0].unit]
        assert ratios, name
        for factor, moved in ((1.09, False), (1.11, True), (0.89, True)):
            assert all(bench.has_moved(old, now._replace(median=factor * now.median)) == moved for old, now in ratios)

    asked = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command)
        out = Path(command[-1])
        if "explain" in out.name:
            found = json.loads((BENCHMARKS / "results" / "explain_speed.json").read_text())
            found["comparisons"][0]["results"][0]["median"] *= 2
            out.write_text(json.dumps(found))
        return SimpleNamespace(returncode=1, stderr="push_speed.py: no such case")

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert bench.main(["explain", "push"]) == 1
    said = capsys.readouterr().out
    assert "Moved by more than 10%:\nexplain: batch of 32, 224 pixels: explained / forward: 1.03 -> 2.06" in said
    assert "failed: push: push_speed.py: no such case" in said
    with pytest.raises(SystemExit, match="2"):
        bench.main(["serve"])
    assert "serve needs images; give --data MANIFEST" in capsys.readouterr().err


def test_the_docs_show_what_decisions_and_shortlists_are():
    docs, results = BENCHMARKS.parent / "docs", BENCHMARKS / "results"
    speed, push = (docs.joinpath(page).read_text(encoding="utf-8") for page in ("speed.md", "push.md"))
    decisions = json.loads((results / "decision_speed.json").read_text())["comparisons"]
    for name in decisions[0]["medians"]:
        cells = [f"{one['medians'][name]:.2f}" for one in decisions]
        assert f"| {name} | {' | '.join(cells)} |" in speed
    found = json.loads((results / "shortlist.json").read_text())
    for kind, words in (("off", "momentum 0.9"), ("live", "live")):
        for number, row in enumerate(found[kind], start=2):
            cells = [f"{row[name]['cost']:.0%}, {row[name]['missed']:.0%}" for name in ("largest", "95th percentile")]
            assert f"| {words} | {number} | {row['same anchors']:.0%} | {' | '.join(cells)} |" in push
