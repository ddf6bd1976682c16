"""DualCodec (Li et al. 2025, arXiv 2505.13000): a semantic codebook, and residual codebooks for the rest of the wave.

Layer 17 of w2v-BERT 2.0, normalized per channel and averaged over the frames of a code, passes causal ConvNeXt blocks
and gives the first code. Decoded again, it is subtracted from the latent of a DAC encoder, and residual codebooks
quantize the difference. A frame's latent is the semantic vector, followed by the sum of the acoustic ones.

w2v-BERT attends to the whole wave, and its filter bank is normalized over it: waves are encoded as in
`parts/segments.py`. They are zero-padded to whole frames and MARGIN samples, so that no frame is lost in the filter
bank. The authors' package computes under float16 autocast, where codes depend on the device; here all is float32.

A checkpoint determines all sizes. Encoder, quantizer and decoder of DAC are those of transformers.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.dac import Codebook, CodebookLayers, encoder_layers
from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.segments import SegmentCodec, chunk_policy
from codecssl.tokenize.backends.parts.streaming_conv import Pace, encode_rows
from codecssl.tokenize.backends.parts.weights import (
    fill_part,
    find_weights,
    folded,
    hub_file,
    load_pretrained,
    missing,
    read_tensors,
    state_sha256,
)
from codecssl.tokenize.codec import CodecCard, keep_codebooks
from codecssl.tokenize.common.errors import UserError

REPOSITORY, STATISTICS = "amphion/dualcodec", "w2vbert2_mean_var_stats_emilia.pt"
FILES = {
    "dualcodec_12hz": "dualcodec_12hz_16384_4096.safetensors",
    "dualcodec_25hz": "dualcodec_25hz_16384_1024.safetensors",
}
HOPS = {"dualcodec_12hz": 1920, "dualcodec_25hz": 960}
"""Samples per frame."""
SAMPLE_RATE = 24_000
SEMANTIC, SEMANTIC_FOLDER, SEMANTIC_RATE, SEMANTIC_HOP = "facebook/w2v-bert-2.0", "w2v-bert-2.0", 16_000, 480
"""w2v-BERT's repository, its folder next to the checkpoint, its sample rate in Hz, and its hop in samples at 24 kHz."""
LAYER = 17
"""Layer of w2v-BERT whose output is used. Later ones are not computed."""
MARGIN = 360
"""Zeros after whole frames: the last window of the filter bank (25 ms every 10 ms) ends 15 ms after its hop."""
PIECE = 1920
"""Samples that pass the first layers of the acoustic encoder at once on a CPU: they fit the cache."""


class ConvNeXtBlock(nn.Module):
    """A causal depthwise convolution, a layer norm and a perceptron with a residual connection, [B, C, T]."""

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(channels, channels, kernel, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        causal = self.dwconv(F.pad(x, (self.dwconv.kernel_size[0] - 1, 0)))
        hidden = F.gelu(self.pwconv1(self.norm(causal.transpose(1, 2))))
        found: Tensor = x + self.pwconv2(hidden).transpose(1, 2)
        return found


class DualCodecNetwork(nn.Module):
    """All layers but w2v-BERT, with the sizes of a checkpoint. Raises KeyError if a tensor is missing."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, state: dict[str, Tensor], semantic_model: nn.Module, mean: Tensor, variance: Tensor) -> None:
        """state: tensors with folded weight norms. mean, variance: of each channel of w2v-BERT's layer, [D]."""
        super().__init__()
        self.semantic_model = semantic_model
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", variance.sqrt())
        channels, inputs, _ = state["convnext_encoder.0.weight"].shape
        hidden = len(state["convnext_encoder.1.pwconv1.bias"])
        kernel = state["convnext_encoder.1.dwconv.weight"].shape[2]
        layers = sum(key.startswith("convnext_decoder.") and key.endswith(".dwconv.bias") for key in state)
        latent_dim = len(state[f"convnext_decoder.{layers}.bias"])
        first, last = nn.Conv1d(inputs, channels, 1), nn.Conv1d(channels, latent_dim, 1)
        blocks = [[ConvNeXtBlock(channels, hidden, kernel) for _ in range(layers)] for _ in range(2)]
        self.convnext_encoder, self.convnext_decoder = nn.Sequential(first, *blocks[0]), nn.Sequential(*blocks[1], last)
        self.semantic_vq = nn.Module()
        shape = state["semantic_vq.quantizers.0.codebook.weight"].shape
        self.semantic_vq.quantizers = nn.ModuleList([CodebookLayers(channels, *shape)])
        self.dac: Any = transformers.DacModel(dac_config(state, latent_dim))

    @property
    def hop_length(self) -> int:
        """Samples per code."""
        return math.prod(self.dac.config.downsampling_ratios)

    @property
    def semantic_dim(self) -> int:
        """Channels of the semantic codebook's vectors."""
        return self.convnext_encoder[0].out_channels  # type: ignore[return-value]


def dac_config(state: dict[str, Tensor], latent_dim: int) -> Any:
    """Build the configuration of the DAC whose tensors `state` has under `dac.`."""
    strides: list[int] = []
    while (key := f"dac.encoder.block.{len(strides) + 1}.block.4.weight") in state:
        strides.append(state[key].shape[2] // 2)  # a kernel spans two strides
    size, width = state["dac.quantizer.quantizers.0.codebook.weight"].shape
    return transformers.DacConfig(
        encoder_hidden_size=len(state["dac.encoder.block.0.bias"]),
        decoder_hidden_size=len(state["dac.decoder.model.0.bias"]),
        downsampling_ratios=strides,
        n_codebooks=sum(key.startswith("dac.quantizer.") and key.endswith("codebook.weight") for key in state),
        codebook_size=size,
        codebook_dim=width,
        hidden_size=latent_dim,
        sampling_rate=SAMPLE_RATE,
    )


def transformers_name(key: str, blocks: int) -> str:
    """Convert the name of a tensor of DAC's own code, in which layers are numbered, to that of transformers."""
    part, *_, parameter = key.split(".")
    numbers = [int(field) for field in key.split(".") if field.isdigit()]
    if part == "quantizer":
        return key
    units = ("res_unit1", "res_unit2", "res_unit3")
    order = (*units, "snake1", "conv1") if part == "encoder" else ("snake1", "conv_t1", *units)
    ends = {0: "conv1", blocks + 1: "snake1", blocks + 2: "conv2"}
    layer = ends.get(numbers[0]) or f"block.{numbers[0] - 1}.{order[numbers[1]]}"
    if len(numbers) == 3:
        layer += "." + ("snake1", "conv1", "snake2", "conv2")[numbers[2]]
    return f"{part}.{layer}.{parameter}"


# ---------------------------------------------------------------- the codec


class DualQuantizer:
    """The semantic codebook and the acoustic ones, which quantize what the decoded semantic vector leaves."""

    def __init__(self, network: DualCodecNetwork, num_codebooks: int) -> None:
        self.semantic_dim, self.decode_semantic = network.semantic_dim, network.convnext_decoder
        modules = [network.semantic_vq.quantizers[0], *network.dac.quantizer.quantizers]  # type: ignore[union-attr, index]
        self.codebooks = [Codebook(module) for module in modules[:num_codebooks]]

    def quantize(self, latents: Tensor) -> Tensor:
        """Quantize latents [D, T] to codes [K, T]: the semantic encoder's output, then the acoustic encoder's."""
        semantic, acoustic = latents[: self.semantic_dim], latents[self.semantic_dim :]
        first, *others = self.codebooks
        index, vectors = first.nearest(semantic.t())
        codes = [index]
        if others:
            residual = acoustic.t() - self.decode_semantic(vectors.t()[None])[0].t()
        for codebook in others:
            index, residual = codebook.quantize(residual)
            codes.append(index)
        return torch.stack(codes)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Convert codes [K, T] to latents [D, T]."""
        return torch.stack([F.embedding(row, table) for row, table in zip(codes, self._tables)]).sum(0).t()

    def embeddings(self) -> list[Tensor]:
        """Return K tables [V, D]. The semantic one is zero in the acoustic channels, and the others elsewhere."""
        return [table.cpu() for table in self._tables]

    @cached_property
    def _tables(self) -> list[Tensor]:
        with full_precision():
            semantic, *acoustic = [codebook.table() for codebook in self.codebooks]
        padded = [F.pad(table, (self.semantic_dim, 0)) for table in acoustic]
        return [F.pad(semantic, (0, acoustic[0].shape[1] if acoustic else 0)), *padded]


class DualCodec(SegmentCodec):
    """DualCodec as a `Codec`."""

    network: DualCodecNetwork
    quantizer: DualQuantizer

    def __init__(self, network: DualCodecNetwork, card: CodecCard, device: str = "cpu") -> None:
        network.to(device).requires_grad_(False)
        super().__init__(network, DualQuantizer(network, card.num_codebooks), card, device)
        self.front, self.back = encoder_layers(network.dac.encoder)
        frames = 2400 if self.device.type != "cpu" else max(1, PIECE // card.hop_length)
        self.pace = Pace(piece=frames, chunk=frames)

    @cached_property
    def filter_bank(self) -> Any:
        """Compute the input features of w2v-BERT 2.0."""
        return transformers.SeamlessM4TFeatureExtractor(padding_value=1.0)

    def encode_latents(self, audio: Tensor) -> Tensor:
        hop = self.card.hop_length
        padded = F.pad(audio, (0, -len(audio) % hop + MARGIN))
        semantic: Tensor = self.network.convnext_encoder(self.semantic_features(padded)[None])[0]
        if self.card.num_codebooks == 1:
            return semantic
        acoustic = encode_rows(self, padded, {}, last=True).t()
        return torch.cat([semantic, acoustic[:, : semantic.shape[1]]])

    def semantic_features(self, audio: Tensor) -> Tensor:
        """Compute the normalized w2v-BERT features of a wave [n], averaged over each frame: [D, T]."""
        from torchaudio.functional import resample

        net = self.network
        bands = self.filter_bank(
            resample(audio, SAMPLE_RATE, SEMANTIC_RATE).float().cpu(),
            sampling_rate=SEMANTIC_RATE,
            return_tensors="pt",
        ).input_features
        hidden = net.semantic_model(bands.to(audio), output_hidden_states=True).hidden_states[LAYER]
        features = ((hidden - net.mean) / net.deviation).transpose(1, 2)
        return F.avg_pool1d(features, self.card.hop_length // SEMANTIC_HOP)[0]

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode latents. The network returns a few samples less than T * hop if a stride is odd: zeros are added."""
        semantic, acoustic = latents[: self.network.semantic_dim], latents[self.network.semantic_dim :]
        hidden = self.network.convnext_decoder(semantic[None])
        wave: Tensor = self.network.dac.decoder(hidden + acoustic if len(acoustic) else hidden)[0, 0]
        return F.pad(wave, (0, latents.shape[1] * self.card.hop_length - len(wave)))

    def entries(self) -> list[Tensor]:
        return [codebook.entries.cpu().clone() for codebook in self.quantizer.codebooks]


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> DualCodec:
    """Load `dualcodec_12hz` or `dualcodec_25hz` from a checkpoint or the hub's cache (`Codec` loader).

    The statistics of w2v-BERT's layer are in a file next to the checkpoint. w2v-BERT 2.0 itself is taken from the
    folder SEMANTIC_FOLDER next to it, else from its own repository.
    """
    path = find_weights(name, weights, REPOSITORY, FILES[name], name + "*.safetensors")
    statistics = path.with_name(STATISTICS) if weights else hub_file(name, REPOSITORY, STATISTICS)
    if not statistics.is_file():
        raise missing(name, str(statistics))
    measured, stored = read_tensors(statistics, name), read_tensors(path, name)
    beside = path.with_name(SEMANTIC_FOLDER)
    semantic = load_pretrained(
        name, transformers.Wav2Vec2BertModel, str(beside) if weights and beside.exists() else SEMANTIC
    )
    semantic.encoder.layers = semantic.encoder.layers[:LAYER]
    try:
        state = folded(stored)
        network = DualCodecNetwork(state, semantic, measured["mean"].float(), measured["var"].float())
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: not the weights of {name} ({type(error).__name__}: {error})") from error
    check(network, path, name)
    for part in ("convnext_encoder", "convnext_decoder", "semantic_vq"):
        fill_part(getattr(network, part), state, f"{part}.", path, name)
    blocks = len(network.dac.config.downsampling_ratios)
    named = {key.removeprefix("dac."): value for key, value in state.items() if key.startswith("dac.")}
    fill_part(network.dac, {transformers_name(k, blocks): v for k, v in named.items()}, "", path, name)
    available = 1 + len(network.dac.quantizer.quantizers)
    kept = keep_codebooks(name, num_codebooks, available, available)
    first = len(state["semantic_vq.quantizers.0.codebook.weight"])
    card = CodecCard(
        name=name,
        weights=weights or name,
        weights_sha256=state_sha256(semantic, *(stored[key] for key in sorted(stored)), network.mean, measured["var"]),
        sample_rate=SAMPLE_RATE,
        hop_length=network.hop_length,
        codebook_sizes=(first, *(network.dac.config.codebook_size,) * (kept - 1)),
        codes_per_frame=(1,) * kept,
        latent_dim=network.semantic_dim + (network.dac.config.hidden_size if kept > 1 else 0),
        policies=policies(chunk_policy(), device, padding="zeros to more than a whole frame", loudness="none"),
        versions=versions("torch", "torchaudio", "transformers", "soxr"),
    )
    return DualCodec(network, card, device)


def check(network: DualCodecNetwork, path: Path, name: str) -> None:
    """Raise UserError unless the parts of a network fit together and to the codec's name."""
    inputs, width = network.convnext_encoder[0].in_channels, network.semantic_model.config.hidden_size  # type: ignore[union-attr]
    if not len(network.mean) == len(network.deviation) == inputs == width:
        raise UserError(
            f"{path}: reads {inputs} channels of w2v-BERT, which has {width}, with statistics of {len(network.mean)}"
        )
    if network.hop_length != HOPS[name]:
        raise UserError(
            f"{path}: {network.hop_length} samples per frame, {name} has {HOPS[name]}; give its own weights"
        )
