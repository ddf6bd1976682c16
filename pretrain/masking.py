"""Which frames and which codebooks the model does not see: pure functions of keys, for a whole batch."""

from typing import Any

import numpy as np
import numpy.typing as npt

from codecssl.pretrain.chance import Keys, smallest, uniform
from codecssl.pretrain.config import MaskConfig, ObjectiveConfig

Bools = npt.NDArray[np.bool_]

_COUNT, _STARTS, _DROP, _KEEP, _ORDER = range(5)  # one stream of random numbers per decision


def span_mask(config: MaskConfig, keys: Keys, frames: npt.NDArray[Any]) -> Bools:
    """Masked frames, [B] keys and [B] lengths -> [B, T] with T = max(frames); false in the padding.

    HuBERT's procedure (fairseq `compute_mask_indices`, static, with overlap; Codec2Vec uses the same): a
    sequence of T_i frames gets n = floor(p T_i + U[0, 1)) starts, at least one, drawn without replacement
    from [0, T_i - span]; each start masks `span` frames; spans may overlap. No length may be below the span.
    """
    span, width = config.span_frames, int(frames.max())
    assert int(frames.min()) >= span, "shorter utterances are left out by data.min_frames"
    places = frames - span + 1  # [B] possible starts
    counts = np.floor(config.start_probability * frames + uniform(keys, _COUNT)).astype(np.int64)
    values = uniform(keys[:, None], _STARTS, np.arange(width - span + 1)[None, :])  # [B, T - span + 1]
    values[np.arange(width - span + 1)[None, :] >= places[:, None]] = np.inf
    starts = smallest(values, np.clip(counts, 1, places))
    return _dilate(starts, span)


def kept_codebooks(config: ObjectiveConfig, keys: Keys, num_codebooks: int) -> Bools:
    """Quantizer dropout: [B] keys -> [B, K], false for the codebooks that the input of an item lacks.

    A fraction `quantizer_dropout` of the items keeps n ~ U{1..K} codebooks: the first n, or any n of them.
    """
    books = np.arange(num_codebooks)[None, :]
    dropped = uniform(keys, _DROP) < config.quantizer_dropout
    counts = np.where(dropped, 1 + np.floor(uniform(keys, _KEEP) * num_codebooks), num_codebooks).astype(np.int64)
    if config.quantizer_dropout_kind == "prefix":
        return books < counts[:, None]
    return smallest(uniform(keys[:, None], _ORDER, books), counts)


def _dilate(starts: Bools, span: int) -> Bools:
    """[B, S] starts -> [B, S + span - 1], true where one of the last `span` positions is a start."""
    batch, places = starts.shape
    total = np.zeros((batch, places + 2 * span - 1), dtype=np.int32)  # `span` zeros, the sums, then the last sum
    np.cumsum(starts, axis=1, out=total[:, span : span + places])
    total[:, span + places :] = total[:, span + places - 1 : span + places]
    return total[:, span:] > total[:, :-span]
