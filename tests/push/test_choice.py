"""The choice of the prototypes that stay, against a slow version and against every choice that there is."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from protopush import HeadOptimal
from protopush.push.choice import choose_prototypes, most_per_class


def random_case(seed: int):
    """Cosines (N, C, K), weights (C, K) of one prototype alone, bias, labels, used, most, class weights or None."""
    random = np.random.default_rng(seed)
    classes, slots, count = int(random.integers(1, 6)), int(random.integers(2, 7)), int(random.integers(1, 40))
    labels = random.choice(classes, size=count, p=random.dirichlet(np.full(classes, 0.5)))  # some of one image, or none
    cosines = random.normal(size=(count, classes, slots)).clip(-1, 1)
    cosines[np.arange(count), labels] += random.random(slots)  # some say more of their class than others
    if seed % 3 == 0:  # ties: prototypes that are the same
        cosines[:, :, -1] = cosines[:, :, 0]
    weights = 10 * random.random((classes, slots)) + 0.1
    if seed % 3 == 0:
        weights[:, -1] = weights[:, 0]
    used = random.random((classes, slots)) < 0.8
    used[:, 0] = True
    cosines[:, ~used] = np.nan  # what a slot out of use holds is nobody's concern
    most = random.integers(1, slots + 1, size=classes)
    class_weights = random.random(classes) + 0.1 if seed % 2 else None
    return cosines, weights, random.normal(size=classes), labels, used, most, class_weights


def logits_of(cosines, weights, bias, kept):
    return np.array([
        [sum(weights[c, k] * of[c, k] for k in np.flatnonzero(kept[c])) / kept[c].sum() + bias[c]
         for c in range(len(bias))]
        for of in cosines
    ])  # fmt: skip


def loss_of(logits, labels, share):
    return sum(
        s * (math.log(sum(math.exp(v) for v in row)) - row[y]) for row, y, s in zip(logits, labels, share, strict=True)
    )


def shares_of(labels, class_weights):
    share = np.ones(len(labels)) if class_weights is None else class_weights[labels]
    return share / share.sum()


def with_mean(cosines, weights, wanted, share, kept):
    """The bias with which each class's mean logit is as wanted."""
    return wanted - share @ logits_of(cosines, weights, np.zeros(len(weights)), kept)


def by_force(cosines, weights, bias, labels, used, most, class_weights):
    share, kept = shares_of(labels, class_weights), used.copy()
    start = logits_of(cosines, weights, bias, used)
    wanted = share @ start
    while (kept.sum(axis=1) > most).any():
        for c in np.flatnonzero(kept.sum(axis=1) > most):
            losses = {}
            for k in np.flatnonzero(kept[c]):
                left = kept.copy()
                left[c, k] = False
                bias = with_mean(cosines, weights, wanted, share, left)
                losses[k] = loss_of(logits_of(cosines, weights, bias, left), labels, share)
            gone = max(k for k, loss in losses.items() if loss <= min(losses.values()) + 1e-9)
            kept[c, gone] = False
    bias = with_mean(cosines, weights, wanted, share, kept)
    end = logits_of(cosines, weights, bias, kept)
    return kept, bias, loss_of(start, labels, share), loss_of(end, labels, share)


def choose(cosines, weights, bias, labels, used, most, class_weights):
    contributions = torch.tensor(cosines * (weights * used / used.sum(axis=1, keepdims=True)))
    class_weights = None if class_weights is None else torch.tensor(class_weights)
    return choose_prototypes(
        contributions, torch.tensor(bias), torch.tensor(labels), torch.tensor(used), torch.tensor(most), class_weights
    )


@pytest.mark.parametrize("seed", range(60))
def test_choice_equals_brute_force(seed):
    case = random_case(seed)
    found, (kept, bias, before, after) = choose(*case), by_force(*case)
    assert found.kept.tolist() == kept.tolist()
    assert found.bias.numpy() == pytest.approx(bias, abs=1e-9)
    assert [found.loss_before, found.loss_after] == pytest.approx([before, after], abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_one_that_goes_is_the_best_of_all(seed):
    cosines, weights, bias, labels, used, most, class_weights = random_case(seed)
    c = int(np.argmax(used.sum(axis=1)))  # the class that has most
    most = np.where(np.arange(len(most)) == c, used[c].sum() - 1, used.shape[1]).clip(min=1)
    share = shares_of(labels, class_weights)
    wanted, losses = share @ logits_of(cosines, weights, bias, used), []
    for kept in combinations(np.flatnonzero(used[c]), most[c]):
        mask = used.copy()
        mask[c] = np.isin(np.arange(used.shape[1]), kept)
        offset = with_mean(cosines, weights, wanted, share, mask)
        losses.append(loss_of(logits_of(cosines, weights, offset, mask), labels, share))
    found = choose(cosines, weights, bias, labels, used, most, class_weights)
    assert found.kept[c].sum() == most[c]
    assert found.loss_after == pytest.approx(min(losses), abs=1e-9)


def test_a_head_with_what_stays_has_that_loss():
    torch.manual_seed(0)
    head = HeadOptimal(6, num_classes=3, num_prototypes=[5, 3, 4], embed_dim=6, max_prototypes=5).eval()
    with torch.no_grad():
        head.connections.normal_()
        head.bias.normal_()
    labels, weights = torch.randint(3, (40,)), torch.tensor([1.0, 5.0, 0.5])
    embeddings, manager = F.normalize(torch.randn(40, 7, 6), dim=-1), head.proto_manager
    with torch.no_grad():
        before = head.classify(embeddings)
    found = choose_prototypes(
        before.contributions, head.bias.detach(), labels, manager.mask(), torch.tensor([2, 3, 1]), weights
    )
    manager.valid_mask.copy_(found.kept.flatten())
    with torch.no_grad():
        head.bias.copy_(found.bias)
        after = head.classify(embeddings)
    assert manager.mask().sum(dim=1).tolist() == [2, 3, 1]
    for out, loss in ((before, found.loss_before), (after, found.loss_after)):
        assert F.cross_entropy(out.logits, labels, weights).item() == pytest.approx(loss, abs=1e-5)
    share = (weights[labels] / weights[labels].sum()).unsqueeze(1)
    assert torch.allclose((share * before.logits).sum(0), (share * after.logits).sum(0), atol=1e-5)


def test_of_two_that_say_the_same_one_goes_first():
    torch.manual_seed(0)
    labels = torch.randint(3, (60,))
    said = torch.rand(60, 3, 6) + 2 * F.one_hot(labels, 3).unsqueeze(2) * torch.rand(6)
    said[:, :, 4] = said[:, :, 1]
    said[:, :, 5] = said[:, :, 2]
    four = choose_prototypes(said, torch.zeros(3), labels, torch.ones(3, 6, dtype=torch.bool), torch.full((3,), 4))
    for kept in four.kept:
        assert not (kept[1] and kept[4] and kept[2] and kept[5])
    same = said[:, :, :1].expand(-1, -1, 6)
    one = choose_prototypes(same, torch.zeros(3), labels, torch.ones(3, 6, dtype=torch.bool), torch.full((3,), 1))
    assert one.kept.nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]  # of equals the first slot stays
    assert one.loss_after == pytest.approx(one.loss_before)


@pytest.mark.parametrize("seed", range(20))
def test_the_commonest_classes_have_few(seed):
    random = np.random.default_rng(seed)
    classes, rows = int(random.integers(1, 8)), int(random.integers(1, 4))
    labels = random.choice(classes, size=int(random.integers(1, 60)), p=random.dirichlet(np.full(classes, 0.5)))
    most = most_per_class(torch.tensor(labels), classes, rows)
    assert set(most.tolist()) <= {rows, 2 * rows}
    counts, few = np.bincount(labels, minlength=classes), most.numpy() == rows
    assert counts[few].sum() >= 0.75 * len(labels)
    assert counts[counts > counts[few].min()].sum() < 0.75 * len(labels)  # without the least of them it's not enough
    assert counts[few].min() > counts[~few].max(initial=0)
