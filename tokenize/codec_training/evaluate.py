"""`codecssl-tokenize eval-codec`: how a codec sounds, in figures, on clips that `tiny_16khz` was not trained on."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
import torchaudio
from numpy.typing import NDArray
from torch import Tensor

from codecssl.tokenize.backends import encodec, tiny_16khz
from codecssl.tokenize.codec import Codec
from codecssl.tokenize.codec_training.train import is_held_out
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.measure.entropies import entropy
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.sources.audio import read_wave
from codecssl.tokenize.sources.manifest import read_rows

RATE = 16_000
MAX_LAG = 800
"""Samples: decoders may delay their output; each one's is undone before comparing."""


def evaluate(manifest: Path, spec: str, clips: int) -> dict[str, Any]:
    """Figures of one codec on held-out clips of a manifest, evenly spread over its tasks.

    spec: NAME or PATH, `:K` at the end keeps K codebooks; `untrained` is tiny_16khz's network with fresh weights and
    codebooks fitted by k-means to its latents of training audio. Each clip counts at most its first 10 s.
    mel_distance: mean |difference| of natural-log 80-band mel magnitudes (1024-sample windows, hop 256, floor 1e-5).
    """
    codec = _load(spec, manifest)
    mel, sdr, seconds, spent = [], [], 0.0, 0.0
    counts = [np.zeros(size, np.int64) for size in codec.card.codebook_sizes]
    for row in held_out_clips(manifest, clips):
        wave = read_wave(manifest.parent / row["path"], RATE)[: 10 * RATE]
        began = time.perf_counter()
        codes = codec.encode([torch.from_numpy(_resample(wave, RATE, codec.card.sample_rate))])[0].codes
        spent += time.perf_counter() - began
        output = _resample(codec.decode(codes).numpy(), codec.card.sample_rate, RATE)
        target, output = align(wave, output)
        mel.append(mel_distance(target, output))
        sdr.append(si_sdr(target, output))
        seconds += len(wave) / RATE
        for count, plane in zip(counts, codes.numpy()):
            count += np.bincount(plane, minlength=len(count))
    return {
        "codec": spec,
        "kbps": codec.card.bits_per_second / 1000,
        "clips": len(mel),
        "seconds": seconds,
        "mel_distance": float(np.mean(mel)),
        "si_sdr_db": float(np.median(sdr)),
        "encode_x_real_time": seconds / spent,
        "used": [int((c > 0).sum()) for c in counts],
        "perplexity": [2 ** entropy(c) for c in counts],
    }


def held_out_clips(manifest: Path, count: int) -> list[dict[str, Any]]:
    """Up to `count` held-out rows, taken in turn from each task. Raises UserError when there are none."""
    tasks = defaultdict(list)
    for row in read_rows(manifest, "path", "task"):
        if row["task"] != "robust" and is_held_out(row):
            tasks[row["task"]].append(row)
    if not tasks:
        raise UserError(f"{manifest}: no held-out clips (one in ten speakers or clips)")
    turns = range(max(len(rows) for rows in tasks.values()))
    return [rows[i] for i in turns for rows in tasks.values() if i < len(rows)][:count]


def mel_distance(target: NDArray[np.float32], output: NDArray[np.float32]) -> float:
    """See `evaluate`; waves of the same length at 16 kHz."""
    transform = torchaudio.transforms.MelSpectrogram(RATE, n_fft=1024, hop_length=256, n_mels=80, power=1)
    logs = [torch.log(transform(torch.from_numpy(np.ascontiguousarray(w))).clamp(min=1e-5)) for w in (target, output)]
    return float((logs[0] - logs[1]).abs().mean())


def si_sdr(target: NDArray[np.float32], output: NDArray[np.float32]) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, equation 5)."""
    x, y = target.astype(np.float64), output.astype(np.float64)
    scaled = x * (x @ y) / (x @ x + 1e-12)
    return float(10 * np.log10((scaled @ scaled + 1e-12) / ((y - scaled) @ (y - scaled) + 1e-12)))


def align(target: NDArray[np.float32], output: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cut both waves to where they overlap once the output's delay (0 to MAX_LAG samples) is undone."""
    n = min(len(target), len(output))
    size = 1 << (2 * n - 1).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(output[:n], size) * np.conj(np.fft.rfft(target[:n], size)), size)
    lag = int(np.argmax(correlation[: min(MAX_LAG, n // 2) + 1]))
    return target[: n - lag], output[lag:n]


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| codec | kbps | mel distance | SI-SDR (median, dB) | encode, x real time "
        "| entries used, per codebook | perplexity, per codebook |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        used, perplexity = " ".join(map(str, r["used"])), " ".join(f"{p:.0f}" for p in r["perplexity"])
        lines.append(
            f"| {r['codec']} | {r['kbps']:.1f} | {r['mel_distance']:.3f} | {r['si_sdr_db']:.2f} | "
            f"{r['encode_x_real_time']:.0f} | {used} | {perplexity} |"
        )
    return "\n".join([*lines, "", f"{rows[0]['clips']} held-out clips, {rows[0]['seconds']:.0f} s."])


def _load(spec: str, manifest: Path) -> Codec:
    name, _, count = spec.rpartition(":")
    if not name or not count.isdigit():
        name, count = spec, ""
    if name == "untrained":
        return untrained(manifest)
    return load_codec(name, num_codebooks=int(count) if count else None)


@torch.no_grad()
def untrained(manifest: Path, clips: int = 100) -> Codec:
    """tiny_16khz's network with fresh weights and codebooks fitted by k-means to `clips` training clips."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = tiny_16khz.build_network(weight_norm=False).eval()
        rows = read_rows(manifest, "path", "task")
        rows = [row for row in rows if row["task"] != "robust" and not is_held_out(row)]
        latents: list[Tensor] = []
        for row in rows[:: max(1, len(rows) // clips)][:clips]:
            wave = read_wave(manifest.parent / row["path"], RATE)[: 5 * RATE]
            latents.append(model.encoder(torch.from_numpy(wave)[None, None])[0].t())
        tiny_16khz.fit_codebooks(model, torch.cat(latents))
    net = encodec.from_encodec(model)
    card = encodec.make_card("tiny_untrained", "seed 0", "0" * 64, net, tiny_16khz.NUM_CODEBOOKS, "cpu")
    return encodec.EncodecCodec(net, card)


def _resample(wave: NDArray[np.float32], source: int, target: int) -> NDArray[np.float32]:
    return wave if source == target else soxr.resample(wave, source, target, quality="HQ")
