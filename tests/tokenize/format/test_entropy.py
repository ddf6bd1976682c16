"""The coder against a range decoder in plain integers, and its tables against sources of known entropy."""

import io

import numpy as np
import pytest

from codecssl.tokenize.format.blocks import npz_bytes
from codecssl.tokenize.format.entropy import PREVIOUS, Book, Coder, Level, weights
from codecssl.tokenize.format.entropy_tables import fit


def random_book(rng, size, sources=()):
    """A book with one level per (source, size of its codebook), nothing in it fitted."""
    levels, classes = [], 1
    for source, kinds in sources:
        reduce = rng.integers(0, 4, kinds + (source == PREVIOUS)).astype(np.uint8)
        reduce[:2] = 0, 3
        merge = rng.integers(0, 5, classes * 4).astype(np.uint8)
        merge[-1] = 4
        levels.append(Level(source=source, reduce=reduce, merge=merge))
        classes = 5
    return Book(
        base=rng.integers(0, 256, size).astype(np.uint8),
        step=int(rng.integers(1, 9)),
        ratio=rng.integers(-20, 20, (classes, size)).astype(np.int8),
        levels=tuple(levels),
    )


def naive_class(book, k, planes, place, rates):
    """The class of code `place` of plane k, by the definition."""
    found = 0
    for level in book.levels:
        if level.source == PREVIOUS:
            code = planes[k][place - 1] if place else len(book.base)
        else:
            code = planes[level.source][place * rates[level.source] // rates[k]]
        found = int(level.merge[found * (int(level.reduce.max()) + 1) + int(level.reduce[code])])
    return found


def naive_decode(words, books, frames, rates):
    """Range decoding with a 64-bit state, 32-bit words and probabilities in 2**-24, in Python's integers."""
    words, mask = [int(w) for w in words] + [0] * 4, (1 << 64) - 1
    position, lower, width, point = 2, 0, mask, words[0] << 32 | words[1]
    planes = []
    for k, (book, rate) in enumerate(zip(books, rates)):
        shares = weights(book) + 1
        ends = np.concatenate([np.zeros((len(shares), 1), np.int64), shares.cumsum(axis=1)], axis=1)
        planes.append([])
        for place in range(frames * rate):
            row = naive_class(book, k, planes, place, rates)
            scale = width >> 24
            code = int(np.searchsorted(ends[row], ((point - lower) & mask) // scale, side="right")) - 1
            lower, width = (lower + scale * int(ends[row][code])) & mask, scale * int(shares[row][code])
            if width < 1 << 32:
                lower, width, point = lower << 32 & mask, width << 32, (point << 32 | words[position]) & mask
                position += 1
            planes[k].append(code)
    return planes


CODECS = {
    "one": ([1024], [1], [()]),
    "flat": ([16, 1000, 2], [1, 1, 1], [(), (), ()]),
    "contexts": ([16, 64, 300], [1, 1, 1], [[(-1, 16)], [(0, 16), (-1, 64)], [(-1, 300), (0, 16), (1, 64)]]),
    "coarser alone": ([16, 16, 16], [1, 1, 1], [(), [(0, 16)], [(1, 16), (0, 16)]]),
    "rates": ([32, 32, 32], [1, 2, 4], [[(-1, 32)], [(0, 32), (-1, 32)], [(1, 32), (0, 32), (-1, 32)]]),
}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("frames", [1, 2, 70])
def test_streams_match_their_description(name, frames):
    sizes, rates, sources = CODECS[name]
    rng = np.random.default_rng(frames)
    coder = Coder([random_book(rng, size, s) for size, s in zip(sizes, sources)], rates)
    planes = [rng.integers(0, size, frames * rate) for size, rate in zip(sizes, rates)]
    words = coder.encode(planes)
    assert [p.tolist() for p in coder.decode(words, frames, len(sizes))] == [p.tolist() for p in planes]
    assert naive_decode(words, coder.books, frames, rates) == [p.tolist() for p in planes]


def test_tables_are_whole_numbers_that_sum_to_all_but_one_each():
    for seed, size in enumerate([1, 2, 16, 1000, 65536]):
        found = weights(random_book(np.random.default_rng(seed), size, [(0, 8)]))
        assert found.dtype == np.int64
        assert found.min() >= 0
        assert (found.sum(axis=1) == (1 << 24) - size).all()


def test_the_first_codebooks_are_a_prefix_of_the_stream():
    sizes, rates, sources = CODECS["contexts"]
    rng = np.random.default_rng(1)
    coder = Coder([random_book(rng, size, s) for size, s in zip(sizes, sources)], rates)
    planes = [rng.integers(0, size, 200) for size in sizes]
    words = coder.encode(planes)
    alone = coder.encode(planes[:2])
    damaged = words.copy()
    damaged[len(alone) + 1 :] ^= 0xFFFFFFFF
    assert [p.tolist() for p in coder.decode(damaged, 200, 2)] == [p.tolist() for p in planes[:2]]


def test_tables_survive_the_disk():
    sizes, rates, sources = CODECS["contexts"]
    rng = np.random.default_rng(2)
    coder = Coder([random_book(rng, size, s) for size, s in zip(sizes, sources)], rates)
    again = Coder.from_bytes(npz_bytes(coder.arrays()), rates)
    planes = [rng.integers(0, size, 50) for size in sizes]
    assert np.array_equal(again.encode(planes), coder.encode(planes))
    with np.load(io.BytesIO(npz_bytes(coder.arrays()))) as stored:
        assert stored["ratio"].dtype == np.int8


# ---------------------------------------------------------------- fitting


def entropy_bits(p):
    return float(-(p * np.log2(p)).sum())


def markov(rng, size, frames, stay):
    """Codes that repeat with a probability and are otherwise drawn at random, and their entropy in bits."""
    moves = rng.random(frames) >= stay
    moves[0] = True
    codes = rng.integers(0, size, frames)[np.maximum.accumulate(np.where(moves, np.arange(frames), 0))]
    p = np.where(codes[1:] == codes[:-1], stay, 0) + (1 - stay) / size
    return codes, float(np.log2(size) - np.log2(p).sum())


def coded_bits(planes, lengths, sizes):
    """Bits in all streams, one a segment, with the tables fitted to them; the coder."""
    rates = [len(p) // int(np.sum(lengths)) for p in planes]
    coder = Coder(fit(planes, np.array(lengths), sizes), rates)
    bits, first = 0, 0
    for length in lengths:
        segment = [p[first * r : (first + length) * r] for p, r in zip(planes, rates)]
        bits += 32 * len(coder.encode(segment))
        first += length
    return bits, coder


def test_the_code_before_is_made_use_of():
    codes, ideal = markov(np.random.default_rng(0), 64, 60_000, 0.8)
    bits, coder = coded_bits([codes], [3000] * 20, [64])
    assert [level.source for level in coder.books[0].levels] == [PREVIOUS]
    assert bits < ideal * 1.01
    assert bits + 8 * len(npz_bytes(coder.arrays())) > ideal  # no coder beats the ideal once the tables are counted


def test_coarser_codebooks_are_contexts_at_other_rates_too():
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 32, 20_000)
    noise = rng.integers(0, 4, 40_000)
    fine = (np.repeat(coarse, 2) * 4 + noise) * 7 % 128
    bits, coder = coded_bits([coarse, fine], [2000] * 10, [32, 128])
    assert coder.books[1].levels[0].source == 0
    assert bits < (20_000 * 5 + 40_000 * 2) * 1.02


def test_two_contexts_are_made_use_of_together():
    rng = np.random.default_rng(2)
    coarse = rng.integers(0, 8, 60_000)
    slow, ideal = markov(rng, 8, 60_000, 0.8)
    bits, coder = coded_bits([coarse, slow * 8 + coarse], [3000] * 20, [8, 64])
    assert {level.source for level in coder.books[1].levels} == {0, PREVIOUS}
    assert bits < (3 * 60_000 + ideal) * 1.02


def test_independent_codes_get_no_contexts():
    rng = np.random.default_rng(3)
    p = rng.dirichlet(np.full(256, 0.5))
    planes = [rng.choice(256, 20_000, p=p) for _ in range(2)]
    bits, coder = coded_bits(planes, [1000] * 20, [256, 256])
    assert [book.levels for book in coder.books] == [(), ()]
    assert bits < 2 * 20_000 * entropy_bits(p[p > 0]) * 1.01


def test_codes_outside_the_sample_can_be_coded():
    sample = np.zeros(500, np.int64)
    coder = Coder(fit([sample, sample], np.array([500]), [1024, 1024]), [1, 1])
    planes = [np.arange(1024), np.arange(1024)[::-1]]
    decoded = coder.decode(coder.encode(planes), 1024, 2)
    assert all(np.array_equal(a, b) for a, b in zip(decoded, planes))


def test_large_codebooks_are_fitted():
    rng = np.random.default_rng(4)
    planes = [rng.integers(0, 65536, 300), rng.integers(0, 8192, 300)]
    coder = Coder(fit(planes, np.array([100, 200]), [65536, 8192]), [1, 1])
    assert all(np.array_equal(a, b) for a, b in zip(coder.decode(coder.encode(planes), 300, 2), planes))
