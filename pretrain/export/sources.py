"""The sources of a model's training data, as short hashes. Evaluations use them to detect files seen in training.

MODEL/sources.bin holds, in order and without repeats, the first 8 bytes of the sha256 of every audio file that the
training shards were made of. The held-out part of the shards is included. At most LIMIT hashes are kept, the smallest
ones. A file whose hash is greater than the last of LIMIT hashes is then unknown.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import write_atomic
from codecssl.tokenize.shards import Shards

FILE = "sources.bin"
LIMIT = 1 << 17
"""1 MiB."""


def write_sources(shards: Iterable[Shards], model: Path) -> None:
    """Write MODEL/sources.bin."""
    found = np.zeros(0, dtype=">u8")
    for dataset in shards:
        for hashes in dataset.source_hashes():
            new = np.ascontiguousarray(hashes[:, :8]).view(">u8").ravel()
            found = np.union1d(found, new)[:LIMIT]
    write_atomic(model / FILE, found.astype(">u8").tobytes())


class SeenSources:
    """The audio files that a model was pretrained on."""

    def __init__(self, model: Path) -> None:
        content = (model / FILE).read_bytes()
        if len(content) % 8:
            raise UserError(f"{model / FILE}: {len(content)} bytes, not a multiple of 8; export the model again")
        self._hashes: NDArray[np.uint64] = np.frombuffer(content, dtype=">u8").astype(np.uint64)

    def count(self, sha256: Sequence[str]) -> tuple[int, int]:
        """Return the number of files that are in the training data, and the number of files whose status is known.

        sha256: hex digests of the files.
        """
        asked = np.array([int(digest[:16], 16) for digest in sha256], dtype=np.uint64)
        if len(self._hashes) == LIMIT:
            asked = asked[asked <= self._hashes[-1]]
        return int(np.isin(asked, self._hashes).sum()), len(asked)


def seen_sources(model: Path) -> SeenSources | None:
    """Read the sources of a model; None if it was exported without them."""
    return SeenSources(model) if (model / FILE).is_file() else None
