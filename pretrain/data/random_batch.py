"""Batches of random codes, to measure the speed and the memory of a training step."""

from collections.abc import Sequence

import numpy as np
import torch

from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.hashed_random import hashed
from codecssl.pretrain.data.loader import Batch, kept_codes, packed_mask
from codecssl.pretrain.data.masking import kept_codebooks
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
    keys, lengths = hashed(config.seed, np.arange(items)), np.full(items, frames)
    mask = packed_mask(config.mask, keys, lengths)
    random = np.random.default_rng(config.seed)
    codes = np.stack([random.integers(0, size, mask.size) for size in card.row_sizes])
    kept = kept_codebooks(config.objective, keys, card.num_codebooks)
    labels = [random.integers(0, size, mask.size) for size in label_sizes]
    planes = None if mel is None else random.integers(0, 256, (mel.bands, mask.size), np.uint8)
    masked = int(mask.sum())
    return Batch.of(
        torch.from_numpy(codes),
        [frames] * items,
        torch.from_numpy(mask),
        kept_codes(kept, card.codes_per_frame, lengths),
        masked,
        mask.size - masked,
        torch.from_numpy(np.stack(labels)) if labels else None,
        None if planes is None else torch.from_numpy(planes),
    )
