"""Stateless random numbers: each is a hash of its keys.

A draw depends only on its keys (seed, step, utterance, ...), not on earlier draws, the rank or the thread. A resumed
run, or a run with another number of ranks, therefore draws the same numbers without stored state. The hash is the
finaliser of splitmix64 (Steele, Lea, Flood 2014), applied key by key.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)

Keys = npt.NDArray[np.uint64]


def hashed(*keys: npt.ArrayLike) -> Keys:
    """Return uint64 hashes of the broadcast integer `keys`. The order of the keys matters."""
    state: Keys = np.zeros(1, dtype=np.uint64)
    for key in keys:
        state = _mix(state ^ _mix(np.atleast_1d(np.asarray(key)).astype(np.uint64)))
    return state


def uniform(*keys: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return float64 numbers in [0, 1), one per broadcast combination of the integer `keys`."""
    return (hashed(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def smallest(values: npt.NDArray[np.float64], counts: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Mark the smallest values of each row: [N, M] values, [N] counts -> bool [N, M], `counts[i]` true in row i."""
    ranks = np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1)
    return ranks < counts[:, None]


def _mix(x: Keys) -> Keys:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_A
    x = (x ^ (x >> np.uint64(27))) * _MIX_B
    return x ^ (x >> np.uint64(31))


def permuted(places: npt.ArrayLike, size: int, *keys: int) -> npt.NDArray[np.int64]:
    """Apply a random permutation of 0 .. size - 1, chosen by `keys`, to `places` without listing it.

    The permutation is a Feistel network of four rounds (Luby and Rackoff 1988) on the next even number of bits. Values
    out of range pass through it again ("cycle walking"), less than four times on average.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    values = np.array(places, dtype=np.uint64, ndmin=1)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half, values[outside] & low
        for turn in range(4):
            left, right = right, left ^ (hashed(*keys, turn, right) & low)
        values[outside] = left << half | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)
