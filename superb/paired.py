"""A paired test of two systems on the same clips."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.05
"""Differences with a larger p are called noise."""


def sign_flip_p(differences: Sequence[int]) -> float:
    """Two-sided p of the exact sign-flip test for the sum of integer differences, one per clip.

    Under the null hypothesis each clip's difference has either sign with probability 1/2. The distribution of the sum
    is computed exactly, as a product of polynomials. For differences of -1, 0 and 1 this is McNemar's exact test.
    """
    sizes = np.abs(np.asarray(differences, dtype=np.int64))
    total, observed = int(sizes.sum()), abs(int(np.sum(differences)))
    mass = np.zeros(total + 1)  # of each sum of the sizes that keep their sign
    mass[0] = 1.0
    reached = 0
    for size in sizes[sizes > 0].tolist():
        mass[size : reached + size + 1] += mass[: reached + 1].copy()
        reached += size
        mass[: reached + 1] /= 2
    sums = 2 * np.arange(total + 1) - total
    return min(1.0, float(mass[np.abs(sums) >= observed].sum()))


def verdict(gain: float, p: float) -> str:
    """Describe a difference in words. gain: positive if the first system is better."""
    if p >= LEVEL or gain == 0:
        return "no difference"
    return "better" if gain > 0 else "worse"
