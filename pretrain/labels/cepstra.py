"""Cepstra of the stored log-mel plane: the features of HuBERT's first clustering (arXiv 2106.07447, section IV-B)."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dct
from torchaudio.functional import compute_deltas

from codecssl.pretrain.labels.clustering import Features
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.shards import Shards

CEPSTRA = 13
_DELTA_FRAMES = 5


def cepstra(spec: MelSpec, plane: NDArray[np.uint8]) -> Features:
    """Log-mel plane uint8 [T, bands] -> float32 [T, 39]: 13 cepstra, their first and their second differences.

    Cepstra are the orthonormal DCT-II of natural log powers. Differences are regressions over 5 frames, as in
    torchaudio's `compute_deltas`. There is no normalisation.
    """
    static = dct(spec.log_power(plane) * np.float32(np.log(10.0)), axis=1, norm="ortho")[:, :CEPSTRA]
    rows = [torch.from_numpy(np.ascontiguousarray(static.T))]
    for _ in range(2):
        rows.append(compute_deltas(rows[-1], win_length=_DELTA_FRAMES))
    found: Features = torch.cat(rows).t().contiguous().numpy()
    return found


class CepstralExtractor:
    """`labellers.Extractor` for the source mfcc. It reads the planes alone, whichever codec wrote the codes."""

    def __init__(self, card: CodecCard) -> None:
        self.num_codebooks = card.num_codebooks
        self.made_of = {"source": "mfcc", "layer": "mfcc", "codec": card.name, "weights_sha256": "mfcc"}

    def features(self, shards: Shards, indices: Sequence[int]) -> list[Features]:
        """Return features [T_i, 39] of the given utterances. Raises UserError for shards without a plane."""
        if shards.mel_spec is None:
            raise UserError(f"{shards.path}: has no log-mel plane, which mfcc reads; tokenize with --with-mel 80")
        if shards.mel_spec.bands < CEPSTRA:
            raise UserError(f"{shards.path}: {shards.mel_spec.bands} mel bands, mfcc needs at least {CEPSTRA}")
        return [cepstra(shards.mel_spec, shards.mel(index)) for index in indices]
