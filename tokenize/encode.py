"""Inputs to codes: read by worker processes, encoded in them (CPU) or in batches of like length (CUDA).

A wave's codes depend on that wave alone, so that it does not matter who is encoded together with whom.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from codecssl.tokenize.codec import Codec, CodecCard, Encoded
from codecssl.tokenize.common.cores import available_cores
from codecssl.tokenize.common.errors import UserError, one_line
from codecssl.tokenize.format.layout import to_planes
from codecssl.tokenize.format.records import EncodedUtterance, Failure
from codecssl.tokenize.mel import MelSpec, MelStream, mel_plane
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.sources.audio import AudioReader
from codecssl.tokenize.sources.changes import sha256_of_input
from codecssl.tokenize.sources.sources import Input

LONG_SECONDS = 30.0
"""Longer inputs are encoded piece by piece, each alone; shorter ones are held in memory and encoded together."""
GROUP_INPUTS = 32
"""Inputs that a worker on a CPU takes at a time."""
WINDOW_INPUTS = 512
"""Inputs that are sorted by length for a GPU."""
BATCH_SECONDS = 240.0
"""Audio in a GPU's batch, padding included."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Which codec, and where it runs; each worker process loads its own."""

    codec: str
    num_codebooks: int | None
    device: str

    def load(self) -> Codec:
        return load_codec(self.codec, num_codebooks=self.num_codebooks, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One input, read: what its codes are made of."""

    item: Input
    wave: NDArray[np.float32] | None
    """[n] or [C, n] at the codec's rate; None where it is too long to be held."""
    source_sha256: str = ""
    source_rate: int = 0
    source_samples: int = 0
    notes: tuple[str, ...] = ()
    """See `AudioReader.notes`."""
    mel: NDArray[np.uint8] | None = None
    """[T, bands], where the process that read it computed the log-mel plane."""


# ---------------------------------------------------------------- one input


def read(item: Input, card: CodecCard) -> Heard | Failure:
    """Read one input, up to LONG_SECONDS of it. What cannot be read becomes a Failure, never an exception."""
    try:
        return _read(item, card)
    except Exception as error:
        return failure(item, error)


def failure(item: Input, error: Exception) -> Failure:
    """The row for failed.jsonl. Raises `error` again when it is not the file's fault: a full disk, no memory."""
    if isinstance(error, UserError):
        return Failure(id=item.id, path=item.path, reason=str(error))
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, (OSError, RuntimeError, ValueError)):
        raise error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        raise error
    # a decoder's surprise costs its file, not the run
    return Failure(id=item.id, path=item.path, reason=one_line(error))


def _read(item: Input, card: CodecCard) -> Heard:
    blocks: list[NDArray[np.float32]] = []
    samples = 0
    with item.open() as file:
        reader = _reader(file, item, card)
        for block in reader.blocks():
            blocks.append(block)
            samples += block.shape[-1]
            if samples > LONG_SECONDS * card.sample_rate:
                return Heard(item=item, wave=None)
        _some(samples, reader, card)
        return Heard(
            item=item,
            wave=np.ascontiguousarray(np.concatenate(blocks, axis=-1)),
            source_sha256=sha256_of_input(item, file),
            source_rate=reader.source_rate,
            source_samples=reader.source_samples,
            notes=tuple(reader.notes),
        )


def _reader(file: BinaryIO, item: Input, card: CodecCard) -> AudioReader:
    return AudioReader(
        file, card.sample_rate, item.start, item.end, card.channels, channel=item.channel, duration=item.duration
    )


def _some(samples: int, reader: AudioReader, card: CodecCard) -> None:
    if samples == 0:
        raise UserError(f"no samples left at {card.sample_rate} Hz: {reader.source_samples} at {reader.source_rate} Hz")


def encode_long(codec: Codec, item: Input, mel: MelSpec | None = None) -> EncodedUtterance | Failure:
    """Read and encode one input in bounded memory, whatever its length."""
    try:
        return _encode_long(codec, item, mel)
    except Exception as error:
        return failure(item, error)


def _encode_long(codec: Codec, item: Input, mel: MelSpec | None) -> EncodedUtterance:
    card, stream, samples, pieces = codec.card, codec.stream(), 0, []
    mel_stream, columns = MelStream(mel) if mel else None, []
    with item.open() as file:
        reader = _reader(file, item, card)
        for block in reader.blocks():
            samples += block.shape[-1]
            pieces.append(stream.push(torch.from_numpy(np.ascontiguousarray(block))).cpu())
            if mel_stream:
                columns.append(mel_stream.push(block))
        _some(samples, reader, card)
        heard = Heard(
            item=item,
            wave=None,
            source_sha256=sha256_of_input(item, file),
            source_rate=reader.source_rate,
            source_samples=reader.source_samples,
            notes=tuple(reader.notes),
        )
    pieces.append(stream.finish().cpu())
    plane = np.concatenate([*columns, mel_stream.finish()]) if mel_stream else None
    return _encoded(card, heard, samples, Encoded(torch.cat(pieces, dim=1), stream.scales), plane)


def _encoded(
    card: CodecCard, heard: Heard, samples: int, encoded: Encoded, mel: NDArray[np.uint8] | None
) -> EncodedUtterance:
    return EncodedUtterance(
        id=heard.item.id,
        path=heard.item.path,
        codes=to_planes(encoded.codes.cpu().numpy().astype(np.uint16), card),
        samples=samples,
        source_sha256=heard.source_sha256,
        source_rate=heard.source_rate,
        source_samples=heard.source_samples,
        labels=heard.item.labels,
        notes=heard.notes,
        scales=None if encoded.scales is None else encoded.scales.cpu().numpy(),
        mel=mel,
    )


# ---------------------------------------------------------------- many inputs


def encode_heard(
    codec: Codec, heard: Sequence[Heard | Failure], mel: MelSpec | None = None
) -> list[EncodedUtterance | Failure]:
    """Encode inputs that were read, in their order: the short ones together, each long one from its file.

    mel: compute this log-mel plane too.
    """
    short = [h for h in heard if isinstance(h, Heard) and h.wave is not None]
    found = {id(h): result for h, result in zip(short, _encode_short(codec, short, mel))}
    results: list[EncodedUtterance | Failure] = []
    for h in heard:
        if isinstance(h, Failure):
            results.append(h)
        else:
            results.append(found[id(h)] if id(h) in found else encode_long(codec, h.item, mel))
    return results


def _encode_short(codec: Codec, short: Sequence[Heard], mel: MelSpec | None) -> list[EncodedUtterance | Failure]:
    if not short:
        return []
    try:
        return _encode_waves(codec, short, mel)
    except (RuntimeError, ValueError) as error:
        if len(short) == 1:
            return [failure(short[0].item, error)]
        return [result for h in short for result in _encode_short(codec, [h], mel)]  # one of them is at fault


def _encode_waves(codec: Codec, short: Sequence[Heard], mel: MelSpec | None) -> list[EncodedUtterance | Failure]:
    waves = [torch.from_numpy(h.wave) for h in short]
    found = codec.encode(waves)
    planes = [mel_plane(mel, wave.numpy()) if mel and h.mel is None else h.mel for h, wave in zip(short, waves)]
    return [
        _encoded(codec.card, h, wave.shape[-1], encoded, plane)
        for h, wave, encoded, plane in zip(short, waves, found, planes)
    ]


# ---------------------------------------------------------------- processes


def encode_inputs(
    device: Device, codec: Codec, items: Iterable[Input], workers: int, mel: MelSpec | None = None
) -> Iterator[EncodedUtterance | Failure]:
    """Results of all `items`, in order; `workers` processes read and, on a CPU, encode (0: this process does)."""
    if device.device == "cpu":
        groups = _groups(items, GROUP_INPUTS)
        for results in _loader(_CpuWorker(device, codec if not workers else None, mel), groups, workers, 2):
            yield from results
        return
    heard = _loader(_Reader(codec.card, mel), items, workers, 64)
    for window in _groups(heard, WINDOW_INPUTS):
        yield from _by_length(codec, window, mel)


class _CpuWorker(Dataset[Any]):
    def __init__(self, device: Device, codec: Codec | None, mel: MelSpec | None) -> None:
        self.device, self.codec, self.mel = device, codec, mel

    def __getitem__(self, group: Any) -> list[EncodedUtterance | Failure]:
        if self.codec is None:
            torch.set_num_threads(1)  # the bits of a convolution may depend on the number of threads
            self.codec = self.device.load()
        return encode_heard(self.codec, [read(item, self.codec.card) for item in group], self.mel)


class _Reader(Dataset[Any]):
    def __init__(self, card: CodecCard, mel: MelSpec | None) -> None:
        self.card, self.mel = card, mel

    def __getitem__(self, item: Any) -> Heard | Failure:
        heard = read(item, self.card)
        if self.mel is None or isinstance(heard, Failure) or heard.wave is None:
            return heard
        return replace(heard, mel=mel_plane(self.mel, heard.wave))  # here: the GPU's process has no time for it


def _by_length(
    codec: Codec, window: Sequence[Heard | Failure], mel: MelSpec | None
) -> list[EncodedUtterance | Failure]:
    """Encode a window in batches of like length; the results come back in the window's order."""
    results: list[Any] = [h if isinstance(h, Failure) else None for h in window]
    order = sorted((i for i, r in enumerate(results) if r is None), key=lambda i: _samples(window[i]))
    batch: list[int] = []
    for place, index in enumerate(order):
        batch.append(index)
        following = _samples(window[order[place + 1]]) if place + 1 < len(order) else 0
        if not following or (len(batch) + 1) * following > BATCH_SECONDS * codec.card.sample_rate:
            for i, result in zip(batch, encode_heard(codec, [window[i] for i in batch], mel)):
                results[i] = result
            batch = []
    return results


def _samples(heard: Any) -> int:
    return 0 if heard.wave is None else int(heard.wave.shape[-1])


def _loader(dataset: Dataset[Any], sampler: Iterable[Any], workers: int, prefetch: int) -> Iterator[Any]:
    """Ordered, prefetched, and gone when the main process is."""
    return iter(
        DataLoader(
            dataset,
            sampler=sampler,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            multiprocessing_context="spawn" if workers else None,
            prefetch_factor=prefetch if workers else None,
        )
    )


def _as_it_is(value: T) -> T:  # the default one would turn arrays into tensors
    return value


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def default_workers() -> int:
    """One per core: on a CPU they encode, for a GPU they read."""
    return available_cores()
