"""Bits of codes: nominal, cross-entropy under a model of other codes, and stored.

The entropy of the measured codes themselves is not reported: on few codes it is far too low.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.measure.entropies import CountModel
from codecssl.tokenize.write_codes import Item, write_shards

Codes = np.ndarray
"""Codes [K, T] of one utterance."""
SMOOTHING = (0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


def costs(train: Sequence[Codes], held_out: Sequence[Codes], card: CodecCard) -> dict[str, float]:
    """Bits of held-out codes by kind.

    `filled_bits`: without entropy coding. `cross_entropy_bits`: under a model of the training codes. `streams_bits`:
    the entropy coder's streams. `stored_bits`: streams and tables; for few codes the tables exceed the savings.
    """
    stored, streams = stored_bits(held_out, card)
    bits = sum(bits * count for bits, count in zip(card.code_bits, card.codes_per_frame))
    return {
        "filled_bits": bits * sum(codes.shape[1] for codes in held_out),
        "cross_entropy_bits": cross_entropy_bits(train, held_out, card.row_sizes),
        "streams_bits": streams,
        "stored_bits": stored,
    }


# ---------------------------------------------------------------- cross-entropy


def cross_entropy_bits(train: Sequence[Codes], held_out: Sequence[Codes], sizes: Sequence[int]) -> float:
    """Bits of the held-out utterances under a count model of the training ones.

    The context c of the first codebook is the previous code. That of another codebook is the code of the coarser one.
    p(v | c) = (n(c, v) + a q(v)) / (n(c) + a), with q(v) ~ n(v) + 1/2. a is chosen on a tenth of the training
    utterances, which are then counted too.
    """
    inner = [codes for i, codes in enumerate(train) if i % 10 or len(train) < 10]
    chosen = [codes for i, codes in enumerate(train) if i % 10 == 0]
    bits = 0.0
    for k, size in enumerate(sizes):
        model = CountModel(*contexts_and_codes(inner, k, sizes), size)
        pairs = contexts_and_codes(chosen, k, sizes)
        best = min(SMOOTHING, key=lambda a: float(model.bits(*pairs, a).sum()))
        model = CountModel(*contexts_and_codes(train, k, sizes), size)
        bits += float(model.bits(*contexts_and_codes(held_out, k, sizes), best).sum())
    return bits


def contexts_and_codes(utterances: Sequence[Codes], k: int, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Contexts and codes [n] of codebook k, concatenated over utterances."""
    rows = [u.astype(np.int64) for u in utterances]
    start = [sizes[0]]  # the context of an utterance's first code
    contexts = [u[k - 1] if k else np.concatenate([start, u[0, :-1]]) for u in rows]
    empty = [np.zeros(0, np.int64)]
    return np.concatenate(contexts + empty), np.concatenate([u[k] for u in rows] + empty)


# ---------------------------------------------------------------- stored


def stored_bits(utterances: Sequence[Codes], card: CodecCard) -> tuple[int, int]:
    """Bits of the codes in entropy-coded shards: streams and tables together, and the streams alone.

    Ids, hashes and labels are not counted, because every dataset has them.
    """
    with tempfile.TemporaryDirectory() as folder:
        items: Iterator[Item] = ((f"{i:06d}", codes, {}) for i, codes in enumerate(utterances))
        shards = write_shards(Path(folder) / "shards", card, items, entropy_code=True)
        streams = int(shards.blocks["codes_bytes"].sum()) * 8
        tables = sum(_tables_bytes(path) for path in (Path(folder) / "shards" / "shards").glob("*.tar")) * 8
    return streams + tables, streams


def _tables_bytes(path: Path) -> int:
    import tarfile

    with tarfile.open(path) as file:
        return sum(member.size for member in file.getmembers() if member.name.endswith(".tables.npz"))
