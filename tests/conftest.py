"""Settings of all tests. They use one thread: two that wait for each other on a busy machine take ten times as long."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="codecssl-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name  # keeps the tests' records of weights out of the user's cache


@pytest.fixture(scope="session")
def write_learnable() -> Callable[[Path, int], None]:
    """Write shards of `count` utterances whose codes last several frames and depend on each other."""
    from codecssl.tokenize.codec import CodecCard
    from codecssl.tokenize.write_codes import write_shards

    sizes = (16, 12, 8)
    card = CodecCard(
        name="synthetic", weights="none", weights_sha256="0" * 64, sample_rate=16_000, hop_length=320,
        codebook_sizes=sizes, codes_per_frame=(1,) * len(sizes), latent_dim=12,
    )  # fmt: skip

    def write(shards: Path, count: int) -> None:
        random, items = np.random.default_rng(0), []
        for number in range(count):
            frames = int(random.integers(20, 130))
            state = np.repeat(random.integers(0, 8, frames // 4 + 1), 4)[:frames]
            codes = np.stack([(state * (k + 1) + random.integers(0, 2, frames)) % size for k, size in enumerate(sizes)])
            items.append((f"u{number}", codes.astype(np.uint16), {}))
        write_shards(shards, card, items)

    return write
