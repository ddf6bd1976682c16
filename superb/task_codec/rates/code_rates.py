"""What codes cost: nominal bits, bits under a model of their probabilities fitted elsewhere, bits really stored.

An entropy of the very codes that are counted is never given: with few of them it is far too low.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.write_codes import Item, write_shards

Codes = np.ndarray
"""[K, T] of one utterance."""
SMOOTHING = (0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


def costs(train: Sequence[Codes], held_out: Sequence[Codes], card: CodecCard) -> dict[str, float]:
    """Bits of held-out codes: `filled_bits` as they are, `cross_entropy_bits` under a model of the training codes,
    `streams_bits` of the entropy coder's streams, and `stored_bits` with its tables, which few codes cannot pay for.
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
    """Bits that the held-out utterances take under a model of counts of the training ones.

    Of the first codebook p(v | the code before it), of the others p(v | the coarser codebook's code):
    (n(c, v) + a q(v)) / (n(c) + a), with q(v) ~ n(v) + 1/2. a is chosen on a tenth of the training utterances, which
    are then counted too.
    """
    inner = [codes for i, codes in enumerate(train) if i % 10 or len(train) < 10]
    chosen = [codes for i, codes in enumerate(train) if i % 10 == 0]
    bits = 0.0
    for k in range(len(sizes)):
        best = min(SMOOTHING, key=lambda a: Model(inner, k, sizes, a).bits(chosen))
        bits += Model(train, k, sizes, best).bits(held_out)
    return bits


class Model:
    """Probabilities of codebook k's codes given their context, from counts."""

    def __init__(self, utterances: Sequence[Codes], k: int, sizes: Sequence[int], smoothing: float) -> None:
        self.k, self.sizes, self.smoothing = k, sizes, smoothing
        contexts, codes = self._flat(utterances)
        size = sizes[k]
        self.pairs = np.bincount(contexts * size + codes, minlength=(self._contexts()) * size).reshape(-1, size)
        whole = np.bincount(codes, minlength=size) + 0.5
        self.whole = whole / whole.sum()

    def _contexts(self) -> int:
        return self.sizes[self.k - 1] if self.k else self.sizes[0] + 1  # one more: nothing before

    def _flat(self, utterances: Sequence[Codes]) -> tuple[np.ndarray, np.ndarray]:
        rows = [u.astype(np.int64) for u in utterances]
        if self.k:
            known = [u[self.k - 1] for u in rows]
        else:
            known = [np.concatenate([[self.sizes[0]], u[0, :-1]]) for u in rows]
        empty = [np.zeros(0, np.int64)]
        return np.concatenate(known + empty), np.concatenate([u[self.k] for u in rows] + empty)

    def bits(self, utterances: Sequence[Codes]) -> float:
        contexts, codes = self._flat(utterances)
        a = self.smoothing
        p = (self.pairs[contexts, codes] + a * self.whole[codes]) / (self.pairs.sum(axis=1)[contexts] + a)
        return float(-np.log2(p).sum())


# ---------------------------------------------------------------- stored


def stored_bits(utterances: Sequence[Codes], card: CodecCard) -> tuple[int, int]:
    """Bits of the codes in compressed shards: streams and tables together, and the streams alone. Ids, hashes and
    labels, which any dataset has, are not counted.
    """
    with tempfile.TemporaryDirectory() as folder:
        items: Iterator[Item] = ((f"{i:06d}", codes, {}) for i, codes in enumerate(utterances))
        shards = write_shards(Path(folder) / "shards", card, items, compress=True)
        streams = int(shards.blocks["codes_bytes"].sum()) * 8
        tables = sum(_tables_bytes(path) for path in (Path(folder) / "shards" / "shards").glob("*.tar")) * 8
    return streams + tables, streams


def _tables_bytes(path: Path) -> int:
    import tarfile

    with tarfile.open(path) as file:
        return sum(member.size for member in file.getmembers() if member.name.endswith(".tables.npz"))
