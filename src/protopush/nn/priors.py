"""Priors: the shares of the classes that probabilities assume; read, stated, and exchanged for other ones.

A prior is a list of shares in label order. By Bayes' rule, probabilities that assume one prior are turned into those
that assume another by a factor for each class, which is the same as a change of the biases (Saerens et al., 2002).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from protopush.errors import InputError, did_you_mean, listing

NEAR_ONE = 0.005  # shares are often written with two or three digits
SAME = 1e-6


def read_prior(wish: Any, class_names: Sequence[str], train_shares: Sequence[float] | None, option: str) -> list[float]:
    """The shares, in label order and summing to 1, that an option asks for.

    Args:
        wish: ``balanced``, ``data`` or a share for each class by its name.
        class_names: in label order.
        train_shares: of the training images, for ``data``; None where they are not known.
        option: its name, for the messages.

    Raises:
        InputError: another word, a class that isn't there or has no share, a share that is 0, negative or no number,
            shares that don't sum to 1, or ``data`` where that is not known.

    Example:
        >>> read_prior("balanced", ["cat", "dog"], None, "prior"), read_prior({"dog": 0.9, "cat": 0.1}, ["cat", "dog"],
        ...     None, "prior")
        ([0.5, 0.5], [0.1, 0.9])
    """
    if wish == "balanced":
        return [1 / len(class_names)] * len(class_names)
    if wish == "data":
        if train_shares is None:
            raise InputError(
                f"{option} is 'data', but the shares of the training images are not on record; expected balanced or "
                "{class: share}; give the shares themselves"
            )
        return list(train_shares)
    if not isinstance(wish, Mapping):
        hint = did_you_mean(str(wish), ["balanced", "data"], "expected balanced, data or {class: share}")
        raise InputError(f"{option} is {wish!r}; {hint}")
    shares = {str(name): share for name, share in wish.items()}
    for name, share in shares.items():
        if name not in class_names:
            hint = did_you_mean(name, class_names, f"expected: {listing(class_names)}")
            raise InputError(f"unknown class {name!r} in {option}; {hint}")
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 < float(share) <= 1:
            raise InputError(
                f"{option} gives {name} a share of {share}; expected more than 0 and at most 1: a class that is never "
                "expected can never be the answer"
            )
    if missing := [name for name in class_names if name not in shares]:
        raise InputError(f"{option} has no share for: {listing(missing)}; expected one for each class")
    total = math.fsum(shares.values())
    if abs(total - 1) > NEAR_ONE:
        raise InputError(f"the shares in {option} sum to {total:.6g}; expected 1")
    return [float(shares[name]) / total for name in class_names]


def shares_of(labels: Tensor, num_classes: int) -> Tensor:
    """The share of each class among labels, (num_classes,), float64."""
    counts = torch.bincount(labels, minlength=num_classes).double()
    return counts / counts.sum()


def seen_more(shares: Tensor, balanced_sampling: bool, logit_adjustment: float) -> Tensor:
    """How much more than by its share each class counts in training, but for the loss's class weights.

    Sampling shows it more often; with adjusted logits the model itself, which predicts without the adjustment, assumes
    a prior that is divided by ``share ** logit_adjustment``.
    """
    drawn = torch.full_like(shares, 1 / len(shares)) if balanced_sampling else shares
    return drawn / shares / shares**logit_adjustment


def trained_prior(shares: Tensor, seen_more: Tensor, class_weights: Tensor | None) -> list[float]:
    """The prior that the probabilities of a trained model assume.

    Cross-entropy that counts class c w_c times is least where probabilities are proportional to w_c times the share of
    the class times the density of its images: inverse class weights assume that classes are equally common, no weights
    the shares of the training images.

    Example:
        >>> shares = torch.tensor([0.25, 0.75], dtype=torch.float64)
        >>> trained_prior(shares, torch.ones(2), None), trained_prior(shares, torch.ones(2), torch.tensor([2.0, 0.5]))
        ([0.25, 0.75], [0.57..., 0.42...])
    """
    prior = shares * seen_more.to(shares)
    if class_weights is not None:
        prior = prior * class_weights.to(shares)
    return [float(share) for share in prior / prior.sum()]


def with_prior(probabilities: Tensor, assumed: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """Probabilities (N, C) that assume one prior as those that assume another.

    Source: Saerens et al., 2002, "Adjusting the Outputs of a Classifier to New a Priori Probabilities".

    Example:
        >>> with_prior(torch.tensor([[0.5, 0.5]]), [0.5, 0.5], [0.1, 0.9])
        tensor([[0.1000, 0.9000]])
    """
    raised = probabilities.double() * log_ratio(assumed, wanted).exp().to(probabilities.device)
    return (raised / raised.sum(dim=1, keepdim=True)).to(probabilities.dtype)


def log_ratio(assumed: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """What the biases rise by from one prior to another, (C,), float64."""
    before, after = (torch.tensor(prior, dtype=torch.float64) for prior in (assumed, wanted))
    return after.log() - before.log()


def prior_in_words(prior: Sequence[float] | None, train_shares: Sequence[float] | None, names: Sequence[str]) -> str:
    """Which prior the probabilities assume, as a sentence.

    Example:
        >>> prior_in_words([0.5, 0.5], None, ["cat", "dog"])
        'The probabilities assume that all classes are equally common.'
        >>> prior_in_words([0.1, 0.9], None, ["cat", "dog"])
        'The probabilities assume these shares of the classes: cat 10 %, dog 90 %.'
    """
    if prior is None:
        return "Which shares of the classes the probabilities assume is not on record."
    if _same(prior, [1 / len(prior)] * len(prior)):
        return "The probabilities assume that all classes are equally common."
    shares = listing([f"{name} {100 * share:.3g} %" for name, share in zip(names, prior, strict=True)])
    if train_shares is not None and _same(prior, train_shares):
        return f"The probabilities assume that classes are as common as among the training images: {shares}."
    return f"The probabilities assume these shares of the classes: {shares}."


def _same(one: Sequence[float], other: Sequence[float]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) < SAME
