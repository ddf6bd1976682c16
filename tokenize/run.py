"""Encode audio to token shards (`codecssl-tokenize run`).

The bytes of the shards do not depend on the number of tasks or of interruptions.

Input i of the stream of sources belongs to shard i // shard_inputs, and shard s to task s % tasks. A task encodes its
shards block by block; a finished block is never encoded again. The task that sees the last shard finished writes
dataset.json.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from codecssl.tokenize.codec import Codec, CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import alone_in, names_in, write_atomic
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.encode import Device, default_workers, encode_inputs, readable
from codecssl.tokenize.format.layout import COMPRESSION, load_json, sealed, shard_path
from codecssl.tokenize.format.records import EncodedUtterance, Failure
from codecssl.tokenize.format.validate import check_plan
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset, replace_shards, tidy, to_json
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.progress import Progress, reported
from codecssl.tokenize.sources.decoder import DECODING
from codecssl.tokenize.sources.sources import is_stream, left_out, read_sources
from codecssl.tokenize.worklist import RETRY, Retry, Todo

# ---------------------------------------------------------------- the plan


STDIN = "stdin.jsonl"
"""Copy in the dataset's folder of a list read from standard input."""
SIZES = ("shard_inputs", "block_inputs", "block_seconds")


def open_plan(
    config: TokenizeConfig, card: CodecCard, inputs: int | None, mel: MelSpec | None = None
) -> dict[str, Any]:
    """Read or write plan.json, the settings that all tasks of a dataset must share.

    Raises UserError if the folder was started with another codec, other sources or other sizes.
    """
    plan = {
        "codec": card.to_dict(),
        "sources": [str(s) for s in config.sources],
        "inputs": inputs,
        "decoding": DECODING,
        **({"compression": COMPRESSION} if config.entropy_code else {}),
        **({"mel": mel.to_dict()} if mel else {}),
    } | {size: getattr(config, size) for size in SIZES}
    path = config.output / "plan.json"
    if not path.exists():
        refuse_foreign(config.output)
        config.output.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_json(sealed(plan)))
        return plan
    begun = load_json(path)
    check_plan(begun, path)
    theirs = CodecCard.from_dict(begun["codec"])
    if theirs.fingerprint != card.fingerprint:
        raise UserError(
            f"{config.output}: begun with codec {theirs.name}, this run has {card.name} ({theirs.difference(card)}); "
            "give the same --codec and --num-codebooks, or another --output"
        )
    for key in ("sources", "compression", "mel", *SIZES):
        if _stated(begun, key) != _stated(plan, key):
            raise UserError(
                f"{config.output}: begun with {key} {begun.get(key)}, this run has {plan.get(key)}; "
                "give the same or another --output"
            )
    if begun.get("inputs", inputs) != inputs:
        raise UserError(
            f"{config.output}: the sources changed: {inputs} inputs, {begun['inputs']} when it was begun; "
            "give another --output"
        )
    return begun


def _mel_spec(config: TokenizeConfig, card: CodecCard) -> MelSpec | None:
    """Return the log-mel plane of a run; None without --with-mel. A folder that was begun keeps its mel scale."""
    if not config.mel_bands:
        return None
    begun = load_json(path) if (path := config.output / "plan.json").exists() else {}
    stored = begun.get("mel")
    scale = MelSpec.from_dict(stored).scale if isinstance(stored, dict) else "htk"
    return MelSpec.for_codec(config.mel_bands, card, config.mel_scale or scale)


def _stated(plan: dict[str, Any], key: str) -> Any:
    """Return a value of a plan in the form used to compare plans."""
    value = plan.get(key)
    return MelSpec.from_dict(value) if key == "mel" and value else value


def refuse_foreign(output: Path) -> None:
    """Raise UserError for a file, or for a folder with files not created by codecssl."""
    if output.is_file():
        raise UserError(f"{output}: a file; give a folder as --output")
    foreign = names_in(output) if output.is_dir() else set()
    if foreign and not any((output / name).exists() for name in (STDIN, "plan.json")):  # may appear concurrently
        raise UserError(f"{output}: not empty and not a dataset of ours; give a new folder as --output")


def count_inputs(config: TokenizeConfig) -> int | None:
    """Return the number of inputs of all sources; None if counting would download them."""
    if any(is_stream(source) for source in config.sources):
        next(read_sources(list(config.sources)))  # report a missing source before creating anything
        return None
    left_out.clear()
    count = sum(1 for _ in read_sources(list(config.sources)))
    if left_out and config.task == 0:
        what = ", ".join(f"{number} {suffix}" for suffix, number in sorted(left_out.items()))
        print(f"note: left out of the folders: {what}; name files in a manifest to take them", file=sys.stderr)
    return count


# ---------------------------------------------------------------- the run

FEW_FAILURES = 256
"""Number of failed inputs below which a retry starts no worker processes."""


class Stopped(Exception):  # noqa: N818  (not an error)
    """The run stopped on request between two blocks. All encoded inputs are on disk."""


def run(
    config: TokenizeConfig,
    on_progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    *,
    compare: bool = True,
) -> dict[str, Any] | None:
    """Encode this task's shards. Return the dataset's totals, or None while other tasks' shards are missing.

    `stop` is called after each block; if it returns true, Stopped is raised. With `compare`, audio that this task
    encoded before must be unchanged. Names, labels and places are always compared. Raises UserError for sources that
    changed after they were encoded, and for the folder of another dataset.
    """
    try:
        return _run(config, on_progress, stop, compare)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{config.output}: disk full; make room and run the same command again, nothing is lost"
            ) from error
        if error.errno == errno.ENOENT and Path(error.filename or "").is_relative_to(config.output / "work"):
            raise UserError(
                f"{config.output}: another process finished a shard of this task; give all the same --tasks and each "
                "its own --task, then run the same command again: nothing is lost"
            ) from error
        raise


def _run(
    config: TokenizeConfig, on_progress: Callable[[Progress], None], stop: Callable[[], bool], compare: bool
) -> dict[str, Any] | None:
    torch.set_num_threads(1 if config.device == "cpu" else torch.get_num_threads())
    device = Device(codec=config.codec, num_codebooks=config.num_codebooks, device=config.device)
    codec = device.load()
    mel = _mel_spec(config, codec.card)
    plan = open_plan(config, codec.card, inputs := count_inputs(config), mel)
    finished = (config.output / "dataset.json").exists() and not config.retry_failed
    if compare and plan.get("decoding", 1) != DECODING and not finished:
        raise UserError(
            f"{config.output}: begun with a release that decoded MP3 and Ogg with another library; finish it with that "
            "release, or give another --output"
        )
    gpus = torch.cuda.device_count()
    workers = default_workers(config.device, gpus) if config.workers is None else config.workers
    with alone_in(config.output, f".{config.task}-of-{config.tasks}.lock"):
        if not (config.retry_failed and (config.output / "dataset.json").exists()):
            _replace_shards(config)  # of a retry that was interrupted
        todo = Todo(config, compare)
        results = encode_inputs(device, codec, todo, workers, mel)
        _consume(config, codec.card, todo, reported(results, codec.card, todo.left(inputs), on_progress), stop)
        if config.retry_failed:
            retry = Retry(config, compare)
            again = _retried(config, device, codec, workers, mel, retry)
            retrying = replace(config, output=retry.folder)
            _consume(retrying, codec.card, retry, reported(again, codec.card, retry.left(), on_progress), stop)
    if not config.retry_failed:
        return _finished(config, plan, todo.shards)
    with alone_in(config.output, ".retry.lock", wait=config.tasks > 1):  # other tasks may replace shards
        _replace_shards(config)
        return _finished(config, plan, todo.shards)


def _replace_shards(config: TokenizeConfig) -> None:
    replace_shards(config.output, config.output / RETRY, lambda shard: shard % config.tasks == config.task)


def _retried(
    config: TokenizeConfig, device: Device, codec: Codec, workers: int, mel: MelSpec | None, retry: Retry
) -> Iterator[EncodedUtterance | Failure]:
    """Return the results of all inputs of the shards that hold failed inputs which can be read now."""
    total = sum(retry.failed.values())
    few = total < FEW_FAILURES
    if any(is_stream(source) for source in config.sources):  # a test would download them once more
        retry.chosen |= set(retry.failed)
    elif total:
        found = retry.choose(readable(codec.card, retry.failures(), 0 if few else workers))
        print(f"note: {found} of {total} inputs that failed before can be read now", file=sys.stderr)
    return encode_inputs(device, codec, retry, 0 if few else workers, mel) if retry.chosen else iter(())


def _finished(config: TokenizeConfig, plan: dict[str, Any], shards: int) -> dict[str, Any] | None:
    """Write the dataset's own files and return its totals; None while a shard is missing."""
    if any(not shard_path(config.output, s).with_suffix(".json").exists() for s in range(shards)):
        return None
    totals = finish_dataset(config.output, plan, shards)
    tidy(config.output)
    return totals


def _consume(
    config: TokenizeConfig,
    card: CodecCard,
    todo: Todo | Retry,
    results: Iterator[EncodedUtterance | Failure],
    stop: Callable[[], bool],
) -> None:
    """Write results, in the order of `todo`, to blocks and shards. Stops only between two blocks."""
    writer: _BlockWriter | None = None
    for result in results:
        shard, so_far = todo.places.popleft()
        if writer is not None and writer.shard != shard:
            writer.finish(todo.digests.pop(writer.shard))
            writer = None
        if (writer is None or writer.idle) and stop():
            raise Stopped
        writer = writer or _BlockWriter(config, card, shard)
        writer.add(result, so_far)
    if writer is not None:
        writer.finish(todo.digests.pop(writer.shard))
    for shard, digest in todo.digests.items():  # killed after their last block
        _BlockWriter(config, card, shard).finish(digest)


class _BlockWriter:
    """Group a shard's results into blocks."""

    def __init__(self, config: TokenizeConfig, card: CodecCard, shard: int) -> None:
        self.config, self.card, self.shard = config, card, shard
        self.writer = ShardWriter(config.output, shard, card, entropy_code=config.entropy_code)
        self._clear()

    def _clear(self) -> None:
        self.utterances: list[EncodedUtterance] = []
        self.failures: list[Failure] = []
        self.samples = 0

    @property
    def idle(self) -> bool:
        """True if all added results are on disk."""
        return not self.utterances and not self.failures

    def add(self, result: EncodedUtterance | Failure, so_far: str) -> None:
        """Add a result. `so_far` is the sha256 over the shard's inputs up to this one."""
        self.so_far = so_far
        if isinstance(result, Failure):
            self.failures.append(result)
        else:
            self.utterances.append(result)
            self.samples += result.samples
        full = len(self.utterances) + len(self.failures) >= self.config.block_inputs
        if full or self.samples >= self.config.block_seconds * self.card.sample_rate:
            self._flush()

    def _flush(self) -> None:
        count = len(self.utterances) + len(self.failures)
        self.writer.add_block(count, self.utterances, self.failures, self.so_far)
        self._clear()

    def finish(self, digest: str) -> None:
        if self.utterances or self.failures:
            self._flush()
        self.writer.finish(digest)
