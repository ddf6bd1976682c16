"""A sample of a dataset's utterances for the estimates of `stats`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.shards import Shards

MAX_CODES = 1 << 24
"""Maximum number of counted codes."""


@dataclass(frozen=True)
class Sample:
    """Evenly spaced utterances of a dataset."""

    planes: list[NDArray[np.integer]]
    """Concatenated codes of all utterances, per codebook."""
    frames: NDArray[np.int64]
    """Frames of each utterance."""


def take_sample(shards: Shards, max_codes: int = MAX_CODES) -> Sample:
    """Take evenly spaced utterances with about `max_codes` codes in total."""
    total = int(shards.frames.sum(dtype=np.int64)) * shards.card.num_rows
    step = max(1, -(-total // max_codes))
    picks = range(0, len(shards), step)
    pieces = [shards.planes(index) for index in picks]
    planes = [np.concatenate(p) for p in zip(*pieces)] or [np.zeros(0, np.uint16)] * shards.num_codebooks
    return Sample(list(planes), np.asarray(shards.frames[::step], dtype=np.int64))
