"""A sample of a dataset's utterances, from which `stats` estimates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.shards import Shards

MAX_CODES = 1 << 24
"""Codes that are counted, at most."""


@dataclass(frozen=True)
class Sample:
    """Evenly spaced utterances of a dataset."""

    planes: list[NDArray[np.integer]]
    """Per codebook, the codes of all of them one after another."""
    frames: NDArray[np.int64]
    """Of each."""


def take_sample(shards: Shards, max_codes: int = MAX_CODES) -> Sample:
    """Evenly spaced utterances that have about `max_codes` codes together."""
    total = int(shards.frames.sum(dtype=np.int64)) * shards.card.num_rows
    step = max(1, -(-total // max_codes))
    picks = range(0, len(shards), step)
    pieces = [shards.planes(index) for index in picks]
    planes = [np.concatenate(p) for p in zip(*pieces)] or [np.zeros(0, np.uint16)] * shards.num_codebooks
    return Sample(list(planes), np.asarray(shards.frames[::step], dtype=np.int64))
