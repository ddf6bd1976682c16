"""`codecssl-tokenize stats`: how much audio, how many bits, and how the codebooks are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from codecssl.tokenize.shards import Shards


def stats(root: Path, max_utterances: int = 20_000) -> dict[str, Any]:
    """Totals of a dataset, and per codebook the usage and order-0 entropy (bits) of its codes.

    Entropies are counted over at most `max_utterances`, evenly spaced. Perplexity is 2 ** entropy.
    """
    shards = Shards(root)
    card, totals = shards.card, shards.header["totals"]
    seconds = totals["samples"] / card.sample_rate
    counts = count_codes(shards, max_utterances)
    entropies = [entropy(c) for c in counts]
    nominal = sum(b * r for b, r in zip(card.code_bits, card.codes_per_frame)) * totals["frames"]
    stored = sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) * 8
    codes = totals["frames"] * sum(card.codes_per_frame)
    return {
        "codec": card.name,
        "num_codebooks": card.num_codebooks,
        "frame_rate": float(card.frame_rate),
        "utterances": totals["utterances"],
        "failed": totals["failed"],
        "hours": seconds / 3600,
        "frames": totals["frames"],
        "codes": codes,
        "nominal_bits_per_code": nominal / max(codes, 1),
        "stored_bits_per_code": stored / max(codes, 1),
        "overhead": stored / max(nominal, 1) - 1,
        "ratio_to_pcm16": seconds * 16 * card.sample_rate / max(stored, 1),
        "codebooks": [
            {"used": int((c > 0).sum()), "size": len(c), "entropy_bits": e, "perplexity": 2**e}
            for c, e in zip(counts, entropies)
        ],
    }


def count_codes(shards: Shards, max_utterances: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Per codebook, how often each entry occurs in evenly spaced utterances."""
    counts = [np.zeros(size, np.int64) for size in shards.card.codebook_sizes]
    step = max(1, -(-len(shards) // max_utterances))
    for index in range(0, len(shards), step):
        for count, plane in zip(counts, shards.planes(index)):
            count += np.bincount(plane, minlength=len(count))
    return counts


def entropy(counts: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    """Order-0 entropy in bits of a histogram; 0 for an empty one."""
    p = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(p * np.log2(p)).sum()) + 0.0
