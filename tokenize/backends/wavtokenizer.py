"""WavTokenizer (Ji et al. 2024, arXiv 2408.16532): EnCodec's encoder with a single codebook, and a Vocos decoder.

The encoder's convolutions look to both sides, and the decoder attends to all frames. Waves are encoded as in
`parts/segments.py`. They are not padded: each layer mirrors its own input, as in the authors' code.

A checkpoint determines all sizes: the strides (8, 5, 4, 2 at 75 Hz, 6, 5, 5, 4 at 40 Hz) are half of the kernels.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor, nn

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.noncausal_seanet import build_encoder, codebooks
from codecssl.tokenize.backends.parts.residual_vq import ResidualQuantizer
from codecssl.tokenize.backends.parts.segments import SegmentCodec, chunk_policy
from codecssl.tokenize.backends.parts.vocos import FourierHead, VocosBackbone
from codecssl.tokenize.backends.parts.weights import (
    fill_part,
    find_weights,
    fold_weight_norm,
    read_tensors,
    state_sha256,
)
from codecssl.tokenize.codec import CodecCard, keep_codebooks
from codecssl.tokenize.common.errors import UserError

REPOSITORY, FILE = "novateur/WavTokenizer-large-speech-75token", "wavtokenizer_large_speech_320_v2.ckpt"
SAMPLE_RATE = 24_000
ENCODER, QUANTIZER = "feature_extractor.encodec.encoder.", "feature_extractor.encodec.quantizer."


class WavTokenizerNetwork(nn.Module):
    """Encoder and decoder with the sizes of a checkpoint. Raises KeyError if a tensor is missing."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        convolutions = [state[f"{ENCODER}model.{i}.conv.conv.weight_v"] for i in (0, 3, 6, 9, 12, 15)]
        filters, dimension = convolutions[0].shape[0], convolutions[-1].shape[0]
        self.ratios = [weight.shape[2] // 2 for weight in convolutions[-2:0:-1]]
        """Strides of the encoder, the last first."""
        self.encoder = build_encoder(
            lstm_layers=2, bidirectional=False, dimension=dimension, n_filters=filters, ratios=self.ratios
        )
        hidden, channels = state["backbone.convnext.0.pwconv1.weight"].shape
        blocks = sum(key.startswith("backbone.convnext.") and key.endswith(".gamma") for key in state)
        norms = len(state["backbone.norm.scale.weight"])
        self.backbone = VocosBackbone(dimension, channels, hidden, blocks, norms)
        self.head = FourierHead(channels, len(state["head.out.weight"]) - 2, math.prod(self.ratios))


class WavTokenizerCodec(SegmentCodec):
    """WavTokenizer as a `Codec`."""

    network: WavTokenizerNetwork

    def encode_latents(self, audio: Tensor) -> Tensor:
        found: Tensor = self.network.encoder(audio[None, None])
        return found[0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        wave: Tensor = self.network.head(self.network.backbone(latents[None]))
        return wave[0]


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> WavTokenizerCodec:
    """Load `wavtokenizer` from a .ckpt file, a folder with one, or the hub's cache (`Codec` loader)."""
    path = find_weights(name, weights, REPOSITORY, FILE, "*.ckpt")
    state = read_tensors(path, name)
    network, tables = build(state, path, name)
    kept = keep_codebooks(name, num_codebooks, len(tables), len(tables))
    card = make_card(name, weights or name, network, state_sha256(network, tables), tables, kept, device)
    fold_weight_norm(network)
    return WavTokenizerCodec(network, ResidualQuantizer(tables[:kept].to(device)), card, device)


def build(state: dict[str, Tensor], path: Path, name: str) -> tuple[WavTokenizerNetwork, Tensor]:
    """Build the network of a checkpoint and its codebooks [K, V, D]. Raises UserError if it is another model's."""
    try:
        network = WavTokenizerNetwork(state)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: not the weights of {name} ({type(error).__name__}: {error})") from error
    fill_part(network.encoder, state, ENCODER, path, name)
    fill_part(network.backbone, state, "backbone.", path, name)
    fill_part(network.head, state, "head.", path, name)
    return network, codebooks(state, QUANTIZER + "vq.layers.{}._codebook.embed", path, name)


def make_card(
    name: str, weights: str, network: WavTokenizerNetwork, digest: str, tables: Tensor, num_codebooks: int, device: str
) -> CodecCard:
    """Build the card of a network with codebooks [K, V, D]."""
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=digest,
        sample_rate=SAMPLE_RATE,
        hop_length=math.prod(network.ratios),
        codebook_sizes=(tables.shape[1],) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=tables.shape[2],
        policies=policies(chunk_policy(), device, padding="mirrored by each layer", loudness="none"),
        versions=versions("torch", "encodec", "soxr"),
    )
