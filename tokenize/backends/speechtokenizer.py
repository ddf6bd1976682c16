"""SpeechTokenizer (Zhang et al. 2024, arXiv 2308.16692): EnCodec's layers, the first codebook distilled from HuBERT.

Section 3: the convolutions look to both sides, and the encoder's LSTM runs in both directions, so every latent depends
on the whole wave. Waves are therefore encoded as in `parts/segments.py`. They are not padded: each layer mirrors its
own input, as in the authors' package.

Convolutions and the decoder come from the `encodec` package, with which the checkpoint's keys agree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.noncausal_seanet import build_decoder, build_encoder, codebooks
from codecssl.tokenize.backends.parts.residual_vq import ResidualQuantizer
from codecssl.tokenize.backends.parts.segments import SegmentCodec, chunk_policy
from codecssl.tokenize.backends.parts.weights import (
    fill_part,
    find_weights,
    fold_weight_norm,
    read_tensors,
    state_sha256,
)
from codecssl.tokenize.codec import CodecCard, keep_codebooks
from codecssl.tokenize.common.errors import UserError

REPOSITORY, FILE = "fnlp/SpeechTokenizer", "speechtokenizer_hubert_avg/SpeechTokenizer.pt"
DEFAULTS = {
    "sample_rate": 16_000,
    "n_filters": 64,
    "strides": [8, 5, 4, 2],
    "dimension": 1024,
    "lstm_layers": 2,
    "bidirectional": True,
    "dilation_base": 2,
    "residual_kernel_size": 3,
    "n_residual_layers": 1,
    "activation": "ELU",
}
"""The published configuration. A config.json next to the checkpoint overrides it."""


class SpeechTokenizerNetwork(nn.Module):
    """Encoder and decoder."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        shape = {
            "dimension": config["dimension"],
            "n_filters": config["n_filters"],
            "ratios": config["strides"],
            "n_residual_layers": config["n_residual_layers"],
            "residual_kernel_size": config["residual_kernel_size"],
            "dilation_base": config["dilation_base"],
            "activation": config["activation"],
        }
        self.encoder = build_encoder(lstm_layers=config["lstm_layers"], bidirectional=config["bidirectional"], **shape)
        self.decoder = build_decoder(lstm_layers=config["lstm_layers"], **shape)


class SpeechTokenizerCodec(SegmentCodec):
    """SpeechTokenizer as a `Codec`."""

    network: SpeechTokenizerNetwork

    def encode_latents(self, audio: Tensor) -> Tensor:
        found: Tensor = self.network.encoder(audio[None, None])
        return found[0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        wave: Tensor = self.network.decoder(latents[None])
        return wave[0, 0]


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> SpeechTokenizerCodec:
    """Load `speechtokenizer` from its .pt file, a folder with it, or the hub's cache (`Codec` loader)."""
    path = find_weights(name, weights, REPOSITORY, FILE, "*.pt")
    state, config = read_tensors(path, name), read_config(path)
    try:
        network = SpeechTokenizerNetwork(config)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path.with_name('config.json')}: not the configuration of {name} ({error})") from error
    fill_part(network.encoder, state, "encoder.", path, name)
    fill_part(network.decoder, state, "decoder.", path, name)
    tables = codebooks(state, "quantizer.vq.layers.{}._codebook.embed", path, name)
    kept = keep_codebooks(name, num_codebooks, len(tables), len(tables))
    card = make_card(name, weights or name, config, state_sha256(network, tables), tables, kept, device)
    fold_weight_norm(network)
    return SpeechTokenizerCodec(network, ResidualQuantizer(tables[:kept].to(device)), card, device)


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint: `DEFAULTS`, with the values of the config.json next to it."""
    file = path.with_name("config.json")
    if not file.exists():
        return dict(DEFAULTS)
    try:
        values = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: not a model's configuration ({error})") from error
    config = DEFAULTS | {key: values[key] for key in DEFAULTS if key in values}
    if config["sample_rate"] != 16_000:
        raise UserError(f"{file}: sample_rate {config['sample_rate']}, SpeechTokenizer has 16000")
    return config


def make_card(
    name: str, weights: str, config: dict[str, Any], digest: str, tables: Tensor, num_codebooks: int, device: str
) -> CodecCard:
    """Build the card of a checkpoint with codebooks [K, V, D]."""
    hop = int(torch.tensor(config["strides"]).prod())
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=digest,
        sample_rate=config["sample_rate"],
        hop_length=hop,
        codebook_sizes=(tables.shape[1],) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=tables.shape[2],
        policies=policies(chunk_policy(), device, padding="mirrored by each layer", loudness="none"),
        versions=versions("torch", "encodec", "soxr"),
    )
