"""`codecssl-pretrain bench --peers`: training steps of codecssl and of models that read samples, side by side.

All variants have the encoder of the config and process the same seconds of audio. They take turns in one process.

    ours, 50 frames/s          the config's objective on tokens of a codec at 16 kHz
    HuBERT, C channels         transformers' HubertModel with a convolutional front end of C channels, 50 frames/s
    ours, 75 frames/s          the same on tokens of EnCodec at 24 kHz
    codec in the loop          that step, with transformers' EnCodec (random weights) encoding the samples first, as
                               EnCodecMAE's published code does
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codecssl.pretrain.auto_batch import saved_bytes
from codecssl.pretrain.bench import SYNTHETIC, hubert_step, make_batch, make_objective, torch_step
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.corpus import with_codebooks
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.tokenize.codec import CodecCard

ENCODEC = replace(
    SYNTHETIC, sample_rate=24_000, codebook_sizes=(1024,) * 8, codes_per_frame=(1,) * 8, latent_dim=128
)  # 75 frames a second, 6 kbit/s
CODEC = "codec in the loop"
CHANNELS = (256, 512)
"""Channels of the HuBERTs' front ends; HuBERT's own has 512."""


def peers(config: RunConfig, *, seconds: float, clip_seconds: float, steps: int) -> Iterator[dict[str, Any]]:
    """Yield one row per variant. The codebooks are `data.num_codebooks`, or 8.

    cpu_seconds: median over the steps. times_ours: relative to our step at the same frame rate. saved_mib: memory that
    the forward pass keeps for the backward pass. read_mb_per_hour: tokens, or samples of 16 bits, read for an hour of
    audio.
    """
    device = torch.device("cpu")
    losses: dict[str, Callable[[], Tensor]] = {}
    modules: dict[str, torch.nn.Module] = {}
    read: dict[str, float] = {}
    for full in (SYNTHETIC, ENCODEC):
        card = with_codebooks(full, config.data.num_codebooks or 8)
        own = at_frame_rate(config, card.frame_rate)
        batch, objective = make_batch(own, card, seconds, clip_seconds), make_objective(own, card)
        ours = f"ours, {float(card.frame_rate):.0f} frames/s"
        losses[ours], modules[ours] = partial(_loss, objective, batch), objective
        read[ours] = sum((size - 1).bit_length() for size in card.row_sizes) * float(card.frame_rate) / 8
        if full is ENCODEC:
            losses[CODEC], modules[CODEC] = with_codec(objective, batch, card, clip_seconds), objective
            read[CODEC] = 2.0 * card.sample_rate
            break
        for channels in CHANNELS:
            name = f"HuBERT, {channels} channels"
            modules[name], losses[name] = hubert_step(own, batch, clip_seconds, device, conv_dim=channels)
            read[name] = 2.0 * card.sample_rate
    updates = {name: torch_step(modules[name], loss, config, device) for name, loss in losses.items()}
    half = config.engine.precision == "bf16"
    took: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(steps + 1):
        for name, update in updates.items():
            began = time.process_time()
            update()
            if turn:
                took[name].append(time.process_time() - began)
    audio = len(batch.frames) * clip_seconds
    reference = 1.0
    for name, loss in losses.items():
        middle = statistics.median(took[name])
        reference = middle if name.startswith("ours") else reference
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            saved = saved_bytes(modules[name], loss)
        yield {
            "what": name,
            "cpu_seconds": middle,
            "audio_seconds_per_cpu_second": audio / middle,
            "times_ours": middle / reference,
            "saved_mib": saved / 2**20,
            "read_mb_per_hour": read[name] * 3600 / 1e6,
        }


def _loss(objective: Any, batch: Batch) -> Tensor:
    total: Tensor = objective(batch).total
    return total


def with_codec(objective: Any, batch: Batch, card: CodecCard, clip_seconds: float) -> Callable[[], Tensor]:
    """Return the loss on codes that EnCodec computes from samples in every step."""
    from transformers import EncodecConfig, EncodecModel

    codec = EncodecModel(EncodecConfig()).eval().requires_grad_(False)
    waves = torch.randn(len(batch.frames), 1, int(clip_seconds * card.sample_rate)) * 0.1

    def loss() -> Tensor:
        with torch.no_grad():
            codes = codec.encode(waves, bandwidth=6.0).audio_codes[0, :, : card.num_codebooks]  # [B, K, T]
        packed = torch.cat([item[:, :frames] for item, frames in zip(codes, batch.frames, strict=True)], dim=1)
        return _loss(objective, replace(batch, codes=packed))

    return loss


def table(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Format the rows as a Markdown table."""
    yield "| | CPU s a step | s of audio a CPU s | x ours | saved for backward, MiB | MB read per hour of audio |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['what']} | {row['cpu_seconds']:.2f} | {row['audio_seconds_per_cpu_second']:.1f} |"
            f" {row['times_ours']:.2f} | {row['saved_mib']:.0f} | {row['read_mb_per_hour']:.1f} |"
        )
