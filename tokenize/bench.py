"""`codecssl-tokenize bench`: our encoder beside the plain way, same audio and weights, in one run."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from codecssl.tokenize.audio import read_wave
from codecssl.tokenize.codec import Codec, load_codec
from codecssl.tokenize.sources import read_sources


def bench(sources: list[str], codec_name: str, seconds: float) -> Iterator[str]:
    """Yield printed rows: x real time for reading, the plain way, and ours; the share of codes that differ."""
    codec = load_codec(codec_name)
    rate = codec.card.sample_rate
    began = time.perf_counter()
    waves = [torch.from_numpy(np.ascontiguousarray(w)) for w in _some_audio(sources, rate, seconds)]
    total = sum(len(w) for w in waves) / rate
    yield f"{total:.1f} s of audio in {len(waves)} files, {codec.card.name}, {codec.card.num_codebooks} codebooks"
    yield f"decode + resample  {total / (time.perf_counter() - began):8.1f} x real time"
    plain = _plain(codec)
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        ours, ours_time = _timed(lambda: codec.encode(waves))
        yield f"ours, {threads} thread(s)  {total / ours_time:8.1f} x real time"
        if plain is not None:
            theirs, theirs_time = _timed(lambda: [plain(w) for w in waves])
            differing = sum(int((a != b).sum()) for a, b in zip(ours, theirs)) / sum(a.numel() for a in ours)
            yield f"plain, {threads} thread(s) {total / theirs_time:8.1f} x real time; {differing:.3%} of codes differ"
    yield f"peak memory        {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:8.2f} GB"


def _some_audio(sources: list[str], rate: int, seconds: float) -> Iterator[NDArray[np.float32]]:
    had = 0.0
    for item in read_sources(sources):
        if had >= seconds:
            return
        wave = read_wave(Path(item.file), rate)
        had += len(wave) / rate
        yield wave


def _plain(codec: Codec) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The whole file at once through the reference layers, as users of the encodec package do."""
    from codecssl.tokenize.encodec import EncodecCodec

    if not isinstance(codec, EncodecCodec):
        return None
    layers = torch.nn.Sequential(*codec.net.encoder)

    @torch.inference_mode()
    def encode(wave: torch.Tensor) -> torch.Tensor:
        padded = F.pad(wave, (0, -len(wave) % codec.card.hop_length))
        return codec.quantize(layers(padded[None, None])[0])

    return encode


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began
