"""Biases fitted for a prior: against a slow version, on fresh data, and in whole runs, with what may go wrong."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.optimize import minimize

from helpers import CLASSES, SMALL, make_images, refused
from protopush import open_run
from protopush.cli import main
from protopush.evaluation.evaluate import predict
from protopush.models.model import ProtoModel
from protopush.training.prior_fit import FOLDS, SPREADS, fit_prior, stratified_folds

COUNTS = [18, 26, 58, 6, 49, 432, 8]  # of the validation images of HAM10000
EVEN = [1 / 7] * 7
pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(counts: list[int], seed: int, spread: float = 1.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Log densities (N, C) of points of so many classes, each a normal distribution whose place the seed decides."""
    places = torch.randn(len(counts), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    generator = torch.Generator().manual_seed(seed + sum(counts))
    points = places[labels] + torch.randn(len(labels), 4, generator=generator, dtype=torch.float64)
    return -(points[:, None] - places).square().sum(-1) / 2, labels


def log_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each image, by a loop."""
    return np.array([math.log(sum(math.exp(v - row[c]) for v in row)) for row, c in zip(logits, labels, strict=True)])


def by_class(values: np.ndarray, labels: np.ndarray, prior: list[float]) -> float:
    """The mean of the classes' means, weighted by the prior, among the classes that occur."""
    there = sorted(set(labels.tolist()))
    total = sum(prior[c] for c in there)
    return sum(prior[c] / total * values[labels == c].mean() for c in there)


def slow_fit(scores: np.ndarray, labels: np.ndarray, prior: list[float], spread: float) -> tuple[float, np.ndarray]:
    """Scale and offsets without a gradient or an exact solver: Powell's method, from several starts."""
    there = sorted(set(labels.tolist()))
    counts = {c: int((labels == c).sum()) for c in there}
    total = sum(prior[c] for c in there)
    offsets = np.zeros(len(prior))
    if not spread or not len(labels):
        return 1.0, offsets

    def loss(free: np.ndarray) -> float:
        logits = np.exp(free[0]) * scores[:, there] + np.log(prior)[there] + free[1:]
        places = np.array([there.index(c) for c in labels])
        own = logits[np.arange(len(labels)), places]
        surprise = np.log(np.exp(logits - own[:, None]).sum(1))
        pull = sum((prior[c] / total) ** 2 / counts[c] for c in there) * free[0] ** 2
        pull += sum(prior[c] / total / counts[c] * offset**2 for c, offset in zip(there, free[1:], strict=True))
        return by_class(surprise, labels, prior) + pull / spread**2 / 2

    starts = (np.zeros(1 + len(there)), np.full(1 + len(there), 0.3))
    found = [minimize(loss, start, method="Powell", options={"xtol": 1e-7, "ftol": 1e-13}) for start in starts]
    best = min(found, key=lambda one: one.fun).x
    offsets[there] = best[1:]
    return float(np.exp(best[0])), offsets


def slow_cross_fit(
    evidence: np.ndarray, biases: np.ndarray, labels: np.ndarray, folds: np.ndarray, assumed: list[float],
    prior: list[float],
) -> tuple[float, np.ndarray, float, list[float]]:  # fmt: skip
    """What ``fit_prior`` promises, written out again."""
    start = biases - np.log(assumed)
    scores, there = evidence + start, sorted(set(labels.tolist()))
    surprises = []
    for spread in SPREADS:
        surprise = np.zeros(len(labels))
        for fold in range(FOLDS):
            rest = folds != fold
            scale, offsets = slow_fit(scores[rest], labels[rest], prior, spread)
            logits = scale * scores[~rest] + np.log(prior) + offsets
            places = np.array([there.index(c) for c in labels[~rest]], dtype=int)
            surprise[~rest] = log_losses(logits[:, there], places)
        surprises.append(surprise)
    losses = [by_class(surprise, labels, prior) for surprise in surprises]
    total = sum(prior[c] for c in there)
    chosen = None
    for spread, surprise in zip(SPREADS, surprises, strict=True):
        gap, variance = surprise - surprises[int(np.argmin(losses))], 0.0
        for c in there:
            some = gap[labels == c]
            variance += (prior[c] / total) ** 2 * (some.var(ddof=1) / len(some) if len(some) > 1 else some[0] ** 2)
        if chosen is None and by_class(gap, labels, prior) <= math.sqrt(variance):
            chosen = spread
    scale, offsets = slow_fit(scores, labels, prior, chosen)
    return scale, scale * start + np.log(prior) + offsets, chosen, losses


@pytest.mark.parametrize(("counts", "prior"), [
    ([12, 6, 40], [1 / 3] * 3),
    ([12, 6, 40], [0.02, 0.08, 0.9]),
    ([3, 1, 25], [0.3, 0.3, 0.4]),  # fewer than folds; a single one
    ([10, 0, 20], [0.2, 0.5, 0.3]),  # none
])  # fmt: skip
def test_the_fit_against_a_slow_version(counts, prior):
    evidence, labels = drawn(counts, 3)
    evidence, biases, assumed = 1.8 * evidence, torch.tensor([0.9, -0.4, 0.1]), [0.2, 0.2, 0.6]
    groups = [f"g{i // 2}" for i in range(len(labels))]
    found = fit_prior(evidence, biases, labels, groups, assumed, prior, seed=5)
    folds = stratified_folds(labels, groups, FOLDS, 5).numpy()
    wanted = slow_cross_fit(evidence.numpy(), biases.numpy().astype(float), labels.numpy(), folds, assumed, prior)
    assert found.log_loss == pytest.approx(wanted[3], abs=1e-4)
    assert found.spread == wanted[2]
    assert found.scale == pytest.approx(wanted[0], abs=1e-3)
    np.testing.assert_allclose(found.biases, wanted[1], atol=2e-3)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(len(labels)))


def test_six_images_are_not_overfitted():
    """On fresh data the fit is never much worse than none, and much better where biases are off."""
    worse, free, gained = [], [], []
    for seed in range(12):
        evidence, labels = drawn(COUNTS, seed)
        fresh, truth = drawn([1000] * 7, seed)

        def loss(scale, biases, fresh=fresh, truth=truth):
            logits = scale * fresh + biases
            return float(torch.nn.functional.cross_entropy(logits, truth))  # as many of each class

        right, off = torch.zeros(7), torch.randn(7, generator=torch.Generator().manual_seed(seed))
        for biases, gains in ((right, worse), (off, gained)):
            found = fit_prior(evidence, biases, labels, [None] * len(labels), EVEN, EVEN, seed)
            gains.append(loss(1.0, biases) - loss(found.scale, found.biases))
        weights = (1 / torch.tensor(COUNTS))[labels]
        logits = evidence.clone()
        moved = torch.zeros(7, dtype=torch.float64, requires_grad=True)  # nothing holds these
        optimizer = torch.optim.LBFGS([moved], max_iter=100, line_search_fn="strong_wolfe")

        def step(logits=logits, moved=moved, labels=labels, weights=weights, optimizer=optimizer):
            optimizer.zero_grad()
            value = (weights * torch.nn.functional.cross_entropy(logits + moved, labels, reduction="none")).mean()
            value.backward()
            return value

        optimizer.step(step)
        free.append(loss(1.0, right) - loss(1.0, moved.detach()))
    assert np.mean(worse) > -0.005
    assert min(worse) > -0.04
    assert np.mean(free) < 3 * np.mean(worse)  # what the pull is for
    assert min(free) < min(worse)
    assert min(gained) > 0
    assert np.mean(gained) > 0.1


def test_folds_keep_groups_whole_and_spread_the_classes():
    labels = torch.tensor([0] * 6 + [1] * 200 + [2] * 11 + [3])
    groups = ["a", "a", "b", "c", None, None, *(f"n{i // 3}" for i in range(200)), *[None] * 12]
    folds = stratified_folds(labels, groups, FOLDS, seed=1)
    assert set(folds.tolist()) == set(range(FOLDS))
    for group in {group for group in groups if group}:
        assert len({int(fold) for fold, one in zip(folds, groups, strict=True) if one == group}) == 1
    assert torch.bincount(folds[labels == 2], minlength=FOLDS).tolist().count(2) == 4
    assert len(set(folds[labels == 0].tolist())) == 5  # five groups
    assert int(torch.bincount(folds[labels == 1]).max()) <= 42
    assert torch.equal(folds, stratified_folds(labels, groups, FOLDS, seed=1))
    assert not torch.equal(folds, stratified_folds(labels, groups, FOLDS, seed=2))
    assert stratified_folds(torch.tensor([2]), [None], FOLDS, 0).tolist() == [0]


@pytest.mark.parametrize("labels", [[2], [1, 1, 1, 1], [0, 1], [0, 0, 0, 0, 0, 0, 1]])
def test_few_images_and_missing_classes_move_nothing_that_they_do_not_show(labels):
    evidence = torch.randn(len(labels), 4)
    biases, assumed, prior = torch.randn(4), [0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]
    found = fit_prior(evidence, biases, torch.tensor(labels), [None] * len(labels), assumed, prior)
    assert torch.isfinite(found.biases).all()
    assert torch.isfinite(found.probabilities).all()
    start = biases.double() - torch.tensor(assumed).double().log()
    moved = found.scale * start + torch.tensor(prior).double().log()
    absent = [c for c in range(4) if c not in labels]
    torch.testing.assert_close(found.biases[absent].double(), moved[absent], atol=1e-6, rtol=0)
    if len(set(labels)) == 1:  # there is nothing to tell apart
        assert found.spread == 0
        torch.testing.assert_close(found.biases.double(), moved, atol=1e-6, rtol=0)


# Whole runs.


def table(root: Path, train_images: tuple[int, ...], val: int) -> Path:
    """A manifest of unequal classes; without a validation image of the last one."""
    images, rows = make_images(root / "images", CLASSES, 21), []
    for name, train in zip(CLASSES, train_images, strict=True):
        held = (["val"] * val if name != "dog" else []) + ["test"] * 3
        for number, split in enumerate(["train"] * train + held):
            rows.append([f"{images.name}/{name}/{number:03d}.png", name, split])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label", "split"], *rows])
    return root / "manifest.csv"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """``plain``; ``stated``: the same with a prior; ``blind-plain``, ``blind-stated``: without validation images."""
    root = tmp_path_factory.mktemp("priors")
    (root / "few").mkdir()
    prior = ["--train.prior", "{bird: 0.2, cat: 0.7, dog: 0.1}"]
    for kind, data in (("", table(root, (12, 6, 3), 3)), ("blind-", table(root / "few", (4, 3, 2), 0))):
        for name, words in (("plain", []), ("stated", prior)):
            out = str(root / f"{kind}{name}")
            assert main(["train", "--data.path", str(data), "--out", out, *SMALL, *words]) == 0
    return root


def config_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def last_row(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_run_states_its_prior_and_by_default_is_as_it_was(runs):
    config, row = config_of(runs / "plain"), last_row(runs / "plain")
    assert config["prior"] == pytest.approx(dict.fromkeys(CLASSES, 1 / 3))
    assert config["train_shares"] == pytest.approx({"bird": 12 / 21, "cat": 6 / 21, "dog": 3 / 21})
    assert not {"prior", "prior_fit", "val_prior"} & set(row)
    stated = last_row(runs / "stated")
    assert config_of(runs / "stated")["prior"] == pytest.approx({"bird": 0.2, "cat": 0.7, "dog": 0.1})
    assert stated["val_refitted"] == row["val_refitted"]  # up to there it is the same run
    assert stated["prior"] == pytest.approx({"bird": 0.2, "cat": 0.7, "dog": 0.1})
    assert len(stated["prior_fit"]["log_loss"]) == len(SPREADS)
    assert stated["val_prior"]["n"] == 6
    assert yaml.safe_load((runs / "stated" / "config.yaml").read_text())["train"]["prior"]["cat"] == 0.7


def test_only_biases_and_temperature_differ_and_the_logit_is_the_sum_of_what_is_shown(runs, tmp_path, capsys):
    plain, stated = (open_run(runs / name, device="cpu") for name in ("plain", "stated"))
    fit, states = last_row(runs / "stated")["prior_fit"], [run.model.state_dict() for run in (plain, stated)]
    other = {name for name, value in states[0].items() if not torch.equal(value, states[1][name])}
    assert "head.bias" in other
    assert other <= {"head.bias", "head.log_temperature"}
    torch.testing.assert_close(stated.head.weights(), plain.head.weights() / fit["temperature"])
    start = plain.head.bias.double() + math.log(3)
    moved = start / fit["temperature"] + torch.tensor([0.2, 0.7, 0.1]).double().log()
    assert float((stated.head.bias - moved)[2].abs().detach()) < 1e-5  # no validation image of this class
    (told,) = stated.explain([runs / "images" / "cat" / "010.png"], tmp_path)
    for evidence in told["classes"]:
        total = sum(match["contribution"] for match in evidence["matches"]) + evidence["bias"]
        assert total == pytest.approx(evidence["logit"], abs=1e-4)
    assert main(["verify", str(runs / "stated")]) == 0


def test_without_validation_images_the_biases_are_moved_and_nothing_is_fitted(runs):
    plain, stated = (open_run(runs / f"blind-{name}", device="cpu").model for name in ("plain", "stated"))
    row = last_row(runs / "blind-stated")
    assert row["prior"]["cat"] == pytest.approx(0.7)
    assert not {"prior_fit", "val_prior"} & set(row)
    assert stated.prior == pytest.approx([0.2, 0.7, 0.1])
    moved = plain.head.bias + torch.tensor([0.2, 0.7, 0.1]).mul(3).log()  # from a balanced prior
    torch.testing.assert_close(stated.head.bias, moved)
    other = {k for k, value in plain.state_dict().items() if not torch.equal(value, stated.state_dict()[k])}
    assert other == {"head.bias"}


def test_evaluate_changes_the_prior_for_its_numbers_alone(runs, capsys):
    before = {file: file.read_bytes() for file in (runs / "plain").rglob("*") if file.is_file()}

    def evaluated(*words: str) -> dict:
        capsys.readouterr()
        assert main(["evaluate", str(runs / "plain"), "--json", "--device", "cpu", *words]) == 0
        return json.loads(capsys.readouterr().out)

    plain, same = evaluated(), evaluated("--prior", "balanced")
    assert same.pop("prior") == pytest.approx(dict.fromkeys(CLASSES, 1 / 3))
    assert same["confusion"] == plain["confusion"]
    assert same["ece"] == pytest.approx(plain["ece"], abs=1e-6)
    data = evaluated("--prior", "data")
    assert data["prior"] == pytest.approx({"bird": 12 / 21, "cat": 6 / 21, "dog": 3 / 21})
    certain = evaluated("--prior", "{bird: 0.0001, cat: 0.9998, dog: 0.0001}")
    called = [sum(column) for column in zip(*certain["confusion"], strict=True)]
    assert called[1] >= [sum(column) for column in zip(*plain["confusion"], strict=True)][1]
    logits_run = open_run(runs / "plain", device="cpu")
    with torch.no_grad():  # by hand: the biases of a copy
        logits_run.head.bias.add_(torch.tensor([12 / 21, 6 / 21, 3 / 21]).mul(3).log())
    by_hand = logits_run.evaluate()
    assert by_hand["confusion"] == data["confusion"]
    assert by_hand["ece"] == pytest.approx(data["ece"], abs=1e-5)
    capsys.readouterr()
    assert main(["evaluate", str(runs / "plain"), "--prior", "data"]) == 0
    assert "shares assumed" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in (runs / "plain").rglob("*") if file.is_file()} == before


def test_the_prior_travels(runs, tmp_path):
    run, prior = open_run(runs / "stated", device="cpu"), pytest.approx([0.2, 0.7, 0.1])
    assert run.model.prior == prior
    run.model.save_pretrained(tmp_path / "hub")
    again = ProtoModel.from_pretrained(tmp_path / "hub")
    assert again.prior == prior
    assert again.train_shares == pytest.approx([12 / 21, 6 / 21, 3 / 21])
    card = (tmp_path / "hub" / "README.md").read_text()
    assert r"these shares of the classes: bird 20 %, cat 70 %, dog 10 %" in card
    run.push(tmp_path / "pushed", momentum=0.5)
    assert config_of(tmp_path / "pushed")["prior"] == pytest.approx(config_of(runs / "stated")["prior"])
    page, _ = run.report(tmp_path / "report.html", resamples=0, faithfulness=0, audit=False)
    text = page.read_text()
    assert "The probabilities assume these shares of the classes: bird 20 %, cat 70 %, dog 10 %." in text
    assert "then fitted to a prior: balanced accuracy" in text
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    done = run.export(tmp_path / "model.onnx")
    told = {entry.key: entry.value for entry in onnx.load(done.file).metadata_props}
    assert json.loads(told["prior"]) == prior


def test_a_run_of_before_says_nothing_of_its_prior(runs, tmp_path, capsys):
    run = Path(shutil.copytree(runs / "plain", tmp_path / "old"))
    config = config_of(run)
    for name in ("prior", "train_shares"):
        del config[name]
    (run / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(run)]) == 0
    assert open_run(run, device="cpu").model.prior is None
    assert "has no prior" in refused(capsys, "evaluate", run, "--prior", "balanced")
    assert "not on record" in refused(capsys, "evaluate", run, "--prior", "data")
    (run / "config.json").write_text(json.dumps(config | {"prior": "balanced"}))  # as the message advises
    assert main(["evaluate", str(run), "--prior", "{bird: 0.5, cat: 0.25, dog: 0.25}"]) == 0
    (run / "config.json").write_text(json.dumps(config | {"prior": {"bird": 1.0}}))
    assert "prior in" in refused(capsys, "evaluate", run)


@pytest.mark.parametrize(("prior", "message"), [
    ("balancd", "did you mean 'balanced'"),
    ("{bird: 0.5, cat: 0.4, dog: 0.3}", "sum to 1.2"),
    ("{bird: 0.5, cat: 0.5, dog: 0}", "gives dog a share of 0"),
    ("{bird: 0.5, cat: 0.25, cow: 0.25}", "unknown class 'cow'"),
    ("{bird: .nan, cat: 0.5, dog: 0.5}", "gives bird a share of nan"),
    ("{bird: 0.5, cat: 0.5}", "no share for: dog"),
    ("{bird: much, cat: 0.5, dog: 0.5}", "share"),
    ("[0.2, 0.3, 0.5]", "expected balanced, data or {class: share}"),
    ("", "expected balanced, data or {class: share}"),
])  # fmt: skip
def test_what_is_no_prior_ends_in_one_line(runs, tmp_path, capsys, prior, message):
    assert message in refused(capsys, "evaluate", runs / "plain", "--prior", prior)
    words = ("train", "--data.path", runs / "manifest.csv", "--out", tmp_path / "run", *SMALL, "--train.prior", prior)
    assert message in refused(capsys, *words, logged=True)
    assert not (tmp_path / "run").exists()


def test_the_refit_keeps_to_the_prior_that_training_assumed(runs, tmp_path):
    """With adjusted logits training aims at a balanced prior; a refit on the images as they come would undo that."""
    words = ["train", "--data.path", str(runs / "manifest.csv"), *SMALL, "--loss.class_weights", "none"]
    words += ["--loss.logit_adjustment", "1", "--train.refit_steps", "3000", "--train.refit_decay", "0"]
    assert main([*words, "--out", str(tmp_path / "adjusted")]) == 0
    assert config_of(tmp_path / "adjusted")["prior"] == pytest.approx(dict.fromkeys(CLASSES, 1 / 3))
    run = open_run(tmp_path / "adjusted", device="cpu")
    found = predict(run.model, run._loader(run._images("train")[0]), "cpu")
    means = torch.stack([found.probabilities[found.labels == c].mean(0) for c in range(3)]).mean(0)
    # Where biases are free, the mean probability of a class is its share of the prior (Saerens et al.).
    torch.testing.assert_close(means, torch.full((3,), 1 / 3), atol=0.01, rtol=0)
