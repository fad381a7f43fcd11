"""Similarity of pictures, however they were saved: a perceptual hash that is compared, not only cut to bits.

The cosine transform of a small grey thumbnail, as in pHash (Zauner, "Implementation and benchmarking of perceptual
image hash functions", 2010). pHash keeps the signs of 8x8 coefficients, 64 bits. That is too little where all pictures
are alike: of 5,984 dermoscopy images of different lesions the nearest two differ in 1 of the 64 bits, and an image
differs from its own copy, 5 % cropped, in up to 10. So the coefficients themselves are kept, with three changes:

- Each is multiplied by its frequency, since pictures differ least in what is coarse (a blob in the middle).
- What all pictures of the data share (the mean of their signatures) is taken away: a solar cell's bars say nothing.
- There are two stages: 8x8 coefficients find the candidates among all pairs, 24x24 decide, after one picture was
  fitted into the other.

A mirrored picture has the same coefficients but for signs, a turned one has them transposed: all eight orientations
need the pixels only once. All pairs are compared by matrix products in blocks of rows: that is exact, needs no
index, and 100,000 pictures (eight times five thousand million pairs) take minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dct, dctn

Array = NDArray[Any]

SIDE = 64  # pixels of a thumbnail
COARSE, FINE = 8, 24  # coefficients a side: to find candidates, to decide
THRESHOLD = 0.92  # similarity from which two pictures are near duplicates; measured: see docs/data.md
SLACK = 0.06  # by which a pair that reaches the threshold may be less alike when it is coarse and unfitted
PRIOR = 20  # pictures that share nothing, counted with the others: a handful must not take themselves for the rule
ORIENTATIONS = 8  # the picture, mirrored, upside down, both; and these four transposed
PLAIN = SIDE  # length of a signature below which a picture is of one colour: a contrast of one grey level
MOST = 16  # candidates a picture, the most alike first: where hundreds are alike, all pairs are not needed
ROWS, PAIRS = 128, 256  # worked on at a time: bounds the memory
SCALES = (0.975, 0.95)  # share of a picture's side that a crop kept
OFFSETS = (0.0, 0.5, 1.0)  # share of what it left out that lies above, or left


class NearPair(NamedTuple):
    """Two pictures (their numbers, the smaller first) and how alike they are, at most 1."""

    first: int
    second: int
    similarity: float


def thumbnail(image: Image.Image) -> Array:
    """The picture in grey, 64 pixels a side whatever its shape: uint8 (64, 64).

    Example:
        >>> thumbnail(Image.new("RGB", (300, 200), "white"))[0, :3]
        array([255, 255, 255], dtype=uint8)
    """
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def near_pairs(
    thumbnails: Array,
    threshold: float = THRESHOLD,
    margin: float = 0.0,
    advance: Callable[[int], None] = lambda _: None,
) -> list[NearPair]:
    """All pairs of pictures that are at least ``threshold`` alike, in any of eight orientations, the most alike first.

    Args:
        thumbnails: (N, 64, 64), as :func:`thumbnail` makes them.
        threshold: cosine of the two centred signatures, once one picture is fitted into the other.
        margin: pairs that are less alike by up to this are returned as well (those that were candidates, not all).
        advance: called with the number of pictures done, N in all.

    Example:
        >>> pictures = np.random.default_rng(0).integers(0, 255, (5, 64, 64)).astype(np.uint8)
        >>> pictures[4] = np.rot90(pictures[1])
        >>> [(pair.first, pair.second, round(pair.similarity, 3)) for pair in near_pairs(pictures)]
        [(1, 4, 1.0)]
    """
    if not len(thumbnails):
        return []
    coarse, shared = _coarse_and_shared(thumbnails)
    found = []
    for first, second, orientation in candidates(coarse, min(threshold, THRESHOLD) - SLACK, advance):
        for start in range(0, len(first), PAIRS):
            part = slice(start, start + PAIRS)
            pictures = np.stack([turned(thumbnails[i], g) for i, g in zip(first[part], orientation[part], strict=True)])
            alike = fitted_similarity(pictures, thumbnails[second[part]], shared)
            found += [
                NearPair(int(i), int(j), min(1.0, float(value)))
                for i, j, value in zip(first[part], second[part], alike, strict=True)
                if value >= threshold - margin
            ]
    return sorted(found, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def signatures(thumbnails: Array, size: int) -> Array:
    """The lowest cosine coefficients of thumbnails (N, 64, 64), without the mean, times their frequency, of length 1.

    float32 (N, size, size); zeros for a picture of one colour.
    """
    cosines = dctn(thumbnails.astype(np.float32), axes=(1, 2), norm="ortho")
    return _unit(cosines[:, :size, :size] * _frequency(size), least=PLAIN)


def orientations(signature: Array) -> Array:
    """The signatures (8, ..., K, K) of the eight orientations of (..., K, K), in the order of :func:`turned`."""
    sign = (-1.0) ** np.arange(signature.shape[-1], dtype=np.float32)
    upright = [signature, signature * sign, signature * sign[:, None], signature * sign * sign[:, None]]
    return np.stack([*upright, *(one.swapaxes(-1, -2) for one in upright)])


def turned(picture: Array, orientation: int) -> Array:
    """The pixels (H, W) in one of eight orientations: mirrored (1), upside down (2), then transposed (4).

    Example:
        >>> turned(np.array([[1, 2], [3, 4]]), 1 + 4)
        array([[2, 4],
               [1, 3]])
    """
    if orientation & 1:
        picture = picture[:, ::-1]
    if orientation & 2:
        picture = picture[::-1]
    return picture.T if orientation & 4 else picture


def candidates(
    signature: Array, least: float, advance: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[Array, Array, Array]]:
    """Pairs whose centred signatures have a cosine of ``least`` or more when the first picture is turned right.

    Args:
        signature: (N, K, K), each of length 1 or 0.
        least: the cosine, above 0.
        advance: called with the number of pictures compared with all after them.

    Yields:
        first, second, orientation: whole numbers (M,), first < second; at most 16 pairs for the same first picture.
    """
    count = len(signature)
    shared = signature.sum(axis=0) / (count + PRIOR)
    plain = _centred(signature, shared).reshape(count, -1)
    for start in range(0, count, ROWS):
        rows = orientations(signature[start : start + ROWS])
        rows = _centred(rows, shared).reshape(ORIENTATIONS, rows.shape[1], -1)
        others = plain[start:].T
        best = rows[0] @ others
        for row in rows[1:]:
            np.maximum(best, row @ others, out=best)
        best[np.tri(*best.shape, dtype=np.bool_)] = -1.0  # itself and those before
        for row in np.flatnonzero((best >= least).sum(axis=1) > MOST):
            best[row, np.argpartition(best[row], -MOST)[:-MOST]] = -1.0
        first, second = np.nonzero(best >= least)
        if len(first):
            cosines = np.einsum("omd,md->om", rows[:, first], others.T[second])
            yield first + start, second + start, cosines.argmax(axis=0)
        advance(rows.shape[1])


def fitted_similarity(pictures: Array, others: Array, shared: Array) -> Array:
    """Cosines (M,) of pairs of thumbnails, once a part of one (95 % of its side or more) is fitted to the other.

    Args:
        pictures, others: (M, 64, 64), in the same orientation.
        shared: (24, 24), what all signatures of the data have in common.
    """
    a, b = _windows(pictures, shared), _windows(others, shared)
    cut_first, cut_second = (np.einsum("mpd,md->mp", x, y[:, 0]).max(axis=1) for x, y in ((a, b), (b, a)))
    found: Array = np.maximum(cut_first, cut_second)
    return found


def _coarse_and_shared(thumbnails: Array) -> tuple[Array, Array]:
    """The coarse signatures (N, 8, 8) and the mean of the fine ones (24, 24): not all fine ones at once."""
    coarse, total = [], np.zeros((FINE, FINE), dtype=np.float64)
    for start in range(0, len(thumbnails), ROWS):
        fine = signatures(thumbnails[start : start + ROWS], FINE)
        total += fine.sum(axis=0)
        coarse.append(_unit(fine[:, :COARSE, :COARSE]))
    return np.concatenate(coarse), (total / (len(thumbnails) + PRIOR)).astype(np.float32)


def _windows(pictures: Array, shared: Array) -> Array:
    """The centred fine signatures (M, P, 576) of each whole picture (the first of P) and of parts of it."""
    found = []
    for basis in _bases():  # (O, 24, 64): interpolation and cosine transform in one
        rows = basis.reshape(-1, SIDE)
        both = rows @ pictures.astype(np.float32) @ rows.T
        offsets = len(basis)
        parts = both.reshape(-1, offsets, FINE, offsets, FINE).swapaxes(2, 3).reshape(-1, offsets**2, FINE, FINE)
        found.append(_centred(_unit(parts * _frequency(FINE), least=PLAIN), shared))
    every = np.concatenate(found, axis=1)
    return every.reshape(*every.shape[:2], -1)


@lru_cache(maxsize=1)
def _bases() -> tuple[Array, ...]:
    """For each scale, matrices (offsets, 24, 64) that give the coefficients of a part of a line of 64 pixels."""
    cosines = dct(np.eye(SIDE), axis=0, norm="ortho")[:FINE]
    found = []
    for scale, offsets in ((1.0, (0.0,)), *((scale, OFFSETS) for scale in SCALES)):
        lines = []
        for offset in offsets:
            at = ((1 - scale) * SIDE * offset + (np.arange(SIDE) + 0.5) * scale - 0.5).clip(0, SIDE - 1)
            lines.append(cosines @ (1 - abs(at[:, None] - np.arange(SIDE))).clip(0))
        found.append(np.stack(lines).astype(np.float32))
    return tuple(found)


@lru_cache(maxsize=2)
def _frequency(size: int) -> Array:
    """Distance of each coefficient from the mean's: 0 for the mean itself, which thereby says nothing."""
    found: Array = np.hypot(*np.mgrid[:size, :size]).astype(np.float32)
    return found


def _centred(signature: Array, shared: Array) -> Array:
    """Without what all pictures share; a picture of one colour stays 0, since it is like no other."""
    return _unit(signature - shared) * signature.any(axis=(-2, -1), keepdims=True)


def _unit(signature: Array, least: float = 1e-6) -> Array:
    """Of length 1; zeros where the length is below ``least``."""
    length: Array = np.linalg.norm(signature, axis=(-2, -1), keepdims=True)
    found: Array = np.where(length < least, 0, signature / np.maximum(length, least))
    return found
