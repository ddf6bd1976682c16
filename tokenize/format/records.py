"""Results of a run for one input: an encoded utterance or a failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class EncodedUtterance:
    """One encoded utterance, ready to be written."""

    id: str
    path: str
    codes: Sequence[NDArray[np.integer]]
    """One 1-D array per codebook; see `layout.to_planes`."""
    samples: int
    """Samples of the encoded wave, at the codec's rate."""
    source_sha256: str
    source_rate: int
    source_samples: int
    labels: dict[str, Any] = field(default_factory=dict)
    scales: NDArray[np.float32] | None = None
    """float32 [segments], for codecs with scales."""
    mel: NDArray[np.uint8] | None = None
    """uint8 [T, bands], in datasets with a log-mel plane (`codecssl.tokenize.mel`)."""
    notes: tuple[str, ...] = ()
    """Irregularities of its audio, to be counted: see `AudioReader.notes`."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One input that could not be read."""

    id: str
    path: str
    reason: str
