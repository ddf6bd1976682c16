"""ABX error of each layer: choosing a layer without training a classifier.

X and A are clips of one class, B of another. The error is the share of triples in which X is closer to B than to A
(Schatz et al. 2013, Evaluating speech features with the minimal-pair ABX task). With speakers, A and B are of one
speaker and X of another, so that the voice does not help. The mean is over the triples of each pair of classes and
speakers, then over speakers, then over pairs of classes.

The distance is that of dynamic time warping: the mean, along the best path, of the angle between frames over pi.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError

Array = NDArray[np.float64]


def abx_error(distances: Array, labels: Sequence[str], speakers: Sequence[str] | None = None) -> float:
    """ABX error, 0 to 1 (chance 0.5), from distances [N, N]. Raises UserError if there is no triple."""
    classes, of = np.array(labels), np.array(speakers if speakers is not None else [""] * len(labels))
    pairs = list(permutations(sorted(set(of.tolist())), 2)) if speakers is not None else [("", "")]
    found = []
    for a, b in permutations(sorted(set(classes.tolist())), 2):
        cells = []
        for one, other in pairs:
            rows = [np.flatnonzero((classes == label) & (of == speaker))
                    for label, speaker in ((a, other), (a, one), (b, one))]  # fmt: skip
            cells.append(_cell(distances, *rows))
        if not np.isnan(cells).all():
            found.append(float(np.nanmean(cells)))
    if not found:
        raise UserError(
            "ABX: no triple; give two classes with two clips each, spoken by the same two speakers if a group is given"
        )
    return float(np.mean(found))


def _cell(distances: Array, x: NDArray[np.intp], a: NDArray[np.intp], b: NDArray[np.intp]) -> float:
    """Error over all triples of these clips, without X = A; NaN if there is none."""
    to_a, to_b = distances[np.ix_(x, a)][:, :, None], distances[np.ix_(x, b)][:, None, :]
    valid = np.broadcast_to((x[:, None] != a)[:, :, None], (len(x), len(a), len(b)))
    wrong = (to_a > to_b) + 0.5 * (to_a == to_b)
    return float(wrong[valid].mean()) if valid.any() else float("nan")


def distance_matrix(clips: Sequence[NDArray[np.floating]]) -> Array:
    """Distances [N, N] of clips [T_i, D]."""
    units = [_unit(clip) for clip in clips]
    longest = max(map(len, units))
    padded = np.zeros((len(units), longest, units[0].shape[1]))
    for row, unit in zip(padded, units):
        row[: len(unit)] = unit
    lengths = np.array([len(unit) for unit in units])
    found = np.zeros((len(units), len(units)))
    for i, unit in enumerate(units[:-1]):
        found[i, i + 1 :] = _warped(unit, padded[i + 1 :], lengths[i + 1 :])
    return found + found.T


def _unit(clip: NDArray[np.floating]) -> Array:
    wide = np.asarray(clip, np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)  # type: ignore[no-any-return]


def _warped(clip: Array, others: Array, lengths: NDArray[np.intp]) -> Array:
    """Distances [N] of a clip [S, D] to N others [N, T, D], by dynamic time warping of all at once.

    Each cell takes its cheapest predecessor (diagonal, above, left); ties go to the first.
    """
    size, longest = len(clip), others.shape[1]
    angles = np.arccos(np.clip(np.einsum("sd,ntd->nst", clip, others), -1.0, 1.0)) / np.pi
    skewed = np.full((len(others), size, size + longest - 1), np.inf)  # column d holds the cells s + t = d
    for s in range(size):
        skewed[:, s, s : s + longest] = angles[:, s]
    costs = np.full((2, len(others), size + 1), np.inf)  # of the last two diagonals, with a border before s = 0
    steps = np.zeros((2, len(others), size + 1))
    costs[0, :, 0] = 0.0
    found = np.zeros(len(others))
    for d in range(skewed.shape[2]):
        options = np.stack([costs[0, :, :-1], costs[1, :, :-1], costs[1, :, 1:]])
        taken = np.stack([steps[0, :, :-1], steps[1, :, :-1], steps[1, :, 1:]])
        choice = options.argmin(0)[None]
        costs[0], steps[0] = costs[1], steps[1]
        costs[0, :, 0] = np.inf
        costs[1, :, 1:] = np.take_along_axis(options, choice, 0)[0] + skewed[:, :, d]
        steps[1, :, 1:] = np.take_along_axis(taken, choice, 0)[0] + 1
        ended = lengths + size - 2 == d
        found[ended] = costs[1, ended, -1] / steps[1, ended, -1]
    return found
