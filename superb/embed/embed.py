"""`codecssl-superb embed`: embeddings of audio files or token shards, as Parquet that Hugging Face `datasets` opens.

    OUTPUT/embed.json               sources, upstream, layer and pooling; every later run must have the same
    OUTPUT/data/00000.parquet       id, path, labels (JSON), seconds, num_frames, embedding (a list of float32)
    OUTPUT/frames/00000.safetensors with --frames: the states [T, D] of each row, under its number in the shard
    OUTPUT/failed/00000.jsonl       inputs of that shard that could not be read
    OUTPUT/failed.jsonl             all of them; written when all shards are there

Input i belongs to shard i // shard_inputs and shard s to task s % tasks. A shard is written whole or not at all. Its
batches depend on its inputs only: a run that was killed and resumed leaves the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.superb.embed.states import LayerChoice, States, TimePooling, WaveStates
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import Upstream, parse_all
from codecssl.superb.upstreams.token_reader import TokenReader
from codecssl.tokenize.common.command_line import OnProgress
from codecssl.tokenize.common.errors import UserError, check_share
from codecssl.tokenize.common.files import alone_in, names_in, refuse_links_out, write_atomic
from codecssl.tokenize.encode import failure
from codecssl.tokenize.format.layout import load_json, sealed
from codecssl.tokenize.format.records import Failure
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources.audio import AudioReader
from codecssl.tokenize.sources.sources import Input, is_stream, read_sources

BATCH_SECONDS = 120.0
"""Audio of a batch, padding included."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Settings of `codecssl-superb embed`."""

    sources: tuple[str, ...]
    upstream: str
    output: Path
    layer: int | None = None
    """Index of the hidden state; None: the mean of all."""
    pool: str = "mean"
    """mean or meanstd, over the frames of an input."""
    frames: bool = False
    """Keep the states of every frame too."""
    device: str = "cpu"
    tasks: int = 1
    task: int = 0
    window_seconds: float = 30.0
    overlap_seconds: float = 1.0
    shard_inputs: int = 512

    def __post_init__(self) -> None:
        check_share(self.tasks, self.task)
        if self.pool not in ("mean", "meanstd"):
            raise UserError(f"--pool {self.pool}: give mean or meanstd")
        if self.shard_inputs < 1:
            raise UserError(f"--shard-inputs {self.shard_inputs}: must be at least 1")
        if not 0.0 < self.overlap_seconds < self.window_seconds / 4:
            raise UserError(
                f"--overlap-seconds {self.overlap_seconds:g}: must be above 0 and below a quarter of"
                f" --window-seconds ({self.window_seconds:g})"
            )


@dataclass(frozen=True, kw_only=True)
class EmbeddingRow:
    """The embedding of one input."""

    id: str
    path: str
    labels: dict[str, Any]
    seconds: float
    num_frames: int
    embedding: NDArray[np.float32]
    states: States | None = None
    """[T, D], where every frame is kept."""


def embed(config: EmbedConfig, on_progress: OnProgress = lambda done, total, note: None) -> dict[str, int] | None:
    """Embed this task's inputs. Return the totals of the dataset, or None while other tasks' shards are missing.

    Raises UserError for an unknown upstream or layer, and for an output that holds something else.
    """
    source, count = open_inputs(config)
    refuse_links_out(config.output)
    _open_plan(config, source.upstream, count)  # last: after a mistake the corrected command must find no folder
    return write_shards(source, count, on_progress)


def open_inputs(config: EmbedConfig) -> tuple[AudioInputs | TokenInputs, int | None]:
    """Load the upstream and open the sources. Return them with the number of inputs, None if it is not known."""
    [upstream] = parse_all([config.upstream])
    if tokens := _token_folder(config.sources):
        return TokenInputs(config, upstream, tokens), len(Shards(tokens))
    return AudioInputs(config, upstream), _count(config.sources)


def write_shards(
    source: AudioInputs | TokenInputs, inputs: int | None, on_progress: OnProgress = lambda done, total, note: None
) -> dict[str, int] | None:
    """Write the missing shards of this task, as `embed` does, into a folder whose plan is already open."""
    config = source.config
    shards = -(-inputs // config.shard_inputs) if inputs is not None else None
    with alone_in(config.output, f".{config.task}-of-{config.tasks}.lock"):
        done, last = 0, -1
        for shard, rows in source.shards(shards):
            if rows is not None:
                _write(config, shard, list(rows))
            done = min((shard + 1) * config.shard_inputs, inputs) if inputs is not None else done + config.shard_inputs
            on_progress(done, inputs, "")
            last = shard
    found = shards if shards is not None else last + 1
    if any(not _data(config.output, s).exists() for s in range(found)):
        return None
    return _finish(config.output, found)


def _token_folder(sources: Sequence[str]) -> Path | None:
    """Return the folder of token shards, or None for sources of audio."""
    folders = [Path(source) for source in sources if (Path(source) / "dataset.json").is_file()]
    if folders and len(sources) > 1:
        raise UserError(f"{folders[0]}: token shards and other sources; embed them into separate outputs")
    return folders[0] if folders else None


def _count(sources: Sequence[str]) -> int | None:
    if any(is_stream(source) for source in sources):
        return None
    return sum(1 for _ in read_sources(list(sources)))


def _open_plan(config: EmbedConfig, upstream: Upstream, inputs: int | None) -> None:
    plan = {
        "sources": list(config.sources),
        "inputs": inputs,
        "upstream": upstream.identity(),
        "layer": config.layer,
        "pool": config.pool,
        "frames": config.frames,
        "window_seconds": config.window_seconds,
        "overlap_seconds": config.overlap_seconds,
        "shard_inputs": config.shard_inputs,
    }
    path = config.output / "embed.json"
    if not path.exists():
        if config.output.is_dir() and names_in(config.output):
            raise UserError(f"{config.output}: not empty and not a folder of embeddings; give a new --output")
        config.output.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(sealed(plan), indent=1) + "\n").encode())
        return
    begun = load_json(path)
    for key, value in plan.items():
        if begun.get(key) != value:
            raise UserError(
                f"{config.output}: begun with {key} {begun.get(key)}, this run has {value}; give another --output"
            )


# ---------------------------------------------------------------- inputs


class _Inputs:
    """Yield the rows and failures of each unfinished shard of this task."""

    def __init__(self, config: EmbedConfig, upstream: Upstream) -> None:
        self.config, self.upstream = config, upstream

    def mine(self, shard: int) -> bool:
        return shard % self.config.tasks == self.config.task and not _data(self.config.output, shard).exists()

    def shards(self, count: int | None) -> Iterator[tuple[int, Iterator[EmbeddingRow | Failure] | None]]:
        """Yield each shard's number and rows. The rows are None for shards of other tasks and finished shards."""
        raise NotImplementedError

    def row(self, id: str, path: str, labels: dict[str, Any], seconds: float, pieces: Iterator[States]) -> EmbeddingRow:
        pool, kept = TimePooling(self.config.pool), []
        for states in pieces:
            pool.add(states)
            if self.config.frames:
                kept.append(states)
        if not pool.frames:
            raise UserError("no samples")
        return EmbeddingRow(
            id=id, path=path, labels=labels, seconds=seconds, num_frames=pool.frames, embedding=pool.value(),
            states=np.concatenate(kept) if kept else None,
        )  # fmt: skip


class AudioInputs(_Inputs):
    """Audio: short inputs in batches of like length, long ones window by window."""

    def __init__(self, config: EmbedConfig, upstream: Upstream) -> None:
        super().__init__(config, upstream)
        expert = UpstreamBuilder(device=config.device).build_unnormalised(upstream)
        self.states = WaveStates(
            expert,
            LayerChoice(config.layer),
            config.device,
            window_seconds=config.window_seconds,
            overlap_seconds=config.overlap_seconds,
        )
        self._check_layer()

    def _check_layer(self) -> None:
        try:
            self.states.batch([np.zeros(SAMPLE_RATE, np.float32)])
        except IndexError:
            raise UserError(f"--layer {self.config.layer}: {self.config.upstream} has fewer hidden states") from None

    def shards(self, count: int | None) -> Iterator[tuple[int, Iterator[EmbeddingRow | Failure] | None]]:
        items, shard = read_sources(list(self.config.sources)), 0
        while group := list(islice(items, self.config.shard_inputs)):
            yield shard, self._rows(group) if self.mine(shard) else None
            shard += 1

    def _rows(self, group: Sequence[Input]) -> Iterator[EmbeddingRow | Failure]:
        """Short inputs in batches of like length, long ones window by window; in the order of the inputs."""
        found: dict[int, EmbeddingRow | Failure] = {}
        short: list[tuple[int, NDArray[np.float32], float]] = []
        for number, item in enumerate(group):
            try:
                wave, seconds = self._read(item)
                if wave is None:
                    found[number] = self._long(item)
                else:
                    short.append((number, wave, seconds))
            except Exception as error:
                found[number] = failure(item, error)
        short.sort(key=lambda entry: len(entry[1]))
        for batch in _batches(short):
            for (number, _, seconds), states in zip(batch, self._batch([wave for _, wave, _ in batch])):
                item = group[number]
                if isinstance(states, Exception):
                    found[number] = failure(item, states)
                else:
                    found[number] = self.row(item.id, item.path, item.labels, seconds, iter([states]))
        return (found[number] for number in range(len(group)))

    def _batch(self, waves: Sequence[NDArray[np.float32]]) -> Sequence[States | Exception]:
        """Return the states of each wave. A wave that the upstream rejects becomes a failure; the others are kept."""
        try:
            return self.states.batch(waves)
        except (RuntimeError, ValueError) as error:
            if len(waves) == 1:
                return [error]
            return [result for wave in waves for result in self._batch([wave])]

    def _read(self, item: Input) -> tuple[NDArray[np.float32] | None, float]:
        """Read a wave and its duration in seconds. The wave is None if it is longer than a window."""
        blocks: list[NDArray[np.float32]] = []
        samples = 0
        with item.open() as file:
            for block in AudioReader(file, SAMPLE_RATE, item.start, item.end, channels=1).blocks():
                blocks.append(block)
                samples += len(block)
                if samples > self.states.window + self.states.overlap:
                    return None, 0.0
        if not samples:
            raise UserError("no samples")
        return np.concatenate(blocks), samples / SAMPLE_RATE

    def _long(self, item: Input) -> EmbeddingRow:
        samples = 0

        def counted(blocks: Iterator[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
            nonlocal samples
            for block in blocks:
                samples += len(block)
                yield block

        with item.open() as file:
            reader = AudioReader(file, SAMPLE_RATE, item.start, item.end, channels=1)
            row = self.row(item.id, item.path, item.labels, 0.0, self.states.windows(counted(reader.blocks())))
        return EmbeddingRow(**vars(row) | {"seconds": samples / SAMPLE_RATE})


class TokenInputs(_Inputs):
    """Utterances of token shards: no codec runs. Each is encoded alone."""

    def __init__(self, config: EmbedConfig, upstream: Upstream, folder: Path) -> None:
        super().__init__(config, upstream)
        self.data = Shards(folder)
        self.reader = TokenReader(UpstreamBuilder(device=config.device), upstream, self.data)
        self.layers = LayerChoice(config.layer)
        frame = float(1 / self.data.card.frame_rate)
        self.window = max(4, round(config.window_seconds / frame))
        self.overlap = max(1, round(config.overlap_seconds / frame))
        if len(self.data):
            self._states(0, 0, min(int(self.data.frames[0]), self.window))  # tells whether the layer is there

    def shards(self, count: int | None) -> Iterator[tuple[int, Iterator[EmbeddingRow | Failure] | None]]:
        size = self.config.shard_inputs
        for shard in range(-(-len(self.data) // size)):
            indices = range(shard * size, min((shard + 1) * size, len(self.data)))
            yield shard, map(self._row, indices) if self.mine(shard) else None

    def _row(self, index: int) -> EmbeddingRow:
        utterance = self.data.utterance(index)
        seconds = utterance.samples / self.data.card.sample_rate
        return self.row(utterance.id, utterance.path, utterance.labels, seconds, self._pieces(index, utterance.frames))

    def _pieces(self, index: int, frames: int) -> Iterator[States]:
        start, step = 0, self.window - 2 * self.overlap
        while True:
            last = frames - start <= self.window + self.overlap
            stop = frames if last else start + self.window
            states = self._states(index, start, stop)
            skip = self.overlap * len(states) // (stop - start)  # a task codec has several states a frame of codes
            yield states[0 if start == 0 else skip : len(states) if last else len(states) - skip]
            if last:
                return
            start += step

    def _states(self, index: int, start: int, stop: int) -> States:
        states = self.reader.states(index, start, stop)
        try:
            return self.layers(states).float().cpu().numpy()  # type: ignore[no-any-return]
        except IndexError:
            raise UserError(f"--layer {self.config.layer}: {self.config.upstream} has fewer hidden states") from None


def _batches(
    short: Sequence[tuple[int, NDArray[np.float32], float]],
) -> Iterator[list[tuple[int, NDArray[np.float32], float]]]:
    """Waves, sorted by length, in batches of at most BATCH_SECONDS with their padding."""
    batch: list[tuple[int, NDArray[np.float32], float]] = []
    for entry in short:
        if batch and (len(batch) + 1) * len(entry[1]) > BATCH_SECONDS * SAMPLE_RATE:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


# ---------------------------------------------------------------- output


def _data(output: Path, shard: int) -> Path:
    return output / "data" / f"{shard:05d}.parquet"


def _write(config: EmbedConfig, shard: int, results: Sequence[EmbeddingRow | Failure]) -> None:
    """Frames and failures first, the Parquet file last: it marks the shard as finished."""
    rows = [result for result in results if isinstance(result, EmbeddingRow)]
    failures = [result for result in results if isinstance(result, Failure)]
    for name in ("data", "failed", *(["frames"] if config.frames else [])):
        (config.output / name).mkdir(exist_ok=True)
    if config.frames:
        from safetensors.numpy import save

        states = {str(i): np.ascontiguousarray(row.states) for i, row in enumerate(rows) if row.states is not None}
        write_atomic(config.output / "frames" / f"{shard:05d}.safetensors", save(states))
    lines = "".join(json.dumps(vars(item), ensure_ascii=False) + "\n" for item in failures)
    write_atomic(config.output / "failed" / f"{shard:05d}.jsonl", lines.encode())
    write_atomic(_data(config.output, shard), _parquet(rows))


def _parquet(rows: Sequence[EmbeddingRow]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "id": pa.array([row.id for row in rows], pa.string()),
        "path": pa.array([row.path for row in rows], pa.string()),
        "labels": pa.array([json.dumps(row.labels, ensure_ascii=False, default=str) for row in rows], pa.string()),
        "seconds": pa.array([row.seconds for row in rows], pa.float64()),
        "num_frames": pa.array([row.num_frames for row in rows], pa.int64()),
        "embedding": pa.array([row.embedding for row in rows], pa.list_(pa.float32())),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _finish(output: Path, shards: int) -> dict[str, int]:
    import pyarrow.parquet as pq

    rows = sum(pq.read_metadata(_data(output, shard)).num_rows for shard in range(shards))
    failed = b"".join((output / "failed" / f"{shard:05d}.jsonl").read_bytes() for shard in range(shards))
    write_atomic(output / "failed.jsonl", failed)
    return {"shards": shards, "embeddings": rows, "failed": failed.count(b"\n")}
