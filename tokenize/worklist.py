"""Inputs that a task has still to encode, and inputs that failed and are to be tried again."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.format.layout import load_json, shard_path
from codecssl.tokenize.format.stored import stored_places
from codecssl.tokenize.sources.changes import first_changed, source_hashes
from codecssl.tokenize.sources.inputs import KeptInput
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
                if self.compare:
                    _refuse_changed(self.config.output, encoded, _work(self.config.output, shard))
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
        if self.compare:
            _refuse_changed(self.config.output, encoded, record)

    def left(self, inputs: int | None) -> int | None:
        """Return how many of the dataset's `inputs` the pass will yield."""
        if inputs is None:
            return None
        size, left = self.config.shard_inputs, 0
        for shard in range(self.config.task, -(-inputs // size), self.config.tasks):
            if not shard_path(self.config.output, shard).with_suffix(".json").exists():
                left += min(size, inputs - shard * size) - _done(self.config.output, shard)[0]
        return left


def _refuse_changed(root: Path, items: list[Input], written: Path) -> None:
    """Raise UserError for audio that changed after it was encoded into `written`.

    `written` is a shard's mark, or the folder of an unfinished shard. plan.json is older than all encoded inputs,
    unless a repair rewrote it.
    """
    since = min(path.stat().st_mtime for path in (root / "plan.json", _oldest(written)))
    if changed := first_changed(items, since, lambda: source_hashes(_blocks(written))):
        how = f"`codecssl-tokenize repair {root}`" if (root / "dataset.json").exists() else "run again"
        raise UserError(
            f"{root}: {changed} changed since it was encoded; put it back, or remove {written} and {how} to encode "
            "it again, or give another --output"
        )


RETRY = "retry"
"""Folder in the dataset's folder in which shards with inputs that failed are written again."""


class Retry:
    """Finished shards of this task in which inputs failed. Iterate to get all inputs of those to be written again.

    `failures` yields the inputs that failed, and `choose` selects the shards. Inputs that were encoded are KeptInputs.
    As in `Todo`, `places` and `digests` describe the inputs.
    """

    def __init__(self, config: TokenizeConfig, compare: bool) -> None:
        self.config, self.compare, self.folder = config, compare, config.output / RETRY
        self.places: deque[tuple[int, str]] = deque()
        self.digests: dict[int, str] = {}
        self.failed: dict[int, int] = {}
        """Number of failed inputs of each shard that has any."""
        numbers = (int(path.stem) for path in (config.output / "shards").glob("*.json") if path.stem.isdecimal())
        for shard in sorted(number for number in numbers if number % config.tasks == config.task):
            failed = load_json(_mark(config.output, shard))["failed"]
            if failed and not _mark(self.folder, shard).exists():  # else written again by a run that was stopped
                self.failed[shard] = len(failed)
        self.chosen = {shard for shard in self.failed if _work(self.folder, shard).is_dir()}
        """Shards to be written again. An interrupted retry has begun some."""

    def choose(self, readable: Iterator[bool]) -> int:
        """Choose the shards with readable inputs, of those that `failures` yields. Return how many are readable."""
        count = 0
        for shard, number in self.failed.items():
            found = sum(islice(readable, number))
            count += found
            if found:
                self.chosen.add(shard)
        return count

    def failures(self) -> Iterator[Input]:
        """Yield the inputs that failed, shard by shard. Raises UserError if the sources changed."""
        for _, mark, inputs in self._shards(set(self.failed)):
            failed = {row["id"] for row in mark["failed"]}
            yield from (item for item in inputs if item.id in failed)

    def __iter__(self) -> Iterator[Input]:
        for shard, mark, inputs in self._shards(set(self.chosen)):
            yield from self._of_shard(shard, mark, inputs)

    def _shards(self, wanted: set[int]) -> Iterator[tuple[int, dict[str, Any], list[Input]]]:
        """Yield number, mark and inputs of shards. The sources are read up to the last of them."""
        size = self.config.shard_inputs
        for shard, group in groupby(
            enumerate(read_sources(list(self.config.sources))), key=lambda pair: pair[0] // size
        ):
            if shard in wanted:
                wanted.remove(shard)
                inputs = [item for _, item in group]
                mark, digest = load_json(_mark(self.config.output, shard)), hashlib.sha256()
                for item in inputs:
                    digest.update(item.digest())
                if mark["inputs_sha256"] != digest.hexdigest():
                    raise UserError(
                        f"{self.config.output}: the sources changed since shard {shard:05d} was written; give another "
                        "--output"
                    )
                yield shard, mark, inputs
            if not wanted:
                return

    def _of_shard(self, shard: int, mark: dict[str, Any], inputs: list[Input]) -> Iterator[Input]:
        done, so_far = _done(self.folder, shard)
        failed, digest = {row["id"] for row in mark["failed"]}, hashlib.sha256()
        noted = {name: set(ids) for name, ids in mark.get("notes", {}).items()}
        places = stored_places(shard_path(self.config.output, shard), mark)
        if self.compare:
            encoded = [item for item in inputs if item.id not in failed]
            _refuse_changed(self.config.output, encoded, _mark(self.config.output, shard))
        for number, item in enumerate(inputs, 1):
            digest.update(item.digest())
            if item.id not in failed:
                notes = tuple(name for name, ids in sorted(noted.items()) if item.id in ids)
                stored = replace(next(places), notes=notes)
                item = KeptInput(**vars(item) | {"data": None, "stored": stored})
            if number == done and so_far not in (None, digest.hexdigest()):
                raise UserError(f"{self.folder}: begun with other sources; remove it and run again")
            if number > done:
                self.places.append((shard, digest.hexdigest()))
                yield item
        self.digests[shard] = digest.hexdigest()

    def left(self) -> int:
        """Return how many inputs the iteration will yield, at most."""
        return sum(load_json(_mark(self.config.output, s))["inputs"] - _done(self.folder, s)[0] for s in self.chosen)


def _mark(root: Path, shard: int) -> Path:
    return shard_path(root, shard).with_suffix(".json")


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
