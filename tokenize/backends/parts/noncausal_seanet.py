"""EnCodec's encoder and decoder that look to both sides, as in SpeechTokenizer and WavTokenizer.

Defossez et al. 2022 (arXiv 2210.13438), section 3.2, without the streaming variant's causal padding. The layers are
those of the `encodec` package, whose LSTM has one direction.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from encodec.modules.conv import SConv1d
from encodec.modules.seanet import SEANetDecoder, SEANetEncoder
from torch import Tensor, nn

from codecssl.tokenize.common.errors import UserError


class Bidirectional(nn.Module):
    """An LSTM in both directions over [B, C, T], plus its input: [B, 2 C, T]."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, layers, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.permute(2, 0, 1)
        both: Tensor = self.lstm(steps)[0]
        return (both + torch.cat([steps, steps], dim=2)).permute(1, 2, 0)


def build_encoder(*, lstm_layers: int, bidirectional: bool, **shape: Any) -> SEANetEncoder:
    """Build an encoder with random weights. shape: arguments of `encodec.modules.seanet.SEANetEncoder`."""
    with warnings.catch_warnings():  # torch deprecates the weight_norm that the encodec package uses
        warnings.simplefilter("ignore", FutureWarning)
        encoder = SEANetEncoder(causal=False, norm="weight_norm", lstm=0 if bidirectional else lstm_layers, **shape)
        if bidirectional:
            channels = shape["n_filters"] << len(shape["ratios"])
            *layers, activation, _ = encoder.model
            last = SConv1d(2 * channels, shape["dimension"], 7, norm="weight_norm")
            encoder.model = nn.Sequential(*layers, Bidirectional(channels, lstm_layers), activation, last)
    return encoder


def build_decoder(*, lstm_layers: int, **shape: Any) -> SEANetDecoder:
    """Build a decoder with random weights. shape: arguments of `encodec.modules.seanet.SEANetDecoder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return SEANetDecoder(causal=False, norm="weight_norm", lstm=lstm_layers, **shape)


def codebooks(state: dict[str, Tensor], key: str, path: Path, name: str) -> Tensor:
    """Stack the tensors `key.format(0)`, `key.format(1)`, ... of a checkpoint to codebooks [K, V, D], float32."""
    tables: list[Tensor] = []
    while (found := state.get(key.format(len(tables)))) is not None:
        tables.append(found.float())
    if not tables or any(table.dim() != 2 or table.shape != tables[0].shape for table in tables):
        raise UserError(f"{path}: not the weights of {name} (no codebooks {key.format(0)}, ... of one shape)")
    return torch.stack(tables)
