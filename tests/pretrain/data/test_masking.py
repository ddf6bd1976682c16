from typing import get_args, get_type_hints

import numpy as np
import pytest
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

from codecssl.pretrain.config import MaskConfig, ObjectiveConfig, RunConfig
from codecssl.pretrain.data.hashed_random import hashed, smallest, uniform
from codecssl.pretrain.data.masking import KINDS, kept_codebooks, span_mask
from codecssl.pretrain.frame_rate import at_frame_rate

HUBERT = at_frame_rate(RunConfig(), 50).mask


def test_every_kind_of_masking_has_a_function() -> None:
    assert set(KINDS) == set(get_args(get_type_hints(MaskConfig)["kind"]))


def test_mask_statistics_equal_huberts() -> None:
    """The published pair (8 % starts, span 10) masks as many frames as transformers' HuBERT masking."""
    frames = np.full(400, 500)
    ours = span_mask(HUBERT, hashed(1, np.arange(400)), frames)
    np.random.seed(0)
    theirs = _compute_mask_indices((400, 500), mask_prob=0.8, mask_length=10, min_masks=2)
    assert abs(ours.mean() - theirs.mean()) < 0.01
    assert abs(ours.mean() - 0.566) < 0.01  # 1 - 0.92^10
    # Equally often along the sequence, apart from its ends, where fewer spans reach.
    assert ours.mean(0)[20:-20].min() > 0.45
    assert ours.mean(0)[20:-20].max() < 0.68


def test_every_masked_run_is_a_span_at_least_and_padding_is_free() -> None:
    frames = np.random.default_rng(0).integers(20, 200, 64)
    mask = span_mask(MaskConfig(start_probability=0.08, span_frames=7), hashed(5, np.arange(64)), frames)
    assert mask.shape == (64, frames.max())
    for row, count in zip(mask, frames, strict=True):
        assert not row[count:].any()
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        runs = edges[1::2] - edges[::2]
        assert len(runs)
        assert runs.min() >= 7


def test_number_of_starts() -> None:
    """floor(p T + U[0, 1)) has the mean p T: with a span of one the masked frames are the starts."""
    frames = np.full(4000, 33)
    counts = span_mask(MaskConfig(start_probability=0.08, span_frames=1), hashed(9, np.arange(4000)), frames).sum(1)
    assert set(counts.tolist()) == {2, 3}
    assert abs(counts.mean() - 0.08 * 33) < 0.05


def test_a_mask_does_not_depend_on_its_batch() -> None:
    frames, keys = np.array([40, 95, 60]), hashed(2, np.arange(3))
    together = span_mask(HUBERT, keys, frames)
    for i in range(3):
        alone = span_mask(HUBERT, keys[i : i + 1], frames[i : i + 1])
        assert np.array_equal(together[i, : frames[i]], alone[0])


def test_quantizer_dropout_keeps_prefixes_of_uniform_length_on_half_of_the_items() -> None:
    keys = hashed(3, np.arange(20_000))
    kept = kept_codebooks(ObjectiveConfig(), keys, 8)
    assert not (kept[:, 1:] & ~kept[:, :-1]).any(), "only the first codebooks may be kept"
    shares = np.bincount(kept.sum(1), minlength=9)[1:] / len(kept)
    assert np.allclose(shares, [1 / 16] * 7 + [1 / 2 + 1 / 16], atol=0.008)
    assert kept_codebooks(ObjectiveConfig(quantizer_dropout=0.0), keys, 8).all()


def test_subset_dropout_takes_any_codebook() -> None:
    config = ObjectiveConfig(quantizer_dropout=1.0, quantizer_dropout_kind="subset")
    kept = kept_codebooks(config, hashed(3, np.arange(20_000)), 4)
    assert kept.any(1).all()
    assert np.allclose(kept.mean(0), 0.625, atol=0.015)  # E[n] / K = (K + 1) / 2K


@pytest.mark.parametrize("shift", [0, 1])
def test_hashes_are_even_and_independent(shift: int) -> None:
    """Neighbouring keys give unrelated numbers: moments and correlation of 100 000 draws."""
    draws = uniform(7, np.arange(100_000) + shift)
    others = uniform(8, np.arange(100_000))
    assert abs(draws.mean() - 0.5) < 0.004
    assert abs(draws.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(draws, others)[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.01
    assert len(np.unique(hashed(np.arange(300)[:, None], np.arange(300)[None, :]))) == 90_000


def test_smallest_against_a_sort() -> None:
    values = np.random.default_rng(0).random((20, 9))
    counts = np.arange(20) % 10
    for row, count, chosen in zip(values, counts, smallest(values, counts), strict=True):
        assert set(np.flatnonzero(chosen)) == set(np.argsort(row)[:count])
