"""Lossless coding of planes of codes: a range coder with static tables, selected for each code by its context.

Each codebook has a few classes with one probability table each. The class of a code depends on the codes of coarser
codebooks at the same time and on the codebook's own previous code. It is computed level by level: a source's code is
mapped to one of a few reduced codes, and this and the current class give the next class. Tables are integers that sum
to 2**24, so coding is identical on every machine. The coder is `constriction`'s range coder (Bamler, arXiv:2201.01741).

A segment of SEGMENT_FRAMES frames is one stream of 32-bit words, codebook after codebook, each in time order. The
first k codebooks can be read without the others. Reading a crop of a long utterance decodes only its own segments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.format.validate import read_npz

PRECISION = 24
"""log2 of the sum of a table's probabilities, as defined by constriction."""
LEVELS_PER_BIT = 8
"""Resolution of stored probabilities: 2**(-level / 8)."""
RAREST = 255
SEGMENT_FRAMES = 3000
PREVIOUS = -1
"""Level source: the codebook's own previous code."""

Plane = NDArray[np.integer]


@dataclass(frozen=True, kw_only=True)
class Level:
    """One step from classes to finer ones: after = merge[before * reduced + reduce[code of the source]]."""

    source: int
    """A coarser codebook, or PREVIOUS."""
    reduce: NDArray[np.uint8]
    """[size of the source's codebook], plus 1 for PREVIOUS: the value before a segment's first code."""
    merge: NDArray[np.uint8]
    """[classes before * reduced codes]."""

    @property
    def reduced(self) -> int:
        return int(self.reduce.max()) + 1

    @property
    def classes(self) -> int:
        return int(self.merge.max()) + 1


@dataclass(frozen=True, kw_only=True)
class Book:
    """Coding tables of one codebook: probability of code v in class c ~ 2**((step * ratio[c, v] - base[v]) / 8)."""

    base: NDArray[np.uint8]
    """[V]."""
    step: int = 1
    ratio: NDArray[np.int8]
    """[classes, V], deviation of each class from the overall distribution."""
    levels: tuple[Level, ...] = field(default=())

    @property
    def classes(self) -> int:
        return len(self.ratio)


def weights(book: Book) -> NDArray[np.int64]:
    """Probabilities [classes, V] of a codebook's codes minus one unit, in units of 2**-24, in integer arithmetic."""
    level = np.clip(book.base.astype(np.int64) - book.step * book.ratio.astype(np.int64), 0, RAREST)
    roots = np.array([int(2 ** (30 - i / LEVELS_PER_BIT)) for i in range(LEVELS_PER_BIT)], np.int64)
    shares = roots[level % LEVELS_PER_BIT] >> (level // LEVELS_PER_BIT)
    total = (1 << PRECISION) - len(book.base)  # the coder adds one to each: every code can be coded
    found = shares * total // shares.sum(axis=1, keepdims=True)
    likeliest = found.argmax(axis=1)
    found[np.arange(len(found)), likeliest] += total - found.sum(axis=1)
    return found


def aligned(plane: Plane, count: int) -> Plane:
    """Align a coarser plane to the times of `count` codes of a plane with another rate."""
    return plane if len(plane) == count else plane[np.arange(count) * len(plane) // count]


def _table(row: NDArray[np.int64]) -> Any:
    import constriction

    # integers below 2**24 with the sum that the coder scales to: its arithmetic is exact
    return constriction.stream.model.Categorical(row.astype(np.float64), perfect=False)


class _BookCoder:
    """Tables of a codebook in the coder's representation."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.models = [_table(row) for row in weights(book)]
        self.known = [level for level in book.levels if level.source != PREVIOUS]
        self.before = next((level.reduce for level in book.levels if level.source == PREVIOUS), None)
        self.grid = self._grid()

    def _grid(self) -> NDArray[np.integer]:
        """Class of each (known context, reduced previous code)."""
        classes: NDArray[np.integer] = np.zeros((), np.int64)
        for level in self.book.levels:
            classes = level.merge[classes[..., None].astype(np.int64) * level.reduced + np.arange(level.reduced)]
        sources = [level.source for level in self.book.levels]
        classes = np.moveaxis(classes, sources.index(PREVIOUS), -1) if PREVIOUS in sources else classes[..., None]
        return classes.reshape(-1, classes.shape[-1])

    @cached_property
    def rows(self) -> list[list[Any]]:
        """Return the grid with coder models as entries: two look-ups per code."""
        return [[self.models[c] for c in row] for row in self.grid.tolist()]

    @cached_property
    def before_list(self) -> list[int]:
        return [] if self.before is None else self.before.tolist()

    def contexts(self, planes: Sequence[Plane], count: int) -> NDArray[np.int64]:
        """Row of the grid for each code, [count], from the coarser planes."""
        found = np.zeros(count, np.int64)
        for level in self.known:
            found = found * level.reduced + level.reduce[aligned(planes[level.source], count)]
        return found

    def encode(self, coder: Any, plane: Plane, coarser: Sequence[Plane]) -> None:
        symbols = plane.astype(np.int32)
        if not self.book.levels:
            coder.encode(symbols, self.models[0])
            return
        before: NDArray[np.integer] = np.zeros(len(plane), np.int64)
        if self.before is not None:
            before = self.before[np.concatenate([[len(self.book.base)], plane[:-1]])]
        classes = self.grid[self.contexts(coarser, len(plane)), before]
        for symbol, c in zip(symbols.tolist(), classes.tolist()):
            coder.encode(symbol, self.models[c])

    def decode(self, coder: Any, count: int, coarser: Sequence[Plane]) -> NDArray[np.uint16]:
        decode = coder.decode
        if not self.book.levels:
            return decode(self.models[0], count).astype(np.uint16)
        contexts, rows = self.contexts(coarser, count).tolist(), self.rows
        if self.before is None:
            return np.array([decode(rows[i][0]) for i in contexts], np.uint16)
        symbol, found, before = len(self.book.base), [], self.before_list
        for i in contexts:
            symbol = decode(rows[i][before[symbol]])
            found.append(symbol)
        return np.array(found, np.uint16)


class Coder:
    """Encodes and decodes the segments of one shard with its tables.

    codes_per_frame: one value per codebook, as in the codec card.
    """

    def __init__(self, books: Sequence[Book], codes_per_frame: Sequence[int]) -> None:
        self.books = tuple(books)
        self.codes_per_frame = tuple(codes_per_frame)
        self._coders: dict[int, _BookCoder] = {}  # created on first use: many readers need few codebooks

    def encode(self, planes: Sequence[Plane]) -> NDArray[np.uint32]:
        """Encode each codebook's plane [frames * its codes per frame] to the words of a segment."""
        import constriction

        coder = constriction.stream.queue.RangeEncoder()
        for k, plane in enumerate(planes):
            if len(plane):
                self._book(k).encode(coder, plane, planes[:k])
        return coder.get_compressed()

    def decode(self, words: NDArray[np.integer], frames: int, num_codebooks: int) -> list[NDArray[np.uint16]]:
        """Decode the planes of the first `num_codebooks` codebooks of a segment of `frames` frames."""
        import constriction

        coder = constriction.stream.queue.RangeDecoder(np.asarray(words, np.uint32))
        planes: list[NDArray[np.uint16]] = []
        for k in range(num_codebooks):
            planes.append(self._book(k).decode(coder, frames * self.codes_per_frame[k], planes))
        return planes

    def _book(self, k: int) -> _BookCoder:
        if k not in self._coders:
            self._coders[k] = _BookCoder(self.books[k])
        return self._coders[k]

    # ------------------------------------------------------------ on disk

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Tables as a few flat arrays, the content of the shard's `tables.npz`."""
        levels = [level for book in self.books for level in book.levels]
        return {
            "layout": np.frombuffer(json.dumps([_layout(book) for book in self.books]).encode(), np.uint8),
            "base": np.concatenate([book.base for book in self.books]),
            "ratio": np.concatenate([book.ratio.ravel() for book in self.books]),
            "reduce": np.concatenate([level.reduce for level in levels] or [np.zeros(0, np.uint8)]),
            "merge": np.concatenate([level.merge for level in levels] or [np.zeros(0, np.uint8)]),
        }

    @classmethod
    def from_bytes(cls, content: bytes, codes_per_frame: Sequence[int]) -> Coder:
        """Read `tables.npz`. Raises ValueError for damaged tables."""
        arrays = read_npz(content)
        taken = dict.fromkeys(arrays, 0)

        def take(name: str, count: int) -> NDArray[Any]:
            first = taken[name]
            taken[name] += count
            return arrays[name][first : first + count]

        books = []
        for shape in json.loads(arrays["layout"].tobytes()):
            size, classes = shape["size"], shape["classes"]
            levels = tuple(
                Level(source=source, reduce=take("reduce", reduce), merge=take("merge", merge))
                for source, reduce, merge in shape["levels"]
            )
            ratio = take("ratio", size * classes).reshape(classes, size)
            books.append(Book(base=take("base", size), step=shape["step"], ratio=ratio, levels=levels))
        return cls(books, codes_per_frame)


def _layout(book: Book) -> dict[str, Any]:
    levels = [[level.source, len(level.reduce), len(level.merge)] for level in book.levels]
    return {"size": len(book.base), "classes": book.classes, "step": book.step, "levels": levels}
