"""`codecssl-tokenize check-codec`: codes that change on this device with batching, chunking or implementation.

A residual quantizer amplifies near-ties. If a device rounds a batch differently from a single wave, some codes of the
later codebooks flip. Shards are reproducible if `batched` and `chunked` are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codecssl.tokenize.codec import Codec, CodecCard, Reference
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.encode import LoadedAudio, read
from codecssl.tokenize.sources.sources import read_sources


def check_codec(codec: Codec, waves: Sequence[Tensor], seed: int = 0) -> dict[str, Any]:
    """Return the share of codes, per row, that differ from those of each wave encoded alone and whole.

    batched: all waves together. repeated: alone a second time. chunked: streaming, pushed in random pieces.
    plain: the reference implementation, if the codec has one.
    """
    alone = [codec.encode([wave])[0].codes.cpu() for wave in waves]
    found = {
        "batched": differing(alone, [encoded.codes for encoded in codec.encode(waves)]),
        "repeated": differing(alone, [codec.encode([wave])[0].codes for wave in waves]),
        "chunked": differing(alone, [_chunked(codec, wave, seed + i) for i, wave in enumerate(waves)]),
    }
    if isinstance(codec, Reference):
        found["plain"] = differing(alone, [codec.encode_reference(wave) for wave in waves])
    return {
        "codec": codec.card.name,
        "device": codec.card.policies.get("device", "cpu"),
        "torch": torch.__version__,
        "waves": len(waves),
        "frames": sum(codes.shape[1] for codes in alone),
        "differing": found,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Format `check_codec`'s result as lines to print."""
    lines = [
        "{codec} on {device}, torch {torch}: {waves} waves, {frames} frames".format(**found),
        "codes that differ from those of a wave alone, by codebook, coarsest first:",
    ]
    for name, rates in found["differing"].items():
        mean = sum(rates) / len(rates)
        lines.append(f"{name:<9} {mean:8.4%} in all  " + " ".join(f"{rate:.3%}" for rate in rates))
    exact = not any(rate for name in ("batched", "chunked") for rate in found["differing"][name])
    lines.append(
        "exact: batches and cuts change no code"
        if exact
        else "not exact on this device: use the same device and batches where shards must be reproducible bit for bit"
    )
    return lines


def waves_of(sources: Sequence[str], card: CodecCard, seconds: float) -> list[Tensor]:
    """Waves to check with: the sources' first files or, without sources, noise and tones of many lengths."""
    if not sources:
        return synthetic_waves(card)
    waves, had = [], 0.0
    for item in read_sources(list(sources)):
        loaded = read(item, card)
        if isinstance(loaded, LoadedAudio) and loaded.wave is not None:
            waves.append(torch.from_numpy(loaded.wave))
            had += loaded.wave.shape[-1] / card.sample_rate
        if had >= seconds:
            break
    if not waves:
        raise UserError(f"check-codec: no readable audio of up to 30 s in {', '.join(sources)}")
    return waves


def synthetic_waves(card: CodecCard, seed: int = 0) -> list[Tensor]:
    """Ten waves of noise bursts and gliding tones, from one sample to 12 seconds."""
    rng = np.random.default_rng(seed)
    rate, hop = card.sample_rate, card.hop_length
    lengths = [1, hop - 1, hop, hop + 1, rate // 3, rate, 2 * rate + 7, 3 * rate, 5 * rate + hop // 2, 12 * rate]
    return [torch.from_numpy(_burst(rng, length, rate, card.channels)) for length in lengths]


def _burst(rng: np.random.Generator, length: int, rate: int, channels: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    time = np.arange(length) / rate
    glide = np.sin(2 * np.pi * (110 * time + 60 * time**2))
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * 3.1 * time + rng.uniform(0, 6))
    noise = rng.standard_normal((channels, length)) * 0.1
    wave = (envelope * (0.3 * glide + noise)).astype(np.float32)
    return wave if channels > 1 else wave[0]


def _chunked(codec: Codec, wave: Tensor, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    stream, pieces, at = codec.stream(), [], 0
    while at < wave.shape[-1]:
        size = int(rng.integers(1, codec.card.sample_rate * 4))
        pieces.append(stream.push(wave[..., at : at + size]))
        at += size
    return torch.cat([*pieces, stream.finish()], dim=1)


def differing(alone: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """Return the share of differing codes per row. Raises UserError if the numbers of frames differ."""
    for a, b in zip(alone, other, strict=True):
        if a.shape != b.shape:
            raise UserError(f"check-codec: {tuple(b.shape)} codes against {tuple(a.shape)} of the wave alone")
    frames = sum(a.shape[1] for a in alone)
    wrong = torch.stack([(a != b.cpu()).sum(1) for a, b in zip(alone, other)]).sum(0)
    return (wrong.double() / frames).tolist()
