"""The classifier's numbers against loops, and their intervals against data sets that are really drawn."""

import json
import time
import tracemalloc

import numpy as np
import pytest
import torch

from protopush.errors import InputError
from protopush.metrics import intervals as intervals_module
from protopush.metrics.classification import classification_metrics
from protopush.metrics.intervals import bootstrap_intervals, resample_weights

OVERALL = ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece"]
PER_CLASS = ["sensitivity", "specificity", "auroc"]


def a_case(seed, count=None, classes=4):
    """Scores with ties, labels in which a class is sometimes missing."""
    random = np.random.default_rng(seed)
    count = count or int(random.integers(5, 60))
    labels = random.choice(classes - 1 if seed % 2 else classes, size=count)
    scores = random.dirichlet(np.ones(classes), size=count)
    scores[np.arange(count), labels] += random.choice([0, 0.5])
    scores = (scores / scores.sum(1, keepdims=True)).round(2 if seed % 3 else 1)
    return torch.from_numpy(scores).float(), torch.from_numpy(labels), list("abcdefgh"[:classes])


def by_hand(scores, labels, names):
    """All of the metrics in loops over samples."""
    samples = [(row, row.index(max(row)), truth) for row, truth in zip(scores.tolist(), labels.tolist(), strict=True)]
    classes = range(len(names))
    confusion = [[sum((t, p) == (i, j) for _, p, t in samples) for j in classes] for i in classes]
    per_class = {}
    for c, name in enumerate(names):
        hit = sum(t == p == c for _, p, t in samples)
        miss = sum(t == c != p for _, p, t in samples)
        alarm = sum(t != c == p for _, p, t in samples)
        calm = sum(t != c != p for _, p, t in samples)
        own = [row[c] for row, _, t in samples if t == c]
        rest = [row[c] for row, _, t in samples if t != c]
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in own for b in rest]
        per_class[name] = {
            "n": hit + miss,
            "sensitivity": hit / (hit + miss) if hit + miss else None,
            "specificity": calm / (calm + alarm) if calm + alarm else None,
            "precision": hit / (hit + alarm) if hit + alarm else None,
            "f1": 2 * hit / (2 * hit + miss + alarm) if hit + miss + alarm else None,
            "auroc": sum(pairs) / len(pairs) if pairs else None,
        }
    gaps = dict.fromkeys(range(16), 0.0)
    for row, p, t in samples:
        gaps[max(b for b in range(16) if max(row) >= np.float32(b / 15))] += (p == t) - max(row)
    return {
        "n": len(samples),
        "accuracy": sum(t == p for _, p, t in samples) / len(samples),
        "balanced_accuracy": mean(row["sensitivity"] for row in per_class.values()),
        "macro_f1": mean(row["f1"] for row in per_class.values()),
        "auroc": mean(row["auroc"] for row in per_class.values()),
        "ece": sum(map(abs, gaps.values())) / len(samples),
        "confusion": confusion,
        "per_class": per_class,
    }


def mean(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def intervals_of(found):
    """All intervals of a result under flat names."""
    flat = {name: found["intervals"][name] for name in OVERALL}
    for name, row in found["per_class"].items():
        flat |= {f"{name}/{key}": row["intervals"][key] for key in PER_CLASS}
    return flat


def values_of(found):
    flat = {name: found[name] for name in OVERALL}
    for name, row in found["per_class"].items():
        flat |= {f"{name}/{key}": row[key] for key in PER_CLASS}
    return flat


def drawn_by_force(scores, labels, names, resamples, seed, groups=None):
    """The intervals from the metrics of data sets with repeated rows, one after another."""
    columns = {}
    for weights in np.concatenate(list(resample_weights(len(labels), resamples, seed, groups))):
        rows = np.repeat(np.arange(len(labels)), weights.astype(int))
        for name, value in values_of(classification_metrics(scores[rows], labels[rows], names)).items():
            columns.setdefault(name, []).extend([value] if value is not None else [])
    return {name: np.percentile(known, [2.5, 97.5]) if known else None for name, known in columns.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, interval in expected.items():
        assert found[name] == (None if interval is None else pytest.approx(list(interval), abs=1e-6)), name


@pytest.mark.parametrize("seed", range(12))
def test_metrics_are_those_of_loops(seed):
    scores, labels, names = a_case(seed)
    found, expected = classification_metrics(scores, labels, names), by_hand(scores, labels, names)
    assert list(found) == list(expected)
    per_class = found.pop("per_class")
    for name, row in expected.pop("per_class").items():
        assert per_class[name] == {k: None if v is None else pytest.approx(v, abs=1e-6) for k, v in row.items()}
    assert found == {k: v if k == "confusion" else pytest.approx(v, abs=1e-6) for k, v in expected.items()}


@pytest.mark.parametrize("seed", range(6))
def test_intervals_are_those_of_data_sets_really_drawn(seed):
    scores, labels, names = a_case(seed, count=9 + seed)  # so few that classes go missing in resamples
    groups = [f"lesion {i // 3}" if i % 4 else None for i in range(len(labels))] if seed >= 3 else None
    found = classification_metrics(scores, labels, names, groups, resamples=60, seed=seed)
    assert_same(intervals_of(found), drawn_by_force(scores, labels, names, 60, seed, groups))


def test_a_toy_case():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.6, 0.4]])
    found = classification_metrics(scores, torch.tensor([0, 1, 1, 0]), ["a", "b"], resamples=500)
    assert found["confusion"] == [[2, 0], [1, 1]]
    row = found["per_class"]["b"]
    assert (row["sensitivity"], row["specificity"], row["precision"]) == (0.5, 1.0, 1.0)
    assert row["auroc"] == 3.5 / 4  # 0.8 beats both; 0.4 beats 0.1 and ties with 0.4
    assert found["per_class"]["a"]["auroc"] == 3.5 / 4
    assert row["intervals"]["specificity"] == [1.0, 1.0]
    assert row["intervals"]["sensitivity"] == [0.0, 1.0]
    assert found["ece"] == pytest.approx((0.1 + 0.2 + abs(1 - 1.2)) / 4)


def test_best_chance_and_worst():
    labels = torch.arange(3000) % 3
    right = torch.eye(3)[labels]
    best = classification_metrics(right, labels, list("abc"), resamples=50)
    assert {best[name] for name in OVERALL} == {0.0, 1.0}
    assert all(low == high for low, high in intervals_of(best).values())
    worst = classification_metrics(torch.eye(3)[(labels + 1) % 3], labels, list("abc"))
    assert [worst[name] for name in ("accuracy", "balanced_accuracy", "macro_f1", "ece")] == [0, 0, 0, 1]
    chance = classification_metrics(torch.rand(3000, 3).softmax(1), labels, list("abc"), resamples=200)
    assert chance["intervals"]["auroc"][0] < 0.5 < chance["intervals"]["auroc"][1]
    tied = classification_metrics(torch.full((30, 3), 1 / 3), labels[:30], list("abc"), resamples=50)
    assert tied["auroc"] == 0.5
    assert tied["intervals"]["auroc"] == [0.5, 0.5]


def test_scores_need_only_rank():
    scores, labels, names = a_case(1, count=40)
    plain = classification_metrics(scores, labels, names, resamples=50)
    large = classification_metrics(scores * 1000 - 200, labels, names, resamples=50)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc"):
        assert large[name] == plain[name]
        assert large["intervals"][name] == plain["intervals"][name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_precision(dtype):
    scores, labels, names = a_case(2, count=30)
    scores = scores.to(dtype).requires_grad_()
    found = classification_metrics(scores, labels, names, resamples=20)
    assert_same(
        {"auroc": found["intervals"]["auroc"]},
        {"auroc": drawn_by_force(scores.detach(), labels, names, 20, 0)["auroc"]},
    )


@pytest.mark.parametrize("labels", [[1], [1, 1, 1]])
def test_one_sample_and_a_single_class(labels):
    scores = torch.tensor([[0.3, 0.6, 0.1]]).expand(len(labels), 3)
    found = classification_metrics(scores, torch.tensor(labels), list("abc"), resamples=30)
    assert [name for name in OVERALL if found[name] is None] == ["auroc"]
    assert [name for name in OVERALL if found["intervals"][name] is None] == ["auroc"]
    assert found["intervals"]["accuracy"] == [1.0, 1.0]
    missing, own = found["per_class"]["a"], found["per_class"]["b"]
    assert (missing["n"], missing["sensitivity"], missing["specificity"]) == (0, None, 1.0)
    assert (own["n"], own["sensitivity"], own["specificity"]) == (len(labels), 1.0, None)
    assert missing["intervals"] == {"sensitivity": None, "specificity": [1.0, 1.0], "auroc": None}
    json.dumps(found, allow_nan=False)


def test_the_same_each_time_whatever_else_draws():
    scores, labels, names = a_case(3, count=50)
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = classification_metrics(scores, labels, names, resamples=40)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    torch.rand(3)
    assert classification_metrics(scores, labels, names, resamples=40) == first
    assert classification_metrics(scores, labels, names, resamples=40, seed=1) != first
    assert "intervals" not in classification_metrics(scores, labels, names)
    json.dumps(first, allow_nan=False)


def test_blocks_change_nothing(monkeypatch):
    scores, labels, names = a_case(4, count=31)
    groups = [str(i % 7) for i in range(31)]
    whole = classification_metrics(scores, labels, names, groups, resamples=50)
    monkeypatch.setattr(intervals_module, "BLOCK", 100)  # three resamples at a time
    assert max(map(len, resample_weights(31, 50))) == 3
    assert_same(intervals_of(classification_metrics(scores, labels, names, groups, 50)), intervals_of(whole))
    monkeypatch.setattr(intervals_module, "BLOCK", 1)  # fewer than there are samples
    assert [len(block) for block in resample_weights(31, 4)] == [1, 1, 1, 1]


def test_quick_and_lean():
    scores, labels = torch.rand(20_000, 7).softmax(1), torch.randint(7, (20_000,))
    names = list("abcdefg")
    started = time.process_time()
    classification_metrics(scores[:1200], labels[:1200], names, resamples=1000)
    assert time.process_time() - started < 3
    peaks = []
    for resamples in (52, 208):  # one block of 2**20 weights, and four
        tracemalloc.start()
        classification_metrics(scores, labels, names, resamples=resamples)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 120e6


def test_weights_are_draws_of_whole_groups():
    groups = ["a", None, "b", "a", None, "c", "b", "a"]
    weights = np.concatenate(list(resample_weights(8, 4000, 0, groups)))
    assert (weights[:, [0, 0, 2]] == weights[:, [3, 7, 6]]).all()
    units = weights[:, [0, 1, 2, 4, 5]]
    assert (units.sum(axis=1) == 5).all()  # as many groups as there are
    assert units.mean(axis=0) == pytest.approx(np.ones(5), abs=0.06)
    assert units.var(axis=0) == pytest.approx(np.full(5, 0.8), abs=0.08)  # binomial: 5 * 1/5 * 4/5
    alone = list(resample_weights(8, 5, 3, [None] * 8))
    assert np.array_equal(alone, list(resample_weights(8, 5, 3)))


def coverage(simulate, truth, groups, level=0.95):
    """In how many of 200 simulated data sets the interval of their mean holds the truth."""
    inside = 0
    for seed in range(200):
        values = simulate(np.random.default_rng(seed))
        mean_of = lambda weights, v=values: (weights @ v / weights.sum(axis=1))[:, None]  # noqa: E731
        ((low, high),) = bootstrap_intervals(mean_of, len(values), 400, seed, groups, level)
        inside += low <= truth <= high
    return inside / 200


def test_intervals_cover_as_often_as_they_say():
    binomial = lambda random: (random.random(120) < 0.8).astype(float)  # noqa: E731
    assert 0.88 <= coverage(binomial, 0.8, None) <= 0.99
    assert 0.4 <= coverage(binomial, 0.8, None, level=0.5) <= 0.6
    # Four images of a lesion that are right or wrong together: samples drawn one by one make it look too sure.
    lesions = lambda random: np.repeat((random.random(60) < 0.7).astype(float), 4)  # noqa: E731
    assert 0.88 <= coverage(lesions, 0.7, [str(i // 4) for i in range(240)]) <= 0.99
    assert coverage(lesions, 0.7, None) < 0.8


def test_accuracy_of_a_known_binomial_is_covered():
    inside = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        labels = torch.from_numpy(random.integers(0, 2, 80))
        right = torch.from_numpy(random.random(80) < 0.75)
        scores = torch.eye(2)[torch.where(right, labels, 1 - labels)]
        low, high = classification_metrics(scores, labels, ["a", "b"], resamples=200)["intervals"]["accuracy"]
        inside += low <= 0.75 <= high
    assert 0.88 <= inside / 200 <= 0.99


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probabilities": torch.tensor([[0.5, 0.5], [float("nan"), 0.5], [float("nan")] * 2])}, "2 of 3 rows"),
        ({"probabilities": torch.rand(3, 3)}, r"probabilities are \(3, 3\); expected \(3, 2\)"),
        ({"probabilities": torch.rand(2, 2)}, r"probabilities are \(2, 2\); expected \(3, 2\)"),
        ({"labels": torch.tensor([0, 2, 1])}, "labels are 0 to 2; expected 0 to 1"),
        ({"labels": torch.tensor([0, -1, 1])}, "labels are -1 to 1"),
        ({"probabilities": torch.rand(0, 2), "labels": torch.tensor([], dtype=torch.long)}, "0 samples of 2 classes"),
        ({"class_names": ["a"]}, "3 samples of 1 classes"),
        ({"groups": ["a"], "resamples": 2}, "1 groups for 3 samples"),
        ({"resamples": -1}, "-1 resamples"),
    ],
)
def test_what_is_refused(change, message):
    given = {"probabilities": torch.rand(3, 2), "labels": torch.tensor([0, 1, 1]), "class_names": ["a", "b"]}
    with pytest.raises(InputError, match=message) as caught:
        classification_metrics(**given | change)
    assert "\n" not in str(caught.value)
