"""A waveform HuBERT of transformers with our encoder's shape: the peer that reads samples instead of tokens.

First iteration of HuBERT (arXiv 2106.07447): clusters of cepstra are predicted at masked frames from a convolutional
front end's output, spans as in `mask.kind spans`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from codecssl.pretrain.bench import hubert_model
from codecssl.pretrain.config import MaskConfig, RunConfig
from codecssl.pretrain.data.hashed_random import hashed
from codecssl.pretrain.data.masking import span_mask
from codecssl.pretrain.engine.optimizer import make_optimizer, uncompiled
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources.audio import read_wave

SAMPLE_RATE, HOP = 16_000, 320


@dataclass(frozen=True)
class Recording:
    """One utterance in memory."""

    wave: NDArray[np.int16]
    """Samples at 16 kHz."""
    labels: NDArray[np.uint16]
    """One class per frame of 320 samples."""


def check(data: Shards, audio: Path | None) -> None:
    """Raise UserError for shards that the comparison cannot use: without a log-mel plane, or without their audio.

    The HuBERT's front end has 320 samples per frame at 16 kHz. The codec must have the same.
    """
    card = data.card
    if (card.sample_rate, card.hop_length) != (SAMPLE_RATE, HOP):
        raise UserError(f"{data.path}: {card.sample_rate} Hz, hop {card.hop_length}; HuBERT needs 16000 Hz and 320")
    if data.mel_spec is None:
        raise UserError(f"{data.path}: has no log-mel plane; tokenize with --with-mel 80")
    for index in range(len(data)):
        _audio_of(data, index, audio)


def read_recordings(data: Shards, labels: Shards, audio: Path | None) -> list[Recording]:
    """Read the audio of all utterances of `data`, whose paths are relative to `audio`, and their labels."""
    found = []
    for index in range(len(data)):
        wave = read_wave(_audio_of(data, index, audio), SAMPLE_RATE) * 32768.0
        found.append(Recording(np.clip(wave, -32768, 32767).astype(np.int16), labels.codes(index)[0]))
    return found


def _audio_of(data: Shards, index: int, audio: Path | None) -> Path:
    utterance = data.utterance(index)
    path = (audio or Path()) / utterance.path
    if not path.exists():
        raise UserError(f"{path}: no audio file of {utterance.id!r}; give its folder as --audio")
    return path


@dataclass(frozen=True)
class TrainingCost:
    """Cost of a training run."""

    steps: int
    cpu_seconds: float
    audio_seconds: float


def train(
    config: RunConfig, recordings: list[Recording], classes: int, output: Path, *, cpu_seconds: float,
    conv_dim: int = 512, say: Callable[[str], None] = print,
) -> TrainingCost:  # fmt: skip
    """Train for `cpu_seconds` of processor time with the config's batch, crop and optimizer, and save to `output`.

    config: with lengths in frames (`at_frame_rate`).

    The learning rate follows the share of the time that has passed: warm-up over `optim.warmup_fraction`, then linear
    decay. The folder opens with `HubertModel.from_pretrained`.
    """
    from transformers import Wav2Vec2FeatureExtractor

    torch.manual_seed(config.seed)
    model, optim = hubert_model(config.model, conv_dim=conv_dim), config.optim
    heads = nn.Linear(config.model.dim, classes)
    trained = [*model.parameters(), *heads.parameters()]
    optimizer = make_optimizer(nn.ModuleList([model, heads]), optim)
    rates = [group["lr"] for group in optimizer.param_groups]
    usable = [r for r in recordings if len(r.labels) >= config.data.min_frames]
    if not usable:
        raise UserError(f"data.min_frames: {config.data.min_frames}, but all utterances are shorter; lower it")
    random, audio, step, began = np.random.default_rng(config.seed), 0.0, 0, time.process_time()
    while (spent := time.process_time() - began) < cpu_seconds:
        done = spent / cpu_seconds
        rate = min(1.0, done / max(optim.warmup_fraction, 1e-9)) * (1.0 - done) + 0.01
        for group, highest in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = highest * rate
        waves, labels = crops(usable, config.data.crop_frames, config.data.batch_frames, random)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision == "bf16"):
            loss = _loss(model, heads, waves, labels, config.mask, config.seed + step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.clip_norm or float("inf"))
        with uncompiled(optim):
            optimizer.step()
        optimizer.zero_grad()
        step, audio = step + 1, audio + waves.numel() / SAMPLE_RATE
        if step % 20 == 0:
            say(
                f"step {step} | loss {float(loss):.4f} | {audio / (time.process_time() - began):.1f} s of audio a CPU s"
            )
    model.save_pretrained(output)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(output)
    return TrainingCost(step, time.process_time() - began, audio)


def crops(
    recordings: list[Recording], frames: int, batch_frames: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return waves [B, 320 T] and labels [B, T] of random crops of one length, about `batch_frames` frames in all.

    T is that of an utterance drawn in proportion to its length, at most `frames`. The others are drawn likewise from
    those that are as long: no item is padded, as HuBERT's group norm would need.
    """
    lengths = np.array([len(r.labels) for r in recordings])
    frames = min(frames, int(random.choice(lengths, p=lengths / lengths.sum())))
    fitting = np.flatnonzero(lengths >= frames)
    shares = lengths[fitting] / lengths[fitting].sum()
    waves, labels = [], []
    for index in random.choice(fitting, max(1, batch_frames // frames), p=shares):
        recording = recordings[index]
        start = int(random.integers(0, lengths[index] - frames + 1))
        wave = recording.wave[start * HOP : (start + frames) * HOP].astype(np.float32) / 32768.0
        waves.append(np.pad(wave, (0, frames * HOP - len(wave))))  # the codec fills the last frame with zeros
        labels.append(recording.labels[start : start + frames].astype(np.int64))
    return torch.from_numpy(np.stack(waves)), torch.from_numpy(np.stack(labels))


def _loss(model: Any, heads: nn.Module, waves: Tensor, labels: Tensor, mask: MaskConfig, seed: int) -> Tensor:
    """Mean cross-entropy at the masked frames. The front end has one frame fewer than the labels."""
    frames = int(model._get_feat_extract_output_lengths(waves.shape[1]))
    masked = torch.from_numpy(span_mask(mask, hashed(seed, np.arange(len(waves))), np.full(len(waves), frames)))
    model.train()
    hidden = model(waves, mask_time_indices=masked).last_hidden_state
    logits = heads(hidden[masked])
    return F.cross_entropy(logits.float(), labels[:, :frames][masked])
