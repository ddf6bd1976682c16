"""`codecssl-tokenize run`: audio in, shards out, in any number of tasks and after any number of kills the same bytes.

Input i of the stream of sources belongs to shard i // shard_inputs, and shard s to task s % tasks. A task encodes its
shards block by block; a finished block is never encoded again. The task that sees the last shard finished writes
dataset.json.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from codecssl.tokenize.audio import AudioReader, sha256_of
from codecssl.tokenize.codec import Codec, CodecCard, load_codec
from codecssl.tokenize.errors import UserError
from codecssl.tokenize.shards import load_json, shard_path
from codecssl.tokenize.sources import Input, read_sources
from codecssl.tokenize.writer import Encoded, Failure, ShardWriter, finish_dataset, to_json, write_atomic


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What `codecssl-tokenize run` was asked for."""

    sources: tuple[str, ...]
    output: Path
    codec: str = "tiny_16khz"
    num_codebooks: int | None = None
    device: str = "cpu"
    tasks: int = 1
    task: int = 0
    workers: int | None = None
    """Processes that decode and encode; None is one per core on a CPU, 0 works in this process."""
    shard_inputs: int = 8192
    """Inputs per shard."""
    block_inputs: int = 2048
    """Inputs per block, at most: a kill loses a block at most."""
    block_seconds: float = 7200.0
    """A block is closed early when it holds this much audio."""

    def __post_init__(self) -> None:
        if self.tasks < 1 or not 0 <= self.task < self.tasks:
            raise UserError(f"task {self.task} of {self.tasks}: --task counts from 0 to --tasks - 1")
        for name in ("shard_inputs", "block_inputs", "block_seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} {getattr(self, name)}: must be above 0")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers {self.workers}: must be 0 or more")


@dataclass(frozen=True)
class Progress:
    """Sent after each input."""

    inputs: int
    seconds: float
    """Of audio encoded by this task in this run."""
    failed: int


# ---------------------------------------------------------------- one input


def encode_input(codec: Codec, item: Input) -> Encoded | Failure:
    """Read and encode one input in bounded memory; what cannot be read becomes a Failure, never an exception."""
    try:
        return _encode(codec, item)
    except UserError as error:
        return Failure(id=item.id, path=item.path, reason=str(error))
    except (OSError, RuntimeError, ValueError) as error:
        # a decoder's surprise costs its file, not the run; a full disk or memory is not the file's fault
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
            raise
        return Failure(id=item.id, path=item.path, reason=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")


def _encode(codec: Codec, item: Input) -> Encoded:
    path, card = Path(item.file), codec.card
    digest = sha256_of(path)
    reader = AudioReader(path, card.sample_rate, item.start, item.end)
    stream, samples, pieces = codec.stream(), 0, []
    for block in reader.blocks():
        samples += len(block)
        pieces.append(stream.push(torch.from_numpy(np.ascontiguousarray(block))).cpu())
    pieces.append(stream.finish().cpu())
    if samples == 0:
        raise UserError(f"no samples left at {card.sample_rate} Hz: {reader.source_samples} at {reader.source_rate} Hz")
    codes = torch.cat(pieces, dim=1).numpy().astype(np.uint16)
    return Encoded(
        id=item.id,
        path=item.path,
        codes=list(codes),
        samples=samples,
        source_sha256=digest,
        source_rate=reader.source_rate,
        source_samples=reader.source_samples,
        labels=item.labels,
    )


class _Encoder(Dataset[Any]):
    """Encodes in a DataLoader's workers: ordered, prefetched, and gone when the main process is."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.codec: Codec | None = None

    def __getitem__(self, item: Any) -> Encoded | Failure:
        if self.codec is None:
            torch.set_num_threads(1)  # the bits of a convolution may depend on the number of threads
            self.codec = load_codec(
                self.config.codec, num_codebooks=self.config.num_codebooks, device=self.config.device
            )
        return encode_input(self.codec, item)


# ---------------------------------------------------------------- the plan


def open_plan(config: RunConfig, card: CodecCard) -> dict[str, Any]:
    """Read or write plan.json: all that every task of a dataset must agree on.

    Raises UserError when the folder was begun with another codec, other sources or other sizes.
    """
    plan = {
        "codec": card.to_dict(),
        "sources": [str(s) for s in config.sources],
        "shard_inputs": config.shard_inputs,
        "block_inputs": config.block_inputs,
        "block_seconds": config.block_seconds,
    }
    path = config.output / "plan.json"
    if not path.exists():
        if config.output.is_dir() and any(config.output.iterdir()):
            raise UserError(f"{config.output}: not empty and not a dataset of ours; give a new folder as --output")
        config.output.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_json(plan))
        return plan
    begun = load_json(path)
    theirs = CodecCard.from_dict(begun["codec"])
    if theirs.fingerprint != card.fingerprint:
        raise UserError(
            f"{config.output}: begun with codec {theirs.name}, this run has {card.name} ({theirs.difference(card)}); "
            "give the same --codec or another --output"
        )
    for key in ("sources", "shard_inputs", "block_inputs", "block_seconds"):
        if begun[key] != plan[key]:
            raise UserError(
                f"{config.output}: begun with {key} {begun[key]}, this run has {plan[key]}; "
                "give the same or another --output"
            )
    return begun


def shards_of(config: RunConfig) -> Iterator[tuple[int, Iterator[Input]]]:
    """(shard, its inputs) of the whole stream, in order."""
    numbered = enumerate(read_sources(list(config.sources)))
    for shard, group in groupby(numbered, key=lambda pair: pair[0] // config.shard_inputs):
        yield shard, (item for _, item in group)


# ---------------------------------------------------------------- the run


def run(config: RunConfig, report: Callable[[Progress], None] = lambda _: None) -> dict[str, Any] | None:
    """Encode this task's shards. Return the dataset's totals, or None while other tasks' shards are missing.

    Raises UserError for sources that changed since a shard was written, and for a folder of another dataset.
    """
    torch.set_num_threads(1 if config.device == "cpu" else torch.get_num_threads())
    card = load_codec(config.codec, num_codebooks=config.num_codebooks, device=config.device).card
    next(read_sources(list(config.sources)))  # a missing folder is told before anything is made
    plan = open_plan(config, card)
    todo = _Todo(config)
    loader = DataLoader(
        _Encoder(config),
        sampler=todo,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=(workers := _workers(config)),
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=4 if workers else None,
    )
    try:
        _consume(config, card, todo, iter(loader), report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{config.output}: disk full; make room and run the same command again, nothing is lost"
            ) from error
        raise
    if any(not shard_path(config.output, s).with_suffix(".json").exists() for s in range(todo.shards)):
        return None
    totals = finish_dataset(config.output, plan, todo.shards)
    if (work := config.output / "work").is_dir() and not any(work.iterdir()):
        work.rmdir()
    return totals


class _Todo:
    """The inputs that this task has still to encode, as the loader asks for them, and where each one goes."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.shards = 0
        self.order: list[tuple[int, int, int, str]] = []
        """(shard, inputs done before, inputs left, sha256 over all of them) for each unfinished shard of ours."""
        for shard, inputs in shards_of(config):
            self.shards = shard + 1
            count, digest = _digest(inputs)
            if shard % config.tasks == config.task and not self._finished(shard, digest):
                done = _done(config.output, shard)
                self.order.append((shard, done, count - done, digest))

    def _finished(self, shard: int, digest: str) -> bool:
        mark = shard_path(self.config.output, shard).with_suffix(".json")
        if not mark.exists():
            return False
        if load_json(mark)["inputs_sha256"] != digest:
            raise UserError(
                f"{self.config.output}: the sources changed since shard {shard:05d} was written; give another --output"
            )
        return True

    def __iter__(self) -> Iterator[Input]:
        done_before = {shard: done for shard, done, _, _ in self.order}
        for shard, inputs in shards_of(self.config):
            if shard in done_before:
                yield from islice(inputs, done_before[shard], None)

    def __len__(self) -> int:
        return sum(left for _, _, left, _ in self.order)


def _digest(inputs: Iterator[Input]) -> tuple[int, str]:
    digest, count = hashlib.sha256(), 0
    for item in inputs:
        digest.update(item.digest())
        count += 1
    return count, digest.hexdigest()


def _done(root: Path, shard: int) -> int:
    folder, done, block = root / "work" / f"{shard:05d}", 0, 0
    while (part := folder / f"{block:05d}.json").exists():
        done += load_json(part)["inputs"]
        block += 1
    return done


def _consume(
    config: RunConfig,
    card: CodecCard,
    todo: _Todo,
    results: Iterator[Encoded | Failure],
    report: Callable[[Progress], None],
) -> None:
    """Put the loader's results, which come in order, into blocks and shards."""
    inputs, seconds, failed = 0, 0.0, 0
    for shard, _, todo_here, digest in todo.order:
        writer = ShardWriter(config.output, shard, card)
        utterances: list[Encoded] = []
        failures: list[Failure] = []
        held = 0.0
        for left in range(todo_here, 0, -1):
            result = next(results)
            inputs += 1
            if isinstance(result, Failure):
                failures.append(result)
                failed += 1
            else:
                utterances.append(result)
                held += result.samples / card.sample_rate
                seconds += result.samples / card.sample_rate
            report(Progress(inputs, seconds, failed))
            full = len(utterances) + len(failures) >= config.block_inputs or held >= config.block_seconds
            if full or left == 1:
                writer.add_block(len(utterances) + len(failures), utterances, failures)
                utterances, failures, held = [], [], 0.0
        writer.finish(digest)


def _workers(config: RunConfig) -> int:
    if config.workers is not None:
        return config.workers
    if config.device != "cpu":
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
