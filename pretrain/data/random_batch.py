"""Batches of random codes, to measure the speed and the memory of a training step."""

from collections.abc import Sequence

import numpy as np
import torch

from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.hashed_random import hashed
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.data.masking import kept_codebooks, span_mask
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.mel import MelSpec


def random_batch(
    config: RunConfig,
    card: CodecCard,
    items: int,
    frames: int,
    *,
    label_sizes: Sequence[int],
    mel: MelSpec | None = None,
) -> Batch:
    """Build a batch of `items` of `frames` frames each, with random codes and labels and the config's masking."""
    config = at_frame_rate(config, card.frame_rate)
    keys = hashed(config.seed, np.arange(items))
    mask = span_mask(config.mask, keys, np.full(items, frames))
    random = np.random.default_rng(config.seed)
    codes = np.stack([random.integers(0, size, (items, frames)) for size in card.row_sizes], axis=1)
    kept = np.repeat(kept_codebooks(config.objective, keys, card.num_codebooks), card.codes_per_frame, axis=1)
    labels = [random.integers(0, size, (items, frames)) for size in label_sizes]
    planes = None if mel is None else random.integers(0, 256, (items, mel.bands, frames), np.uint8)
    masked = int(mask.sum())
    return Batch.of(
        torch.from_numpy(codes),
        [frames] * items,
        torch.from_numpy(mask),
        torch.from_numpy(kept),
        masked,
        mask.size - masked,
        torch.from_numpy(np.stack(labels, axis=1)) if labels else None,
        None if planes is None else torch.from_numpy(planes),
    )
