"""Entropies of codes, estimated from counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FOLDS = 10
"""Parts of the utterances. The last is measured, the one before it sets the smoothing, the rest are counted."""
SMOOTHING = (1, 3, 10, 30, 100, 300, 1000, 3000)


def entropy(counts: NDArray[np.integer]) -> float:
    """Order-0 entropy in bits of a histogram; 0 for an empty one."""
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log2(p)).sum()) + 0.0


def corrected_entropy(counts: NDArray[np.integer]) -> float:
    """Order-0 entropy in bits of the distribution that a histogram samples (Miller and Madow)."""
    used, total = int((counts > 0).sum()), int(counts.sum())
    return entropy(counts) + max(used - 1, 0) / (2 * max(total, 1) * np.log(2))


class CountModel:
    """Probabilities of codes given a context, from counts: p(v | c) = (n(c, v) + a q(v)) / (n(c) + a).

    q is the order-0 distribution, with half a count added to each value. The smoothing a is an argument of each query.
    """

    def __init__(self, contexts: NDArray[np.int64], codes: NDArray[np.int64], size: int) -> None:
        """Count contexts and codes [n] below `size`, from utterances that are not measured."""
        self.size = size
        self.pairs, self.pair_counts = np.unique(contexts * size + codes, return_counts=True)
        self.context_counts = np.bincount(contexts)
        counts = np.bincount(codes, minlength=size) + 0.5
        self.prior = counts / counts.sum()

    def bits(self, contexts: NDArray[np.int64], codes: NDArray[np.int64], smoothing: float) -> NDArray[np.float64]:
        """Return the bits [n] of each code given its context."""
        joint = self._looked_up(contexts * self.size + codes)
        known = contexts < len(self.context_counts)
        context = np.zeros(len(contexts), np.int64)
        context[known] = self.context_counts[contexts[known]]
        found: NDArray[np.float64] = -np.log2((joint + smoothing * self.prior[codes]) / (context + smoothing))
        return found

    def _looked_up(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        if not len(self.pairs):
            return np.zeros(len(keys), np.int64)
        place = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        return np.where(self.pairs[place] == keys, self.pair_counts[place], 0)


def conditional_entropy(
    codes: NDArray[np.int64], contexts: NDArray[np.int64], utterance: NDArray[np.int64], size: int
) -> float | None:
    """Return the mean bits of a code given its context, in utterances that were not counted; None if too few.

    codes, contexts, utterance (its number): [n]. The smoothing is chosen on a tenth of the utterances, and the result
    is measured on another tenth.
    """
    fold = utterance % FOLDS
    chosen, measured = fold == FOLDS - 2, fold == FOLDS - 1
    if not chosen.any() or not measured.any():
        return None
    counted = fold < FOLDS - 2
    model = CountModel(contexts[counted], codes[counted], size)
    best = min(SMOOTHING, key=lambda a: model.bits(contexts[chosen], codes[chosen], a).mean())
    return float(model.bits(contexts[measured], codes[measured], best).mean())
