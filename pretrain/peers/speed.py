"""`codecssl-pretrain bench --peers`: training steps of codecssl and of models that read samples, side by side.

All variants have the encoder of the config and process the same seconds of audio. They take turns in one process.

    ours                       the config's objective on token shards
    HuBERT, C channels         transformers' HubertModel with a convolutional front end of C channels
    codec in the loop          our step, with transformers' EnCodec (24 kHz, random weights) encoding the samples first,
                               as EnCodecMAE's published code does
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from codecssl.pretrain.auto_batch import saved_bytes
from codecssl.pretrain.bench import SYNTHETIC, hubert_step, make_batch, make_objective, torch_step
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.tokenize.codec import CodecCard

ENCODEC = replace(
    SYNTHETIC, sample_rate=24_000, codebook_sizes=(1024,) * 8, codes_per_frame=(1,) * 8, latent_dim=128
)  # 75 frames a second, 6 kbit/s
CHANNELS = (256, 512)
"""Channels of the HuBERTs' front ends; HuBERT's own has 512."""


def peers(config: RunConfig, *, seconds: float, clip_seconds: float, steps: int) -> Iterator[dict[str, Any]]:
    """Yield one row per variant.

    audio_seconds_per_cpu_second: median over the steps. saved_mib: memory that the forward pass keeps for the backward
    pass. read_bytes_per_hour: tokens, or samples of 16 bits, read for an hour of audio.
    """
    device = torch.device("cpu")
    card = replace(ENCODEC, codebook_sizes=ENCODEC.codebook_sizes[: config.data.num_codebooks])
    card = replace(card, codes_per_frame=card.codes_per_frame[: len(card.codebook_sizes)])
    config = at_frame_rate(config, card.frame_rate)
    batch = make_batch(config, card, seconds, clip_seconds)
    objective = make_objective(config, card)
    losses: dict[str, Callable[[], Tensor]] = {"ours": lambda: objective(batch).total}
    modules: dict[str, torch.nn.Module] = {"ours": objective}
    for channels in CHANNELS:
        module, loss = hubert_step(config, batch, clip_seconds, device, conv_dim=channels)
        losses[f"HuBERT, {channels} channels"], modules[f"HuBERT, {channels} channels"] = loss, module
    losses["codec in the loop"] = with_codec(objective, batch, card, clip_seconds)
    modules["codec in the loop"] = objective
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
    bits = sum((size - 1).bit_length() for size in card.row_sizes)
    for name, loss in losses.items():
        middle = statistics.median(took[name])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            saved = saved_bytes(modules[name], loss)
        rate = 24_000 if "codec" in name else 16_000
        read = bits * float(card.frame_rate) / 8 if name == "ours" else 2 * rate
        yield {
            "what": name,
            "cpu_seconds": middle,
            "audio_seconds_per_cpu_second": audio / middle,
            "times_ours": middle / statistics.median(took["ours"]),
            "saved_mib": saved / 2**20,
            "read_mb_per_hour": read * 3600 / 1e6,
        }


def with_codec(objective: Any, batch: Batch, card: CodecCard, clip_seconds: float) -> Callable[[], Tensor]:
    """Return the loss on codes that EnCodec computes from samples in every step."""
    from transformers import EncodecConfig, EncodecModel

    codec = EncodecModel(EncodecConfig()).eval().requires_grad_(False)
    waves = torch.randn(len(batch.frames), 1, int(clip_seconds * card.sample_rate)) * 0.1

    def loss() -> Tensor:
        with torch.no_grad():
            codes = codec.encode(waves, bandwidth=6.0).audio_codes[0, :, : card.num_codebooks]  # [B, K, T]
        packed = torch.cat([item[:, :frames] for item, frames in zip(codes, batch.frames, strict=True)], dim=1)
        total: Tensor = objective(replace(batch, codes=packed)).total
        return total

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
