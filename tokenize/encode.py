"""Encode inputs. Worker processes read them and, on a CPU, encode them; a GPU encodes batches of similar length.

The codes of a wave depend on that wave alone and not on its batch.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from codecssl.tokenize.codec import Codec, CodecCard, Encoded
from codecssl.tokenize.common.cores import available_cores
from codecssl.tokenize.common.errors import UserError, one_line
from codecssl.tokenize.common.process import interrupts_deferred
from codecssl.tokenize.format.layout import to_planes
from codecssl.tokenize.format.records import EncodedUtterance, Failure
from codecssl.tokenize.format.stored import stored_utterance
from codecssl.tokenize.mel import MelSpec, MelStream, mel_plane
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.sources.audio import AudioReader
from codecssl.tokenize.sources.changes import sha256_of_input
from codecssl.tokenize.sources.inputs import KeptInput
from codecssl.tokenize.sources.sources import Input

LONG_SECONDS = 30.0
"""Maximum length of inputs held in memory and encoded together. Longer inputs are encoded alone, piece by piece."""
GROUP_INPUTS = 32
"""Number of inputs that a worker on a CPU takes at a time."""
WINDOW_INPUTS = 512
"""Number of inputs that are sorted by length for a GPU."""
BATCH_SECONDS = 240.0
"""Seconds of audio in a GPU batch, including padding."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Codec and device of a run. Each worker process loads its own codec."""

    codec: str
    num_codebooks: int | None
    device: str

    def load(self) -> Codec:
        return load_codec(self.codec, num_codebooks=self.num_codebooks, device=self.device)


@dataclass(frozen=True, kw_only=True)
class LoadedAudio:
    """One input after reading, with all that its codes depend on."""

    item: Input
    wave: NDArray[np.float32] | None
    """[n] or [C, n] at the codec's rate; None if it is too long to hold in memory."""
    source_sha256: str = ""
    source_rate: int = 0
    source_samples: int = 0
    notes: tuple[str, ...] = ()
    """See `AudioReader.notes`."""
    mel: NDArray[np.uint8] | None = None
    """Log-mel plane [T, bands], if computed by the process that read the input."""


# ---------------------------------------------------------------- one input


def read(item: Input, card: CodecCard) -> LoadedAudio | EncodedUtterance | Failure:
    """Read at most LONG_SECONDS of one input, or the codes of a KeptInput.

    An unreadable input returns a Failure instead of raising.
    """
    if isinstance(item, KeptInput) and (kept := _kept(item, card)) is not None:
        return kept
    try:
        return _read(item, card)
    except Exception as error:
        return failure(item, error)


def failure(item: Input, error: Exception) -> Failure:
    """Build the row for failed.jsonl. Re-raises errors that the file did not cause, e.g. a full disk or no memory."""
    if isinstance(error, UserError):
        return Failure(id=item.id, path=item.path, reason=str(error))
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, (OSError, RuntimeError, ValueError)):
        raise error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
        raise error
    # an unexpected decoder error fails its file, not the run
    return Failure(id=item.id, path=item.path, reason=one_line(error))


def _kept(item: KeptInput, card: CodecCard) -> EncodedUtterance | None:
    """Return the stored codes of an input; None if they are damaged, so that it is encoded again."""
    try:
        found = stored_utterance(item.stored, card)
    except UserError:
        return None
    return replace(found, path=item.path, labels=item.labels, notes=item.stored.notes) if found.id == item.id else None


def _read(item: Input, card: CodecCard) -> LoadedAudio:
    blocks: list[NDArray[np.float32]] = []
    samples = 0
    with item.open() as file:
        reader = _reader(file, item, card)
        for block in reader.blocks():
            blocks.append(block)
            samples += block.shape[-1]
            if samples > LONG_SECONDS * card.sample_rate:
                return LoadedAudio(item=item, wave=None)
        _some(samples, reader, card)
        return LoadedAudio(
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
    """Read and encode one input of any length in bounded memory."""
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
        loaded = LoadedAudio(
            item=item,
            wave=None,
            source_sha256=sha256_of_input(item, file),
            source_rate=reader.source_rate,
            source_samples=reader.source_samples,
            notes=tuple(reader.notes),
        )
    pieces.append(stream.finish().cpu())
    plane = np.concatenate([*columns, mel_stream.finish()]) if mel_stream else None
    return _encoded(card, loaded, samples, Encoded(torch.cat(pieces, dim=1), stream.scales), plane)


def _encoded(
    card: CodecCard, loaded: LoadedAudio, samples: int, encoded: Encoded, mel: NDArray[np.uint8] | None
) -> EncodedUtterance:
    return EncodedUtterance(
        id=loaded.item.id,
        path=loaded.item.path,
        codes=to_planes(encoded.codes.cpu().numpy().astype(np.uint16), card),
        samples=samples,
        source_sha256=loaded.source_sha256,
        source_rate=loaded.source_rate,
        source_samples=loaded.source_samples,
        labels=loaded.item.labels,
        notes=loaded.notes,
        scales=None if encoded.scales is None else encoded.scales.cpu().numpy(),
        mel=mel,
    )


# ---------------------------------------------------------------- many inputs


def encode_loaded(
    codec: Codec, loaded: Sequence[LoadedAudio | EncodedUtterance | Failure], mel: MelSpec | None = None
) -> list[EncodedUtterance | Failure]:
    """Encode inputs after reading, in order. Short ones are encoded together, each long one from its file.

    With `mel`, also compute this log-mel plane. Encoded utterances and failures are returned unchanged.
    """
    short = [h for h in loaded if isinstance(h, LoadedAudio) and h.wave is not None]
    found = {id(h): result for h, result in zip(short, _encode_short(codec, short, mel))}
    results: list[EncodedUtterance | Failure] = []
    for h in loaded:
        if not isinstance(h, LoadedAudio):
            results.append(h)
        else:
            results.append(found[id(h)] if id(h) in found else encode_long(codec, h.item, mel))
    return results


def _encode_short(codec: Codec, short: Sequence[LoadedAudio], mel: MelSpec | None) -> list[EncodedUtterance | Failure]:
    if not short:
        return []
    try:
        return _encode_waves(codec, short, mel)
    except (RuntimeError, ValueError) as error:
        if len(short) == 1:
            return [failure(short[0].item, error)]
        return [result for h in short for result in _encode_short(codec, [h], mel)]  # one of the inputs is the cause


def _encode_waves(codec: Codec, short: Sequence[LoadedAudio], mel: MelSpec | None) -> list[EncodedUtterance | Failure]:
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
    """Yield results of all `items` in order. `workers` processes read and, on a CPU, encode; 0 uses this process.

    With several GPUs (`device_of_workers`) each worker reads and encodes whole windows on its own GPU.
    """
    devices = device_of_workers(device.device, workers, torch.cuda.device_count())
    if len(set(devices)) > 1:
        yield from encode_on(devices, device, items, mel)
        return
    if device.device == "cpu":
        groups = _groups(items, GROUP_INPUTS)
        for results in load_in_order(_CpuWorker(device, codec if not workers else None, mel), groups, workers, 2):
            yield from results
        return
    loaded = load_in_order(_Reader(codec.card, mel), items, workers, 64)
    for window in _groups(loaded, WINDOW_INPUTS):
        yield from _by_length(codec, window, mel)


def device_of_workers(device: str, workers: int, gpus: int) -> list[str]:
    """Return the device of each worker process: cuda:i for worker i, over again if there are more workers than GPUs.

    The device `cuda` stands for all `gpus` that are visible, `cuda:1` and `cpu` for themselves.
    """
    if device != "cuda" or gpus < 2:
        return [device] * workers
    return [f"cuda:{worker % gpus}" for worker in range(workers)]


def encode_on(
    devices: Sequence[str], device: Device, items: Iterable[Input], mel: MelSpec | None
) -> Iterator[EncodedUtterance | Failure]:
    """Yield results of all `items` in order, encoded by one process per entry of `devices`.

    A process takes WINDOW_INPUTS inputs at a time, reads them with its share of the cores, and encodes batches of
    similar length. Two processes on one GPU overlap reading and encoding.
    """
    threads = max(1, available_cores() // len(devices))
    worker = _DeviceWorker([replace(device, device=each) for each in devices], mel, threads)
    for results in load_in_order(worker, _groups(items, WINDOW_INPUTS), len(devices), 1):
        yield from results


class _DeviceWorker(Dataset[Any]):
    def __init__(self, devices: Sequence[Device], mel: MelSpec | None, threads: int) -> None:
        self.devices, self.mel, self.threads = devices, mel, threads
        self.codec: Codec | None = None

    def __getitem__(self, group: Any) -> list[EncodedUtterance | Failure]:
        if self.codec is None:
            torch.set_num_threads(1)
            worker = get_worker_info()
            assert worker is not None
            device = self.devices[worker.id]
            if torch.device(device.device).type == "cuda":
                torch.cuda.set_device(device.device)  # also for what a codec allocates without naming a device
            self.codec = device.load()
        reader = _Reader(self.codec.card, self.mel)
        with ThreadPoolExecutor(self.threads) as pool:
            window = list(pool.map(reader.__getitem__, group))
        return _by_length(self.codec, window, self.mel)


class _CpuWorker(Dataset[Any]):
    def __init__(self, device: Device, codec: Codec | None, mel: MelSpec | None) -> None:
        self.device, self.codec, self.mel = device, codec, mel

    def __getitem__(self, group: Any) -> list[EncodedUtterance | Failure]:
        if self.codec is None:
            torch.set_num_threads(1)  # the bits of a convolution may depend on the number of threads
            self.codec = self.device.load()
        return encode_loaded(self.codec, [read(item, self.codec.card) for item in group], self.mel)


def readable(card: CodecCard, items: Iterable[Input], workers: int) -> Iterator[bool]:
    """Yield, in order, whether each input can be read. Nothing is encoded."""
    yield from load_in_order(_Probe(card), items, workers, 64)


class _Probe(Dataset[Any]):
    def __init__(self, card: CodecCard) -> None:
        self.card = card

    def __getitem__(self, item: Any) -> bool:
        return not isinstance(read(item, self.card), Failure)


class _Reader(Dataset[Any]):
    def __init__(self, card: CodecCard, mel: MelSpec | None) -> None:
        self.card, self.mel = card, mel

    def __getitem__(self, item: Any) -> LoadedAudio | EncodedUtterance | Failure:
        heard = read(item, self.card)
        if self.mel is None or not isinstance(heard, LoadedAudio) or heard.wave is None:
            return heard
        return replace(heard, mel=mel_plane(self.mel, heard.wave))  # computed here to keep the GPU's process free


def _by_length(
    codec: Codec, window: Sequence[LoadedAudio | EncodedUtterance | Failure], mel: MelSpec | None
) -> list[EncodedUtterance | Failure]:
    """Encode a window in batches of similar length. Results are in the window's order."""
    results: list[Any] = [None if isinstance(h, LoadedAudio) else h for h in window]
    order = sorted((i for i, r in enumerate(results) if r is None), key=lambda i: _samples(window[i]))
    batch: list[int] = []
    for place, index in enumerate(order):
        batch.append(index)
        following = _samples(window[order[place + 1]]) if place + 1 < len(order) else 0
        if not following or (len(batch) + 1) * following > BATCH_SECONDS * codec.card.sample_rate:
            for i, result in zip(batch, encode_loaded(codec, [window[i] for i in batch], mel)):
                results[i] = result
            batch = []
    return results


def _samples(loaded: Any) -> int:
    return 0 if loaded.wave is None else int(loaded.wave.shape[-1])


def load_in_order(dataset: Dataset[Any], sampler: Iterable[Any], workers: int, prefetch: int = 2) -> Iterator[Any]:
    """Yield dataset[i] for each i of `sampler`, in order. Each worker loads up to `prefetch` items ahead."""
    loader = DataLoader(
        dataset,
        sampler=sampler,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context="spawn" if workers else None,
        prefetch_factor=prefetch if workers else None,
    )
    with interrupts_deferred() if workers else nullcontext():
        return iter(loader)


def _as_it_is(value: T) -> T:  # the default one would turn arrays into tensors
    return value


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def default_workers(device: str = "cpu", gpus: int = 0) -> int:
    """Return one worker per core, or two per GPU if `device` stands for several GPUs.

    Workers encode on a CPU and on several GPUs, and only read for a single GPU.
    """
    return 2 * gpus if device == "cuda" and gpus > 1 else available_cores()
