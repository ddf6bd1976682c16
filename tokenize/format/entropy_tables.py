"""Fitting the tables of `entropy` to the codes of a shard: selection of contexts and their grouping into classes.

Lengths are rounded to multiples of 1/256 bit before they are summed, which float64 does exactly. The same codes give
the same tables, and the same bytes of a shard, for any summation order, number of threads or matrix library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.format.entropy import LEVELS_PER_BIT, PREVIOUS, RAREST, Book, Level, Plane, aligned

UNITS_PER_BIT = 256
CLASSES = (16, 32, 64, 128, 256)
MAX_LEVELS = 3
REDUCED = 16
"""Number of reduced codes per source, from the second level on."""
MAX_COUNTS = 4097 * 4096
"""Maximum number of cells of a count table. Pairs of larger codebooks are skipped."""
SMOOTHING = (10, 30, 100, 300)
"""Weight, in codes, of the overall distribution relative to the counts of a class."""
STEPS = (4, 8)

Ints = NDArray[np.int64]
Counts = NDArray[np.float64]
"""[contexts, V], integers."""


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """A book and its cost for the sample, tables included, in 1/256 bit."""

    cost: int
    book: Book


@dataclass(frozen=True, kw_only=True)
class _Source:
    number: int
    codes: Ints
    """Value of the source for each code of the plane."""
    kinds: int


def fit(planes: Sequence[Plane], frames: NDArray[np.integer], sizes: Sequence[int]) -> list[Book]:
    """Fit one Book per codebook to a sample of segments.

    planes: per codebook, the segments' codes one after another. frames: of each segment. sizes: of the codebooks.
    """
    return [_fit_book(k, planes, frames, sizes) for k in range(len(sizes))]


def _fit_book(k: int, planes: Sequence[Plane], frames: NDArray[np.integer], sizes: Sequence[int]) -> Book:
    """Add levels, each with the source that saves most, until no level pays for its tables."""
    plane, size = planes[k].astype(np.int64), sizes[k]
    classes = np.zeros_like(plane)
    best = _fit(_count(classes, 1, plane, size), ())
    sources = list(_sources(k, planes, frames, sizes))
    reductions = {s.number: _cluster(_count(s.codes, s.kinds, plane, size), REDUCED) for s in sources}
    while sources and len(best.book.levels) < MAX_LEVELS:
        tried = []
        for source in sources:
            cells, number = _cells(best.book, classes, source, reductions[source.number])
            tried.append(_extend(best.book, source, reductions[source.number], _count(cells, number, plane, size)))
        chosen = min(range(len(tried)), key=lambda i: tried[i].cost)
        if tried[chosen].cost >= best.cost:
            break
        best, source = tried[chosen], sources.pop(chosen)
        level = best.book.levels[-1]
        classes = level.merge[classes * level.reduced + level.reduce[source.codes]].astype(np.int64)
    return best.book


def _sources(k: int, planes: Sequence[Plane], frames: NDArray[np.integer], sizes: Sequence[int]) -> Iterator[_Source]:
    """Yield the previous code, the coarsest codebooks and the next coarser ones."""
    size, count = sizes[k], len(planes[k])
    if count and (size + 1) * size <= MAX_COUNTS:
        before = np.concatenate([[size], planes[k][:-1]]).astype(np.int64)
        starts = np.cumsum(frames, dtype=np.int64) - frames
        before[starts[frames > 0] * (count // int(frames.sum()))] = size
        yield _Source(number=PREVIOUS, codes=before, kinds=size + 1)
    for j in sorted({0, 1, k - 3, k - 2, k - 1}):
        if 0 <= j < k and sizes[j] * size <= MAX_COUNTS:
            yield _Source(number=j, codes=aligned(planes[j], count).astype(np.int64), kinds=sizes[j])


def _cells(book: Book, classes: Ints, source: _Source, reduce: Ints) -> tuple[Ints, int]:
    """Return each code's cell (the context for its table) after one more level, and the number of cells.

    The first level's classes are those of the source's own codes, as fine as pays off.
    """
    if not book.levels:
        return source.codes, source.kinds
    reduced = int(reduce.max()) + 1
    return classes * reduced + reduce[source.codes], book.classes * reduced


def _extend(book: Book, source: _Source, reduce: Ints, counts: Counts) -> _Fit:
    """Best fit with one more level, given the counts of its cells. The number of classes grows while it pays off."""
    best: _Fit | None = None
    for classes in CLASSES:
        groups = _cluster(counts, classes)
        maps = (reduce, groups) if book.levels else (groups, np.arange(groups.max() + 1))
        level = Level(source=source.number, reduce=maps[0].astype(np.uint8), merge=maps[1].astype(np.uint8))
        found = _fit(_grouped(counts, groups), (*book.levels, level))
        if best and found.cost >= best.cost:
            break
        best = found
        if classes >= len(counts):
            break
    assert best is not None
    return best


def _count(contexts: Ints, number: int, plane: Ints, size: int) -> Counts:
    return np.bincount(contexts * size + plane, minlength=number * size).reshape(number, size).astype(np.float64)


# ---------------------------------------------------------------- classes


def _cluster(counts: Counts, classes: int, rounds: int = 8) -> Ints:
    """Group contexts by k-means on code lengths, to minimize the bits of their codes. Return groups [contexts].

    The most frequent contexts seed the groups. A context that never occurred goes to the first group.
    """
    if classes >= len(counts):
        return np.arange(len(counts))
    totals = counts.sum(axis=1)
    centres = counts[np.argsort(-totals, kind="stable")[:classes]]
    groups = np.full(len(counts), -1)
    for _ in range(rounds):
        before, lengths = groups, _lengths(centres, 30)
        groups = (counts @ lengths.T).argmin(axis=1)
        if np.array_equal(groups, before):
            break
        centres = _grouped(counts, groups, classes)
    return np.unique(groups, return_inverse=True)[1]


def _grouped(counts: Counts, groups: Ints, number: int | None = None) -> Counts:
    number = int(groups.max()) + 1 if number is None else number
    return (groups == np.arange(number)[:, None]).astype(np.float64) @ counts  # integers: exact in any order


def _lengths(counts: Counts, smoothing: int) -> Counts:
    """Code lengths [contexts, V] as integers in 1/256 bit."""
    whole = counts.sum(axis=0) + 0.5
    shares = counts + smoothing * whole / whole.sum()
    return np.rint(-UNITS_PER_BIT * np.log2(shares / shares.sum(axis=1, keepdims=True)))


# ---------------------------------------------------------------- tables


def _fit(counts: Counts, levels: tuple[Level, ...]) -> _Fit:
    """Return the cheapest tables for counts [classes, V]."""
    whole = counts.sum(axis=0) + 0.5
    base = np.clip(np.rint(-LEVELS_PER_BIT * np.log2(whole / whole.sum())), 0, RAREST)
    best: tuple[int, Book] | None = None
    for smoothing in SMOOTHING:
        exact = base - _lengths(counts, smoothing) * (LEVELS_PER_BIT / UNITS_PER_BIT)
        for step in STEPS:
            ratio = np.clip(np.rint(exact / step), -128, 127)
            book = Book(base=base.astype(np.uint8), step=step, ratio=ratio.astype(np.int8), levels=levels)
            cost = _data_cost(counts, np.clip(base - step * ratio, 0, RAREST)) + _table_cost(book)
            if best is None or cost < best[0]:
                best = cost, book
        if len(counts) == 1:
            break
    assert best is not None
    return _Fit(cost=best[0], book=best[1])


def _data_cost(counts: Counts, level: Counts) -> int:
    sums = np.rint(UNITS_PER_BIT * np.log2((2.0 ** (-level / LEVELS_PER_BIT)).sum(axis=1)))
    return int((counts * level).sum()) * (UNITS_PER_BIT // LEVELS_PER_BIT) + int(counts.sum(axis=1) @ sums)


def _table_cost(book: Book) -> int:
    """Approximate deflated size of the tables: the order-0 entropy of the ratios, and the maps in whole bits."""
    counts = np.unique(book.ratio, return_counts=True)[1]
    bits = float(-(counts * np.log2(counts / counts.sum())).sum())
    for level in book.levels:
        bits += 320 + len(level.reduce) * np.log2(level.reduced + 1) + len(level.merge) * np.log2(level.classes + 1)
    return round(bits * UNITS_PER_BIT)
