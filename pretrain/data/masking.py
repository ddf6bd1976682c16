"""Masking of frames and dropout of codebooks: pure functions of keys, for a whole batch.

A new masking is a function with the arguments of `span_mask`, an entry of `KINDS`, and its name in `MaskConfig.kind`
(pretrain/config.py).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from codecssl.pretrain.config import MaskConfig, ObjectiveConfig
from codecssl.pretrain.data.hashed_random import Keys, smallest, uniform

Bools = npt.NDArray[np.bool_]

_COUNT, _STARTS, _DROP, _KEEP, _ORDER = range(5)  # one stream of random numbers per decision


def span_mask(config: MaskConfig, keys: Keys, frames: npt.NDArray[Any]) -> Bools:
    """Mask frames: [B] keys and [B] lengths -> bool [B, T] with T = max(frames), false in the padding.

    `KINDS` has a function for each `config.kind`. Every length must be at least the span.
    """
    assert config.span_frames, "the config has lengths in seconds: convert it with `frame_rate.at_frame_rate`"
    assert int(frames.min()) >= config.span_frames, "shorter utterances are left out by data.min_frames"
    return KINDS[config.kind](config, keys, frames)


def _spans(config: MaskConfig, keys: Keys, frames: npt.NDArray[Any]) -> Bools:
    """HuBERT's procedure (fairseq `compute_mask_indices`, static, with overlap; Codec2Vec uses the same).

    A sequence of T_i frames gets n = floor(p T_i + U[0, 1)) starts, at least one, drawn without replacement from
    [0, T_i - span]; each start masks `span` frames; spans may overlap.
    """
    ranks, places = _start_ranks(config, keys, frames)
    counts = np.floor(config.start_probability * frames + uniform(keys, _COUNT)).astype(np.int64)
    return _dilate(ranks < np.clip(counts, 1, places)[:, None], config.span_frames)


def _exact(config: MaskConfig, keys: Keys, frames: npt.NDArray[Any]) -> Bools:
    """EnCodecMAE's procedure: random starts until `fraction` of the frames is masked, then the excess is unmasked.

    A frame is masked if the first start that covers it is drawn early enough. The last span is truncated. Exactly
    floor(fraction T_i) frames are masked, at least one.
    """
    ranks, _ = _start_ranks(config, keys, frames)
    span, width = config.span_frames, int(frames.max())
    never = np.iinfo(np.int64).max
    padded = np.full((len(frames), width + span - 1), never, dtype=np.int64)
    padded[:, span - 1 : span - 1 + ranks.shape[1]] = ranks
    covered = np.lib.stride_tricks.sliding_window_view(padded, span, axis=1).min(axis=2)  # [B, T]
    covered[np.arange(width)[None, :] >= frames[:, None]] = never
    order = np.argsort(covered, axis=1, kind="stable")
    masked = np.zeros((len(frames), width), dtype=np.bool_)
    wanted = np.maximum(1, np.floor(config.fraction * frames + 1e-9)).astype(np.int64)
    np.put_along_axis(masked, order, np.arange(width)[None, :] < wanted[:, None], axis=1)
    return masked


KINDS = {"spans": _spans, "exact": _exact}
"""The function of each `MaskConfig.kind`."""


def _start_ranks(
    config: MaskConfig, keys: Keys, frames: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Return the draw order [B, S] of the possible starts (0 first), and the number of possible starts [B] per item.

    Positions beyond an item's own come last.
    """
    places = frames - config.span_frames + 1
    width = int(frames.max()) - config.span_frames + 1
    values = uniform(keys[:, None], _STARTS, np.arange(width)[None, :])
    values[np.arange(width)[None, :] >= places[:, None]] = np.inf
    return np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable"), places


def kept_codebooks(config: ObjectiveConfig, keys: Keys, num_codebooks: int) -> Bools:
    """Quantizer dropout: [B] keys -> bool [B, K], false for the codebooks that are dropped from an item's input.

    A fraction `quantizer_dropout` of the items keeps n ~ U{1..K} codebooks: the first n, or any n of them.
    """
    books = np.arange(num_codebooks)[None, :]
    dropped = uniform(keys, _DROP) < config.quantizer_dropout
    counts = np.where(dropped, 1 + np.floor(uniform(keys, _KEEP) * num_codebooks), num_codebooks).astype(np.int64)
    if config.quantizer_dropout_kind == "prefix":
        return books < counts[:, None]
    return smallest(uniform(keys[:, None], _ORDER, books), counts)


def _dilate(starts: Bools, span: int) -> Bools:
    """Extend starts [B, S] to spans [B, S + span - 1], true if one of the last `span` positions is a start."""
    batch, places = starts.shape
    total = np.zeros((batch, places + 2 * span - 1), dtype=np.int32)  # `span` zeros, the sums, then the last sum
    np.cumsum(starts, axis=1, out=total[:, span : span + places])
    total[:, span + places :] = total[:, span + places - 1 : span + places]
    return total[:, span:] > total[:, :-span]
