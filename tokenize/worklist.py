"""Remaining inputs of a task. One pass over the sources also checks the inputs that were encoded before."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.format.layout import load_json, shard_path
from codecssl.tokenize.sources.changes import first_changed, source_hashes
from codecssl.tokenize.sources.sources import Input, is_stream, read_sources


class Todo:
    """Iterate over the inputs that this task has still to encode, in one pass over the sources, with their shards."""

    def __init__(self, config: TokenizeConfig, compare: bool) -> None:
        self.config, self.compare = config, compare
        self.shards = 0
        """Number of shards of the whole dataset; known after the pass."""
        self.places: deque[tuple[int, str]] = deque()
        """Shard of each pending input, and the sha256 over the shard's inputs up to it."""
        self.digests: dict[int, str] = {}
        """sha256 over the inputs of each unfinished shard of this task; known once all of them are yielded."""

    def __iter__(self) -> Iterator[Input]:
        first = self._first_unfinished() if any(map(is_stream, self.config.sources)) else 0
        self.shards = first  # finished shards of a stream are neither fetched again nor compared
        skip = first * self.config.shard_inputs
        numbered = enumerate(read_sources(list(self.config.sources), skip), skip)
        for shard, group in groupby(numbered, key=lambda pair: pair[0] // self.config.shard_inputs):
            self.shards = shard + 1
            if shard % self.config.tasks == self.config.task:
                yield from self._of_shard(shard, (item for _, item in group))

    def _first_unfinished(self) -> int:
        shard = 0
        while shard_path(self.config.output, shard).with_suffix(".json").exists():
            shard += 1
        return shard

    def _of_shard(self, shard: int, inputs: Iterator[Input]) -> Iterator[Input]:
        record = shard_path(self.config.output, shard).with_suffix(".json")
        finished, digest = record.exists(), hashlib.sha256()
        done, so_far = _done(self.config.output, shard)
        encoded: list[Input] = []
        for number, item in enumerate(inputs, 1):
            digest.update(item.digest())
            if finished or number <= done:
                encoded.append(item)
            if not finished and number == done:
                if so_far not in (None, digest.hexdigest()):
                    what = f"the sources changed since shard {shard:05d} was begun"
                    raise UserError(f"{self.config.output}: {what}; give another --output")
                self._compare(encoded, _work(self.config.output, shard))
            if not finished and number > done:
                self.places.append((shard, digest.hexdigest()))
                yield item
        if not finished:
            self.digests[shard] = digest.hexdigest()
            return
        if load_json(record)["inputs_sha256"] != digest.hexdigest():
            raise UserError(
                f"{self.config.output}: the sources changed since shard {shard:05d} was written; give another --output"
            )
        self._compare(encoded, record)

    def _compare(self, items: list[Input], written: Path) -> None:
        """Refuse audio that changed after it was encoded into `written`.

        `written` is a shard's record, or the folder of an unfinished shard. plan.json is older than all encoded inputs,
        unless a repair rewrote it.
        """
        if not self.compare:
            return
        since = min(path.stat().st_mtime for path in (self.config.output / "plan.json", _oldest(written)))
        if changed := first_changed(items, since, lambda: source_hashes(_blocks(written))):
            root = self.config.output
            how = f"`codecssl-tokenize repair {root}`" if (root / "dataset.json").exists() else "run again"
            raise UserError(
                f"{root}: {changed} changed since it was encoded; put it back, or remove {written} and {how} to encode "
                "it again, or give another --output"
            )

    def left(self, inputs: int | None) -> int | None:
        """Return how many of the dataset's `inputs` the pass will yield."""
        if inputs is None:
            return None
        size, left = self.config.shard_inputs, 0
        for shard in range(self.config.task, -(-inputs // size), self.config.tasks):
            if not shard_path(self.config.output, shard).with_suffix(".json").exists():
                left += min(size, inputs - shard * size) - _done(self.config.output, shard)[0]
        return left


def _work(root: Path, shard: int) -> Path:
    """Return the folder of an unfinished shard's blocks."""
    return root / "work" / f"{shard:05d}"


def _oldest(written: Path) -> Path:
    return written / "00000.json" if written.is_dir() else written


def _blocks(written: Path) -> list[tuple[Path, int]]:
    """Return the file and offset of each block."""
    if written.is_dir():
        return [(path, 0) for path in sorted(written.glob("*.block"))]
    return [(written.with_suffix(".tar"), place["offset"]) for place in load_json(written)["blocks"]]


def _done(root: Path, shard: int) -> tuple[int, str | None]:
    """Return the number of a shard's inputs in complete blocks, and the sha256 over them."""
    folder, done, so_far, block = _work(root, shard), 0, None, 0
    while (path := folder / f"{block:05d}.json").exists():
        part = load_json(path)
        done, so_far = done + part["inputs"], part.get("inputs_sha256")
        block += 1
    return done, so_far
