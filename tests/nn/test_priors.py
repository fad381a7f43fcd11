"""Priors against Bayes' rule with known densities, and against what a loss really comes to; what is no prior."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.nn import functional as F

from protopush.errors import InputError
from protopush.nn.losses import balanced_class_weights, effective_class_weights, logit_shift
from protopush.nn.priors import (
    log_ratio,
    prior_in_words,
    read_prior,
    seen_more,
    shares_of,
    trained_prior,
    with_prior,
)

NAMES = ["akiec", "mel", "nv"]


def test_probabilities_move_from_one_prior_to_another_as_bayes_has_it():
    random = np.random.default_rng(0)
    values = random.normal(size=200)
    density = np.stack([norm.pdf(values, loc) for loc in (-1.0, 0.0, 1.5)], axis=1)
    priors = [[0.2, 0.5, 0.3], [0.01, 0.9, 0.09]]
    before, after = (density * prior / (density * prior).sum(1, keepdims=True) for prior in priors)
    found = with_prior(torch.from_numpy(before), *priors)
    np.testing.assert_allclose(found, after, rtol=1e-12)
    np.testing.assert_allclose(with_prior(found, *priors[::-1]), before, rtol=1e-12)
    logits = torch.from_numpy(before).log() + log_ratio(*priors)  # the same by the biases
    np.testing.assert_allclose(logits.softmax(1), after, rtol=1e-12)
    assert with_prior(torch.tensor([[1.0, 0.0, 0.0]]), *priors).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("weights", ["none", "inverse", "effective"])
@pytest.mark.parametrize(("sampling", "adjustment"), [("shuffle", 0.0), ("shuffle", 1.0), ("balanced", 0.0),
                                                      ("balanced", 0.5)])  # fmt: skip
def test_the_stated_prior_is_the_one_that_the_loss_comes_to(weights, sampling, adjustment):
    """A table of logits for four values of x, trained on all of the distribution, against Bayes' rule."""
    density = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.4, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0] * 10 + [1] * 30 + [2] * 160)
    shares = shares_of(labels, 3)
    make = {"inverse": balanced_class_weights, "effective": lambda *args: effective_class_weights(*args, beta=0.99)}
    class_weights = make[weights](labels, 3).double() if weights in make else None
    drawn = shares if sampling == "shuffle" else torch.full((3,), 1 / 3, dtype=torch.float64)
    masses = drawn[:, None] * density  # how often (class, x) is seen
    if class_weights is not None:
        masses = masses * class_weights[:, None]
    shift = logit_shift(labels, 3, adjustment).double()
    table = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = -(masses.T * F.log_softmax(table + shift, dim=1)).sum()
        value.backward()
        return value

    optimizer.step(loss)
    prior = trained_prior(shares, seen_more(shares, sampling == "balanced", adjustment), class_weights)
    assert sum(prior) == pytest.approx(1)
    wanted = torch.tensor(prior) * density.T
    torch.testing.assert_close(table.detach().softmax(1), wanted / wanted.sum(1, keepdim=True), atol=1e-5, rtol=0)
    if weights == "inverse" and sampling == "shuffle" and not adjustment:  # the defaults
        assert prior == pytest.approx([1 / 3] * 3)
        assert bool((seen_more(shares, False, 0.0) == 1).all())  # to the bit: the refit is as it was


@pytest.mark.parametrize(("wish", "message"), [
    ("balancd", r"prior is 'balancd'; did you mean 'balanced'\?"),
    ("even", "prior is 'even'; expected balanced, data or {class: share}"),
    (0.5, "prior is 0.5; expected balanced, data or {class: share}"),
    ("data", "prior is 'data', but the shares of the training images are not on record"),
    ({"akiec": 0.5, "mle": 0.2, "nv": 0.3}, r"unknown class 'mle' in prior; did you mean 'mel'\?"),
    ({"akiec": 0.5, "nv": 0.5}, "prior has no share for: mel"),
    ({}, "prior has no share for: akiec, mel, nv"),
    ({"akiec": 0.5, "mel": 0.2, "nv": 0.2}, "the shares in prior sum to 0.9; expected 1"),
    ({"akiec": 50, "mel": 20, "nv": 30}, "gives akiec a share of 50; expected more than 0 and at most 1"),
    ({"akiec": 0, "mel": 0.5, "nv": 0.5}, "gives akiec a share of 0; expected more than 0"),
    ({"akiec": -0.5, "mel": 1, "nv": 0.5}, "gives akiec a share of -0.5; expected more than 0"),
    ({"akiec": math.nan, "mel": 0.5, "nv": 0.5}, "gives akiec a share of nan; expected more than 0"),
    ({"akiec": math.inf, "mel": 0.5, "nv": 0.5}, "gives akiec a share of inf; expected more than 0"),
    ({"akiec": "a", "mel": 0.5, "nv": 0.5}, "gives akiec a share of a; expected more than 0"),
    ({"akiec": True, "mel": 0.5, "nv": 0.5}, "gives akiec a share of True; expected more than 0"),
    ({"akiec": None, "mel": 0.5, "nv": 0.5}, "gives akiec a share of None; expected more than 0"),
])  # fmt: skip
def test_what_is_no_prior_is_refused(wish, message):
    with pytest.raises(InputError, match=message) as refused:
        read_prior(wish, NAMES, None, "prior")
    assert "\n" not in str(refused.value)


def test_what_is_a_prior():
    assert read_prior("data", NAMES, [0.1, 0.2, 0.7], "prior") == [0.1, 0.2, 0.7]
    rounded = read_prior({"nv": 0.333, "akiec": 0.333, "mel": 0.333}, NAMES, None, "prior")
    assert rounded == pytest.approx([1 / 3] * 3)
    assert read_prior({0: 0.25, 1: 0.75}, ["0", "1"], None, "prior") == [0.25, 0.75]  # as YAML reads such names


def test_the_sentence_about_a_prior():
    assert "not on record" in prior_in_words(None, None, NAMES)
    assert "equally common" in prior_in_words([1 / 3] * 3, [1 / 3] * 3, NAMES)
    shares = [0.125, 0.125, 0.75]
    assert "as common as among the training images: akiec 12.5 %, mel" in prior_in_words(shares, shares, NAMES)
    assert "these shares of the classes: akiec 12.5 %" in prior_in_words(shares, [0.2, 0.2, 0.6], NAMES)
    many = [f"c{i}" for i in range(100)]
    assert prior_in_words([0.505, *[0.005] * 99], None, many).endswith("and 90 more.")
