"""The prototypes' numbers against loops, and by hand where they are best and worst."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from protopush.errors import InputError
from protopush.metrics.prototype_quality import (
    anchor_similarity,
    coverage,
    diversity,
    duplicates,
    never_used,
    prototype_metrics,
    sparsity,
    usage_entropy,
)
from protopush.nn.head import HeadOptimal


def a_case(seed):
    """Arguments of :func:`prototype_metrics`: slots out of use hold NaN, numbers tie, a class may not occur."""
    random = np.random.default_rng(seed)
    classes, slots, dim, count = random.integers((1, 1, 2, 1), (5, 6, 5, 25))
    mask = torch.from_numpy(random.random((classes, slots)) < 0.7)
    mask[:, 0] = True
    prototypes = F.normalize(torch.from_numpy(random.integers(-1, 2, (classes, slots, dim)) + 0.01).float(), dim=-1)
    similarities = torch.from_numpy(random.integers(-3, 11, (count, classes, slots)) / 10).float()
    weights = torch.from_numpy(random.choice([0.0, 0.0005, 1.0, 2.0], (classes, slots))).float()
    out_of_use = torch.where(mask, 0.0, torch.nan)
    unused = 0.3
    return {
        "prototypes": prototypes + out_of_use.unsqueeze(2),
        "mask": mask,
        "patches": [None if random.random() < unused else (int(random.integers(4)), 0) for _ in range(mask.numel())],
        "anchor_similarities": [None if random.random() < unused else random.random() for _ in range(mask.numel())],
        "similarities": similarities + out_of_use,
        "contributions": similarities * weights + out_of_use,
        "labels": torch.from_numpy(random.integers(0, max(1, classes - seed % 2), count)),
        "predicted": torch.from_numpy(random.integers(0, classes, count)),
    }


def by_hand(prototypes, mask, patches, anchor_similarities, similarities, contributions, labels, predicted, threshold):
    """All of the metrics in loops over samples and prototypes."""
    classes, slots = mask.shape
    used = [[k for k in range(slots) if mask[c, k]] for c in range(classes)]
    places = [(c, k) for c in range(classes) for k in used[c]]
    s, contribution = similarities.double().numpy(), contributions.double().numpy()
    unit = F.normalize(prototypes.double(), dim=-1).numpy()
    samples = range(len(labels))
    anchors = [anchor_similarities[c * slots + k] for c, k in places]
    anchors = [a for a in anchors if a is not None]
    seen, same_patch = set(), 0
    for c, k in places:
        key = patches[c * slots + k]
        same_patch += key is not None and key in seen
        seen.add(key)
    alike = sum(any(unit[c, k] @ unit[c, j] > 0.99 for j in used[c] if j < k) for c, k in places)
    distances = [
        [math.sqrt(max(0, 2 - 2 * unit[c, i] @ unit[c, j])) for i in used[c] for j in used[c] if j < i]
        for c in range(classes)
    ]
    spread = [mean(some) for some in distances]

    evenness, dead, alive, covered = [], 0, 0, []
    for c in range(classes):
        of_class = [n for n in samples if labels[n] == c]
        shares = dict.fromkeys(used[c], 0.0)
        for n in of_class:
            top = max(contribution[n, c, k] for k in used[c])
            first = [k for k in used[c] if contribution[n, c, k] == top > 0]
            for k in first:
                shares[k] += 1 / len(first)
        total = sum(shares.values())
        if total and len(used[c]) > 1:
            entropy = -sum(q / total * math.log(q / total) for q in shares.values() if q)
            evenness.append(entropy / math.log(len(used[c])))
        if of_class:
            dead += sum(not q for q in shares.values())
            alive += sum(bool(q) for q in shares.values())
        best = [max(s[n, c, k] for k in used[c]) for n in of_class]
        covered.append(
            {"share": mean([b >= threshold for b in best]), "mean_similarity": mean(best)} if of_class else None
        )

    local, relevant_predicted, relevant_overall = [], [], []
    for n in samples:
        c = int(predicted[n])
        positive = sorted((max(0.0, contribution[n, c, k]) for k in used[c]), reverse=True)
        sizes = [i for i in range(len(positive) + 1) if sum(positive[:i]) >= (0.9 - 1e-6) * sum(positive)]
        local.append(min(sizes))
        relevant_predicted.append(sum(p > 1e-3 for p in positive))
        relevant_overall.append(sum(contribution[n, c, k] > 1e-3 for c, k in places))
    slopes = []
    for c, k in places:
        squares = sum(s[n, c, k] ** 2 for n in samples)
        slopes.append(abs(sum(contribution[n, c, k] * s[n, c, k] for n in samples)) / squares if squares else 0.0)
    return {
        "count": len(places),
        "anchor_similarity": {"mean": mean(anchors), "min": min(anchors, default=None)},
        "duplicates": {"same_patch": same_patch, "alike": alike},
        "diversity": {"mean": mean([d for d in spread if d is not None]), "per_class": spread},
        "usage_entropy": mean(evenness),
        "never_used": dead / (dead + alive),
        "coverage": {
            "share": mean([row["share"] for row in covered if row]),
            "mean_similarity": mean([row["mean_similarity"] for row in covered if row]),
            "per_class": covered,
        },
        "sparsity": {
            "global_size": sum(slope > 1e-3 for slope in slopes),
            "local_size": mean(local),
            "local_size_median": enough(local, 50),
            "local_size_p95": enough(local, 95),
            "relevant_predicted": mean(relevant_predicted),
            "relevant_overall": mean(relevant_overall),
        },
    }


def enough(sizes, percent):
    """The smallest size that so many of a hundred do not exceed."""
    return min(size for size in sizes if 100 * sum(s <= size for s in sizes) >= percent * len(sizes))


def mean(values):
    return sum(values) / len(values) if values else None


def assert_close(found, expected, where=""):
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{where}/{index}")
    else:
        assert type(found) in (int, float, type(None)), where
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-6)), where


@pytest.mark.parametrize("seed", range(40))
def test_metrics_are_those_of_loops(seed):
    case = a_case(seed)
    before = {name: value.clone() for name, value in case.items() if isinstance(value, torch.Tensor)}
    found = prototype_metrics(**case, threshold=0.5)
    assert_close(found, by_hand(**case, threshold=0.5))
    json.dumps(found, allow_nan=False)
    for name, value in before.items():
        assert torch.equal(case[name].nan_to_num(9), value.nan_to_num(9))  # arguments are left as they are


def flags(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_anchor_similarity():
    assert anchor_similarity([1.0, 1.0]) == {"mean": 1.0, "min": 1.0}
    assert anchor_similarity([None, 0.25, 0.75]) == {"mean": 0.5, "min": 0.25}
    assert anchor_similarity([None]) == anchor_similarity([]) == {"mean": None, "min": None}


def test_duplicates():
    distinct, mask = torch.eye(4).view(2, 2, 4), flags([1, 1], [1, 1])
    assert duplicates([("a", 0), ("a", 1), ("b", 0), ("b", 1)], distinct, mask) == {"same_patch": 0, "alike": 0}
    same = torch.eye(4)[0].expand(2, 2, 4)
    # of one class: across classes a patch may be told twice, directions may not
    assert duplicates([("a", 0)] * 4, same, mask) == {"same_patch": 3, "alike": 2}
    assert duplicates([("a", 0), None, None, ("a", 0)], same, mask) == {"same_patch": 1, "alike": 2}
    assert duplicates([("a", 0)] * 4, same, flags([1, 0], [1, 0])) == {"same_patch": 1, "alike": 0}
    near = F.normalize(torch.tensor([[[1.0, 0.0], [1.0, 0.3]]]), dim=-1)  # cosine 0.958
    assert [duplicates([None] * 2, near, flags([1, 1]), t)["alike"] for t in (0.95, 0.96)] == [1, 0]
    assert duplicates([None] * 2, near * torch.tensor([[[-1.0], [1.0]]]), flags([1, 1]), 0.95)["alike"] == 0


def test_diversity():
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert diversity(opposite, flags([1, 1])) == {"mean": 2.0, "per_class": [2.0]}
    same = F.normalize(torch.rand(1, 1, 5), dim=-1).expand(1, 4, 5)
    assert diversity(same, flags([1, 1, 1, 1])) == {"mean": 0.0, "per_class": [0.0]}  # not 1e-4: no digits are lost
    orthogonal = diversity(torch.eye(6).view(2, 3, 6), flags([1, 1, 1], [1, 0, 0]))
    assert orthogonal == {"mean": pytest.approx(math.sqrt(2)), "per_class": [pytest.approx(math.sqrt(2)), None]}
    assert diversity(opposite, flags([1, 0])) == {"mean": None, "per_class": [None]}


def test_usage():
    mask, labels = flags([1, 1, 1, 1]), torch.zeros(8, dtype=torch.long)
    even = torch.eye(4).repeat(2, 1).unsqueeze(1)
    assert usage_entropy(even, labels, mask) == 1.0
    assert never_used(even, labels, mask) == 0.0
    one = (torch.rand(8, 1, 4) + torch.tensor([0.0, 1.0, 0.0, 0.0])).float()
    assert usage_entropy(one, labels, mask) == 0.0
    assert never_used(one, labels, mask) == 0.75
    assert never_used(one, labels, mask, top=4) == never_used(one, labels, mask, top=9) == 0.0
    assert usage_entropy(torch.ones(8, 1, 4), labels, mask) == 1.0  # all alike: they share
    assert never_used(torch.ones(8, 1, 4), labels, mask) == 0.0
    half = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, -1.0]]).unsqueeze(1)
    assert usage_entropy(half, labels[:2], mask) == pytest.approx(0.5)  # two of four, evenly: ln 2 / ln 4
    assert [never_used(half, labels[:2], mask, top) for top in (1, 2, 3)] == [0.5, 0.5, 0.5]


def test_usage_of_chance():
    random = torch.rand(20_000, 3, 5)
    labels, mask = torch.randint(3, (20_000,)), torch.ones(3, 5, dtype=torch.bool)
    assert 0.999 < usage_entropy(random, labels, mask) < 1
    assert never_used(random, labels, mask) == 0


def test_usage_is_of_the_class_itself_and_only_of_what_speaks_for_it():
    mask, labels = flags([1, 1], [1, 1], [1, 1]), torch.tensor([0, 0, 1])
    contributions = torch.tensor(
        [
            [[1.0, 0.0], [9.0, 9.0], [9.0, 9.0]],
            [[2.0, 3.0], [9.0, 9.0], [9.0, 9.0]],
            [[9.0, 9.0], [-1.0, -2.0], [9.0, 9.0]],
        ]
    )
    assert usage_entropy(contributions, labels, mask) == 1.0  # of class 0; nothing speaks for 1, nobody is of 2
    assert never_used(contributions, labels, mask) == 0.5
    assert usage_entropy(contributions[2:], labels[2:], mask) is None
    assert never_used(contributions[2:], labels[2:], mask) == 1.0
    assert usage_entropy(contributions, labels, flags([1, 0], [1, 0], [1, 0])) is None


def test_coverage():
    mask, labels = flags([1, 1], [1, 0]), torch.tensor([0, 0, 0, 1])
    similarities = torch.tensor(
        [[[0.5, 0.25], [1.0, 1.0]], [[0.25, 0.75], [1.0, 1.0]], [[0.0, 0.25], [1.0, 1.0]], [[1.0, 1.0], [0.25, 1.0]]]
    )
    found = coverage(similarities, labels, mask, 0.5)
    assert found["per_class"] == [
        {"share": pytest.approx(2 / 3), "mean_similarity": 0.5},
        {"share": 0.0, "mean_similarity": 0.25},
    ]
    assert found["share"] == pytest.approx(1 / 3)
    assert found["mean_similarity"] == 0.375
    assert coverage(torch.ones(4, 2, 2), labels, mask, 1.0)["share"] == 1.0
    assert coverage(similarities, labels, mask, 1.1)["share"] == 0.0
    assert coverage(similarities[:3], labels[:3], mask, 0.5)["per_class"][1] is None
    assert coverage(similarities, labels, flags([1, 1], [0, 0]), 0.5)["per_class"][1] is None


def test_sparsity():
    mask, one = torch.ones(2, 10, dtype=torch.bool), torch.tensor([0])

    def sizes(row, share=0.9):
        contributions = torch.stack([torch.tensor(row), torch.zeros(10)]).unsqueeze(0)
        found = sparsity(torch.ones(1, 2, 10), contributions, one, mask, share)
        return [found[name] for name in ("global_size", "local_size", "relevant_predicted", "relevant_overall")]

    assert sizes([1.0] + [0.0] * 9) == [1, 1, 1, 1]  # best
    assert sizes([1.0] * 10, share=1.0) == [10, 10, 10, 10]  # worst
    assert sizes([0.1] * 10) == [10, 9, 10, 10]  # nine tenths to the dot, in spite of rounding
    assert sizes([0.0] * 10) == [0, 0, 0, 0]
    assert sizes([5.0, -4.0] + [0.0] * 8)[:3] == [2, 1, 1]  # what speaks against is no part of the whole
    assert sizes([8.0, 0.0005, 1.25, 0.5, 0.25] + [0.0] * 5) == [4, 2, 4, 4]


def test_sparsity_knows_the_weights_of_a_head():
    head = HeadOptimal(6, num_classes=3, num_prototypes=[4, 2, 1], embed_dim=5, max_prototypes=4).eval()
    with torch.no_grad():
        head.connections[0, 1] = head.connections[1, 0] = -20.0  # nothing to say
        out = head.classify(F.normalize(torch.randn(9, 7, 5), dim=-1))
        weights = head.weights()
    mask = head.proto_manager.mask()
    found = sparsity(out.similarities, out.contributions, out.logits.argmax(1), mask)
    assert found["global_size"] == int((weights > 1e-3).sum()) == 5
    assert found["relevant_overall"] <= 5


def test_no_samples():
    case = a_case(0)
    none = {name: case[name][:0] for name in ("similarities", "contributions", "labels", "predicted")}
    found = prototype_metrics(**case | none)
    assert found["usage_entropy"] is found["never_used"] is found["coverage"]["share"] is None
    assert set(found["sparsity"].values()) == {None}
    assert found["count"] == int(case["mask"].sum())
    json.dumps(found, allow_nan=False)


def broken(name, value, case):
    tensor = case[name].clone()
    tensor[0, 0] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda case: broken("prototypes", torch.nan, case), "a prototype has NaN"),
        (lambda case: broken("similarities", torch.inf, case), "1 of .* samples have similarities or contributions"),
        (lambda case: broken("contributions", torch.nan, case), "1 of .* samples have similarities or contributions"),
        (lambda case: {"anchor_similarities": [float("nan")] * case["mask"].numel()}, "similarity to its patch is NaN"),
        (lambda case: {"patches": [None]}, "a list of 1 for"),
        (lambda case: {"anchor_similarities": [None]}, "a list of 1 for"),
        (lambda case: {"similarities": case["similarities"][1:]}, "similarities or contributions are"),
        (lambda case: {"contributions": case["contributions"][:, 1:]}, "similarities or contributions are"),
        (lambda case: {"prototypes": case["prototypes"][1:]}, "prototypes are"),
        (lambda case: {"labels": case["labels"] - 9}, "classes are -9 to"),
        (lambda case: {"predicted": case["predicted"] + 9}, "classes are 9 to"),
    ],
)
def test_what_is_refused(change, message):
    case = a_case(6)
    assert case["mask"].shape[0] > 1
    with pytest.raises(InputError, match=message) as caught:
        prototype_metrics(**case | change(case))
    assert "\n" not in str(caught.value)


def test_top_is_at_least_one():
    with pytest.raises(InputError, match="top is 0"):
        never_used(torch.ones(1, 1, 1), torch.tensor([0]), flags([1]), top=0)
