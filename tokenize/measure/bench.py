"""`codecssl-tokenize bench`: this encoder compared with the reference implementation, on the same audio and weights."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codecssl.tokenize.codec import Codec, Reference
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.encode import GROUP_INPUTS, Device, LoadedAudio, default_workers, encode_loaded, read
from codecssl.tokenize.format.blocks import block_bytes
from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.sources.sources import read_sources

ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class TokenizeBenchConfig:
    """Options of `codecssl-tokenize bench`."""

    sources: tuple[str, ...]
    codec: str = "tiny_16khz"
    num_codebooks: int | None = None
    device: str = "cpu"
    seconds: float = 120.0
    """Maximum seconds of audio."""
    rounds: int = ROUNDS
    """Runs of each method, interleaved; the fastest counts."""


def bench(config: TokenizeBenchConfig) -> Iterator[dict[str, Any]]:
    """Yield one row per measurement: `what` and the measured values. Speeds are multiples of real time."""
    device = Device(codec=config.codec, num_codebooks=config.num_codebooks, device=config.device)
    codec = device.load()
    began = time.perf_counter()
    loaded = list(_some_audio(config, codec))
    reading = time.perf_counter() - began
    seconds = sum(h.wave.shape[-1] for h in loaded if h.wave is not None) / codec.card.sample_rate
    codes = codec.card.num_rows * sum(codec.card.frames_of(h.wave.shape[-1]) for h in loaded if h.wave is not None)
    yield {
        "what": f"{seconds:.1f} s of audio in {len(loaded)} files up to 30 s, {codec.card.name}, "
        f"{codec.card.num_codebooks} codebooks, {config.device}"
    }
    yield from _shares(codec, loaded, reading, seconds)
    ways = dict(_ways(config, device, codec, loaded))
    best = _in_turns(ways, config.rounds)
    for name, took in best.items():
        yield {"what": name, "x_real_time": seconds / took, "codes_per_second": codes / took}
    yield from _agreement(codec, loaded)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    yield {"what": "peak memory of a worker", "gigabytes": children / 1e6}


def table(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Format the rows as lines to print."""
    for row in rows:
        figures = []
        if "x_real_time" in row:
            figures.append(f"{row['x_real_time']:8.1f} x real time")
        if "codes_per_second" in row:
            figures.append(f"{row['codes_per_second']:10.0f} codes/s")
        if "share" in row:
            figures.append(f"{row['share']:6.1%} of one thread's time")
        if "differing" in row:
            figures.append(f"{row['differing']:8.3%} of codes differ")
        if "gigabytes" in row:
            figures.append(f"{row['gigabytes']:8.2f} GB")
        yield f"{row['what']:<44}" + ", ".join(figures) if figures else row["what"]


def _some_audio(config: TokenizeBenchConfig, codec: Codec) -> Iterator[LoadedAudio]:
    had = 0.0
    for item in read_sources(list(config.sources)):
        loaded = read(item, codec.card)
        if isinstance(loaded, LoadedAudio) and loaded.wave is not None:
            had += loaded.wave.shape[-1] / codec.card.sample_rate
            yield loaded
        if had >= config.seconds:
            return
    if not had:
        raise UserError(f"bench: no readable audio of up to 30 s in {', '.join(config.sources)}")


def _shares(codec: Codec, loaded: Sequence[LoadedAudio], reading: float, seconds: float) -> Iterator[dict[str, Any]]:
    """Measure the shares of one thread's time: reading, encoding, writing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encode_loaded(codec, loaded[:4])  # warm up
    encoded, encoding = _timed(lambda: encode_loaded(codec, loaded))
    whole = [e for e in encoded if isinstance(e, EncodedUtterance)]
    _, writing = _timed(lambda: block_bytes("bench", whole, codec.card))
    torch.set_num_threads(threads)
    total = reading + encoding + writing
    for what, took in (("decode and resample", reading), ("encode", encoding), ("pack and index", writing)):
        yield {"what": what, "x_real_time": seconds / took, "share": took / total}


def _ways(
    config: TokenizeBenchConfig, device: Device, codec: Codec, loaded: Sequence[LoadedAudio]
) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield the name and the function of each method to encode `loaded`. The function returns its seconds."""
    cores = default_workers()
    waves = [torch.from_numpy(h.wave) for h in loaded]
    if isinstance(codec, Reference):
        for threads in sorted({1, cores}):
            yield f"plain way, file by file, {threads} thread(s)", partial(_plainly, codec, waves, threads)
    yield "ours, one thread", lambda: _with_threads(1, lambda: encode_loaded(codec, loaded))
    if config.device == "cpu" and cores > 1:
        yield f"ours, {cores} processes of one thread", lambda: _in_processes(device, loaded, cores)


def _plainly(codec: Any, waves: Sequence[Tensor], threads: int) -> float:
    return _with_threads(threads, lambda: [codec.encode_reference(wave) for wave in waves])


def _with_threads(threads: int, work: Callable[[], Any]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _timed(work)[1]
    finally:
        torch.set_num_threads(before)


def _in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Return the fastest of `rounds` runs of each method. The runs are interleaved, so load peaks affect all alike."""
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            best[name] = min(best.get(name, float("inf")), way())
    return best


def _in_processes(device: Device, loaded: Sequence[LoadedAudio], processes: int) -> float:
    """Encode in worker processes. Return the time from all ready to all done."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes + 1)
    groups = [loaded[i : i + GROUP_INPUTS] for i in range(0, len(loaded), GROUP_INPUTS)]
    workers = [
        context.Process(target=_worker, args=(device, [h for g in groups[i::processes] for h in g], barrier))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    _, took = _timed(barrier.wait)
    for worker in workers:
        worker.join()
    return took


def _worker(device: Device, loaded: Sequence[LoadedAudio], barrier: Any) -> None:
    torch.set_num_threads(1)
    codec = device.load()
    encode_loaded(codec, loaded[:4])
    barrier.wait()
    for i in range(0, len(loaded), GROUP_INPUTS):
        encode_loaded(codec, loaded[i : i + GROUP_INPUTS])
    barrier.wait()


def _agreement(codec: Codec, loaded: Sequence[LoadedAudio]) -> Iterator[dict[str, Any]]:
    if not isinstance(codec, Reference):
        return
    waves = [torch.from_numpy(h.wave) for h in loaded]
    ours = [encoded.codes for encoded in codec.encode(waves)]
    differing = sum(int((a.cpu() != codec.encode_reference(w).cpu()).sum()) for a, w in zip(ours, waves))
    yield {"what": "ours against the plain way", "differing": differing / sum(a.numel() for a in ours)}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began
