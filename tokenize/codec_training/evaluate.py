"""`codecssl-tokenize eval-codec`: how a codec sounds, in figures, on clips that `tiny_16khz` was not trained on."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from codecssl.tokenize.backends import encodec, tiny_16khz
from codecssl.tokenize.codec import Codec
from codecssl.tokenize.codec_training.train import is_held_out
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.measure.entropies import entropy
from codecssl.tokenize.measure.fidelity import RATE, align, mel_distance, si_sdr
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.sources.audio import read_wave
from codecssl.tokenize.sources.manifest import read_rows


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


def table(rows: list[dict[str, Any]]) -> str:
    """Format the figures as Markdown."""
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
