"""X-codec2 (Ye et al. 2025, Llasa, arXiv 2502.04128) and NeuCodec (Neuphonic 2025): one codebook of 65,536 codes.

BigCodec's encoder and layer 16 of w2v-BERT 2.0, joined and rounded to 8 channels of 4 levels. Both encoders see the
whole wave, and the filter bank is normalized over it: waves are encoded as in `parts/segments.py`.

The networks are the same. They differ in the margins of the wave and in the decoder, whose output has 16 kHz
(X-codec2) or 24 kHz (NeuCodec, resampled to 16 kHz here). A code's latent is the 8 levels before the projection.

The authors' decoder rotates queries and keys by the number of the head instead of the position. This changes no product
of a query and a key, so no rotation is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import soxr
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.bigcodec_encoder import BigCodecEncoder
from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.fsq import FiniteScalarQuantizer
from codecssl.tokenize.backends.parts.segments import SegmentCodec, chunk_policy
from codecssl.tokenize.backends.parts.vocos import ConvolutionBlock, FourierHead
from codecssl.tokenize.backends.parts.weights import (
    fill_part,
    find_weights,
    fold_weight_norm,
    load_pretrained,
    read_tensors,
    state_sha256,
)
from codecssl.tokenize.codec import CodecCard, keep_codebooks
from codecssl.tokenize.common.errors import UserError

SAMPLE_RATE, STRIDES, HOP = 16_000, (2, 2, 4, 4, 5), 320
CHANNELS, LEVELS = 8, 4
"""Channels of the quantizer and levels of each."""
LAYER = 16
"""Layer of w2v-BERT whose output is used. Later ones are not computed."""
HEAD_WIDTH = 64
"""Width of a head of the decoder's attention."""
SEMANTIC = "facebook/w2v-bert-2.0"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the two published networks."""

    repository: str
    file: str
    margin: int
    """Zeros before and after the wave for the filter bank of w2v-BERT."""
    extra: int
    """Zeros that are appended to whole frames. NeuCodec's filter bank needs another frame of samples."""
    decoder_rate: int


VARIANTS = {
    "xcodec2": Variant(
        repository="HKUSTAudio/xcodec2", file="model.safetensors", margin=160, extra=0, decoder_rate=16_000
    ),
    "neucodec": Variant(
        repository="neuphonic/neucodec", file="pytorch_model.bin", margin=0, extra=HOP, decoder_rate=24_000
    ),
}


class SemanticEncoder(nn.Module):
    """Convolutions over the output of w2v-BERT, [B, D, T]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.initial_conv = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.residual_blocks = nn.Sequential(
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, padding=1),
        )
        self.final_conv = nn.Conv1d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.initial_conv(x))  # the authors' first ReLU works in place, so the sum has its output
        found: Tensor = self.final_conv(x + self.residual_blocks[1:](x))
        return found


class AttentionWithoutPositions(nn.Module):
    """Attention over all frames without positions, [B, T, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = (
            nn.Linear(channels, 3 * channels, bias=False),
            nn.Linear(channels, channels, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2)
        )
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.c_proj(found)  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each after an RMS norm and with a residual connection, [B, T, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.att_norm, self.ffn_norm = nn.RMSNorm(channels, eps=1e-6), nn.RMSNorm(channels, eps=1e-6)
        self.att, self.mlp = AttentionWithoutPositions(channels), nn.Module()
        self.mlp.fc1 = nn.Linear(channels, 4 * channels, bias=False)
        self.mlp.fc2 = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.att_norm(x))
        found: Tensor = x + self.mlp.fc2(F.silu(self.mlp.fc1(self.ffn_norm(x))))  # type: ignore[operator]
        return found


class XCodec2Backbone(nn.Module):
    """The decoder up to the spectrum: [B, T, C] to [B, T, C]."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(channels, channels, 7, padding=3)
        self.prior_net = nn.Sequential(ConvolutionBlock(channels), ConvolutionBlock(channels))
        self.transformers = nn.Sequential(*(TransformerBlock(channels) for _ in range(depth)))
        self.post_net = nn.Sequential(ConvolutionBlock(channels), ConvolutionBlock(channels))
        self.final_layer_norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prior_net(self.embed(x.transpose(1, 2))).transpose(1, 2)
        x = self.post_net(self.transformers(x).transpose(1, 2)).transpose(1, 2)
        found: Tensor = self.final_layer_norm(x)
        return found


class XCodec2Network(nn.Module):
    """All layers with the sizes of a checkpoint. Raises KeyError if a tensor is missing."""

    def __init__(self, state: dict[str, Tensor], semantic: nn.Module) -> None:
        super().__init__()
        self.semantic_model = semantic
        width = len(state["SemanticEncoder_module.initial_conv.weight"])
        self.SemanticEncoder_module = SemanticEncoder(width)
        first, last = "CodecEnc.conv_blocks.0.bias", "CodecEnc.conv_final_block.1.bias"
        self.CodecEnc = BigCodecEncoder(len(state[first]), STRIDES, len(state[last]))
        joined, channels = len(state["fc_prior.bias"]), len(state["fc_post_a.bias"])
        self.fc_prior, self.fc_post_a = nn.Linear(joined, joined), nn.Linear(joined, channels)
        depth = sum(key.startswith("generator.backbone.") and key.endswith("att.c_attn.weight") for key in state)
        self.generator = nn.Module()
        self.generator.quantizer = nn.Module()
        self.generator.quantizer.project_in = nn.Linear(joined, CHANNELS)
        self.generator.quantizer.project_out = nn.Linear(CHANNELS, joined)
        self.generator.backbone = XCodec2Backbone(channels, depth)
        spectrum = len(state["generator.head.out.bias"]) - 2
        self.generator.head = FourierHead(channels, spectrum, spectrum // 4)


class Xcodec2Codec(SegmentCodec):
    """X-codec2 or NeuCodec as a `Codec`."""

    network: Any

    def __init__(self, network: XCodec2Network, variant: Variant, card: CodecCard, device: str = "cpu") -> None:
        super().__init__(network, FiniteScalarQuantizer(CHANNELS, LEVELS, device), card, device)
        self.variant = variant

    @cached_property
    def filter_bank(self) -> Any:
        """Compute the input features of w2v-BERT 2.0."""
        return transformers.SeamlessM4TFeatureExtractor(padding_value=1.0)

    def encode_latents(self, audio: Tensor) -> Tensor:
        frames, net = self.card.frames_of(len(audio)), self.network
        # the packages append a frame to a wave of whole frames; the wave's own frames depend on it
        samples = (len(audio) // HOP + 1) * HOP if not self.variant.extra else frames * HOP + self.variant.extra
        padded = F.pad(audio, (0, samples - len(audio)))
        margin = (self.variant.margin, self.variant.margin)
        features = self.filter_bank(F.pad(padded, margin).float().cpu(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        hidden = net.semantic_model(features.input_features.to(padded), output_hidden_states=True).hidden_states[LAYER]
        semantic = net.SemanticEncoder_module(hidden.transpose(1, 2))
        acoustic = net.CodecEnc(padded[None, None])
        both = torch.cat([semantic[..., : acoustic.shape[2]], acoustic[..., : semantic.shape[2]]], dim=1)
        latents: Tensor = net.generator.quantizer.project_in(net.fc_prior(both.transpose(1, 2)))[0].t()
        return latents[:, :frames]

    def decode_latents(self, latents: Tensor) -> Tensor:
        net = self.network
        hidden = net.fc_post_a(net.generator.quantizer.project_out(latents.t()[None]))
        wave: Tensor = net.generator.head(net.generator.backbone(hidden))[0]
        if self.variant.decoder_rate == SAMPLE_RATE:
            return wave
        found = soxr.resample(wave.cpu().numpy(), self.variant.decoder_rate, SAMPLE_RATE, quality="HQ")
        samples = latents.shape[1] * HOP
        return F.pad(torch.from_numpy(found)[:samples], (0, max(0, samples - len(found)))).to(wave)


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> Xcodec2Codec:
    """Load `xcodec2` or `neucodec` from a checkpoint, a folder with one, or the hub's cache (`Codec` loader).

    If the checkpoint does not hold w2v-BERT 2.0, it is loaded from its own repository.
    """
    variant = VARIANTS[name]
    path = find_weights(name, weights, variant.repository, variant.file, variant.file)
    # NeuCodec's name of the same parameter
    state = {key.replace(".act.beta", ".act.bias"): value for key, value in read_tensors(path, name).items()}
    try:
        semantic = build_semantic(state) or load_pretrained(name, transformers.Wav2Vec2BertModel, SEMANTIC)
        network = XCodec2Network(state, semantic)
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not the weights of {name} ({type(error).__name__}: {error})") from error
    for part, module in network.named_children():
        if part != "semantic_model" or "semantic_model.feature_projection.projection.bias" in state:
            fill_part(module, state, f"{part}.", path, name)
    kept = keep_codebooks(name, num_codebooks, 1, 1)
    card = CodecCard(
        name=name,
        weights=weights or name,
        weights_sha256=state_sha256(network),
        sample_rate=SAMPLE_RATE,
        hop_length=HOP,
        codebook_sizes=(LEVELS**CHANNELS,) * kept,
        codes_per_frame=(1,) * kept,
        latent_dim=CHANNELS,
        policies=policies(chunk_policy(), device, padding="zeros to more than a whole frame", loudness="none"),
        versions=versions("torch", "transformers", "soxr"),
    )
    fold_weight_norm(network)
    return Xcodec2Codec(network, variant, card, device)


def build_semantic(state: dict[str, Tensor]) -> nn.Module | None:
    """Build the first LAYER layers of the w2v-BERT in a checkpoint, with random weights; None if it holds none."""
    if "semantic_model.feature_projection.projection.bias" not in state:
        return None
    layer = "semantic_model.encoder.layers.0."
    width, inputs = state["semantic_model.feature_projection.projection.weight"].shape
    distances, head = state[f"{layer}self_attn.distance_embedding.weight"].shape
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=width,
        output_hidden_size=width,
        num_hidden_layers=LAYER,
        num_attention_heads=width // head,
        intermediate_size=len(state[f"{layer}ffn1.intermediate_dense.bias"]),
        feature_projection_input_dim=inputs,
        conv_depthwise_kernel_size=state[f"{layer}conv_module.depthwise_conv.weight"].shape[2],
        left_max_position_embeddings=distances - 1 - 8,
        right_max_position_embeddings=8,
        mask_time_prob=0.0,  # no mask embedding, which is of no use here
    )
    model: nn.Module = transformers.Wav2Vec2BertModel(config)
    return model
