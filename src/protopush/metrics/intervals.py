"""Bootstrap intervals of the numbers of a data set, with a weight per sample in place of drawn rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protopush.errors import InputError

Array = NDArray[np.float64]
Interval = list[float] | None

# Weights in memory at a time; enough for numpy to be busy, and 8 MB whatever the number of samples.
BLOCK = 2**20


def bootstrap_intervals(
    statistics: Callable[[Array], Array],
    count: int,
    resamples: int = 1000,
    seed: int = 0,
    groups: Sequence[str | None] | None = None,
    level: float = 0.95,
) -> list[Interval]:
    """Percentile intervals of M statistics of a data set (Efron, 1979; Efron and Tibshirani, 1993, chapter 13).

    A data set of the same size is drawn ``resamples`` times from the samples, with replacement; the interval lies
    between the ``(1 - level) / 2`` and the ``(1 + level) / 2`` quantile of what a statistic is in them. With groups,
    whole groups are drawn (the cluster bootstrap: Davison and Hinkley, 1997, chapter 3.8), as images of one lesion
    say less than as many lesions.

    Args:
        statistics: weights (R, N), how often each sample is in each of R resamples, to values (R, M), NaN where a
            statistic is undefined; such a resample doesn't count for its interval.
        count: N.
        resamples: how many in all.
        seed: of a generator of its own.
        groups: N names (lesion, patient); a sample with None is a group of its own.
        level: in (0, 1).

    Returns:
        M intervals ``[low, high]``; None where a statistic is defined in no resample.

    Raises:
        InputError: not as many groups as samples, or fewer than one resample.

    Example:
        >>> values = np.arange(100.0)
        >>> bootstrap_intervals(lambda weights: weights @ values[:, None] / 100, 100)  # 49.5 +- 1.96 * 28.9 / 10
        [[43.8..., 54.9...]]
    """
    values = np.concatenate([statistics(weights) for weights in resample_weights(count, resamples, seed, groups)])
    tails = [(1 - level) / 2, (1 + level) / 2]
    known = (column[~np.isnan(column)] for column in values.T)
    return [np.quantile(column, tails).tolist() if len(column) else None for column in known]


def resample_weights(
    count: int, resamples: int, seed: int = 0, groups: Sequence[str | None] | None = None
) -> Iterator[Array]:
    """How often each of ``count`` samples is drawn, in blocks (R, count) that make up ``resamples`` rows.

    Arguments and errors are those of :func:`bootstrap_intervals`.

    Example:
        >>> next(resample_weights(4, 3, groups=["a", "b", "a", None]))  # three draws of a, b and the last one
        array([[0., 2., 0., 1.],
               [3., 0., 3., 0.],
               [3., 0., 3., 0.]])
    """
    if groups is not None and len(groups) != count:
        raise InputError(f"{len(groups)} groups for {count} samples; expected one group, or None, for each sample")
    if resamples < 1:
        raise InputError(f"{resamples} resamples; expected at least 1 (1000 is usual)")
    codes = _codes(groups) if groups is not None else np.arange(count)
    units = int(codes.max(initial=-1)) + 1
    random = np.random.default_rng(seed)
    size = max(1, BLOCK // max(count, 1))
    for start in range(0, resamples, size):
        block = min(size, resamples - start)
        drawn = random.integers(0, max(units, 1), (block, units))
        yield weighted_counts(drawn, units)[:, codes]


def weighted_counts(keys: NDArray[Any], count: int, weights: Array | None = None) -> Array:
    """The sum of weights (R, N) per key 0 .. count - 1, as (R, count); keys are (N,) or (R, N).

    Example:
        >>> weighted_counts(np.array([0, 2, 2]), 3, np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 0.5]]))
        array([[1. , 0. , 2. ], [0. , 0. , 3.5]])
    """
    rows = len(keys) if weights is None else len(weights)
    places = keys + count * np.arange(rows)[:, None]
    flat = None if weights is None else weights.ravel()
    return np.bincount(places.ravel(), flat, minlength=rows * count).reshape(rows, count).astype(np.float64)


def _codes(groups: Sequence[str | None]) -> NDArray[np.intp]:
    """Groups as numbers, in the order in which they come; None is another group each time."""
    numbers: dict[object, int] = {}
    keys = ((index,) if group is None else group for index, group in enumerate(groups))
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)
