"""MOSS-Audio-Tokenizer (OpenMOSS 2026): a codec of causal Transformers without convolutions, 1.6 billion parameters.

The encoder alternates between joining neighbouring steps and Transformers that see the last 10 s. A residual quantizer
takes the nearest entry by direction in narrow projections, as DAC's. The decoder mirrors the encoder.

A wave is cut into chunks of CHUNK_FRAMES, and each Transformer carries its keys and values: the result is exact, and
memory is bounded for any length. The last frame is zero-padded.

A frame's latent is the sum of the codes' vectors before the quantizer's last projection. config.json has all sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends.dac import Codebook, CodebookLayers
from codecssl.tokenize.backends.moss.transformer import CausalTransformer, Past, Patches, TransformerConfig
from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.weights import (
    fill_part,
    folded,
    hub_file,
    missing,
    read_tensors,
    state_sha256,
)
from codecssl.tokenize.codec import CodecCard, Encoded, encode_each, keep_codebooks
from codecssl.tokenize.common.errors import UserError

REPOSITORY, CONFIG = "OpenMOSS-Team/MOSS-Audio-Tokenizer", "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of all tensors, or the list of the files in which they are."""
SAMPLE_RATE = 24_000
CHUNK_FRAMES = 50
"""Frames per chunk, 4 s: it amortizes reading the weights."""
FIXED = {"causal": True, "norm": "layer_norm", "positional_embedding": "rope", "gating": "none"}
"""Settings of the published Transformers. Others are not implemented."""


class Quantizer(nn.Module):
    """Projections around residual codebooks."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        inputs, width, outputs = sizes["input_dim"], sizes["rvq_dim"], sizes["output_dim"]
        self.input_proj = nn.Identity() if inputs == width else nn.Conv1d(inputs, width, 1)
        self.output_proj = nn.Identity() if outputs == width else nn.Conv1d(width, outputs, 1)
        shape = width, sizes["codebook_size"], sizes["codebook_dim"]
        self.quantizers = nn.ModuleList(CodebookLayers(*shape) for _ in range(sizes["num_quantizers"]))


class MossNetwork(nn.Module):
    """All layers with the sizes of a config.json. Raises KeyError, TypeError or ValueError for another network."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        seconds, rate = config.get("causal_transformer_context_duration", 10.0), float(SAMPLE_RATE)
        self.hop_length = math.prod(section.get("patch_size", 1) for section in config["encoder_kwargs"])
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for part, sections in ((self.encoder, config["encoder_kwargs"]), (self.decoder, config["decoder_kwargs"])):
            for section in sections:
                if section["module_type"] == "PatchedPretransform":
                    joins, size = part is self.encoder, section["patch_size"]
                    part.append(Patches(size, joins))
                    rate = rate / size if joins else rate * size
                else:
                    part.append(CausalTransformer(transformer_config(section), int(rate * seconds)))
        sizes = config["quantizer_kwargs"]
        if (kind := sizes.get("quantizer_type", config.get("quantizer_type"))) != "rlfq":
            raise ValueError(f"quantizer_type {kind}, not rlfq")
        self.quantizer = Quantizer(sizes)


def transformer_config(section: dict[str, Any]) -> TransformerConfig:
    """Return the sizes of a Transformer's section. Raises ValueError if it has a setting that is not implemented."""
    for key, value in FIXED.items():
        if section.get(key, value) != value:
            raise ValueError(f"{key} {section[key]}, not {value}")
    names = {field.name for field in fields(TransformerConfig)}
    return TransformerConfig(**{key: value for key, value in section.items() if key in names})


# ---------------------------------------------------------------- the codec


class MossCodec:
    """MOSS-Audio-Tokenizer as a `Codec`."""

    def __init__(self, network: MossNetwork, card: CodecCard, device: str = "cpu") -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.card, self.device = card, torch.device(device)
        modules = list(network.quantizer.quantizers)[: card.num_codebooks]
        self.codebooks = [Codebook(module) for module in modules]

    def stream(self) -> MossStream:
        return MossStream(self)

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        return encode_each(self, waves)

    @full_precision()
    def advance(self, audio: Tensor, past: Past) -> Tensor:
        """Encode the next whole frames [n] of a wave to codes [K, T]."""
        x = audio[:, None]
        for module in self.network.encoder:
            x = module(x, past)
        residual, codes = self.network.quantizer.input_proj(x.t()[None])[0].t(), []
        for codebook in self.codebooks:
            index, residual = codebook.quantize(residual)
            codes.append(index)
        return torch.stack(codes)

    @full_precision()
    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Decode a chunk at a time."""
        waves, past = [torch.zeros(0, device=self.device)], Past()
        for part in codes.to(self.device).split(CHUNK_FRAMES, dim=1):
            if part.shape[1]:
                x = self.network.quantizer.output_proj(self.latents(part)[None])[0].t()
                for module in self.network.decoder:
                    x = module(x, past)
                waves.append(x[:, 0])
        return torch.cat(waves)

    @full_precision()
    def embeddings(self) -> list[Tensor]:
        return [codebook.table().cpu() for codebook in self.codebooks]

    def entries(self) -> list[Tensor]:
        return [codebook.entries.cpu().clone() for codebook in self.codebooks]

    @full_precision()
    def latents(self, codes: Tensor) -> Tensor:
        rows = zip(codes.to(self.device), self.codebooks)
        return torch.stack([F.embedding(row, codebook.table()) for row, codebook in rows]).sum(0).t()


class MossStream(ChunkedStream):
    """Streaming encoder of one wave, a chunk at a time. The last chunk, whole or not, is left for `finish`."""

    codec: MossCodec

    def __init__(self, codec: MossCodec) -> None:
        chunk = CHUNK_FRAMES * codec.card.hop_length
        super().__init__(codec, chunk=chunk, needed=chunk + 1)
        self.past = Past()

    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        return self.codec.advance(F.pad(audio, (0, -len(audio) % self.codec.card.hop_length)), self.past)


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> MossCodec:
    """Load `moss_audio` from a folder in the hub's format or the hub's cache (`Codec` loader)."""
    config_path, paths = files(name, weights)
    try:
        config = dict(json.loads(config_path.read_text()))
        with torch.device("meta"):  # 1.6 billion random numbers would take long
            network = MossNetwork(config)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{config_path}: not the configuration of {name} ({type(error).__name__}: {error})") from error
    found = config.get("sampling_rate", config.get("sample_rate"))
    if found != SAMPLE_RATE:
        raise UserError(f"{config_path}: {found} Hz, {name} has {SAMPLE_RATE} Hz; give its own weights")
    stored = {renamed(key): value.float() for path in paths for key, value in read_tensors(path, name).items()}
    try:
        state = folded(stored)
    except KeyError as error:
        raise UserError(f"{paths[0]}: not the weights of {name} (lacks {error.args[0]})") from error
    fill_part(network, state, "", paths[0], name, assign=True)
    sizes = config["quantizer_kwargs"]
    projections = [value for key, value in sorted(stored.items()) if key.startswith("quantizer.")]
    kept = keep_codebooks(name, num_codebooks, sizes["num_quantizers"], sizes["num_quantizers"])
    card = CodecCard(
        name=name,
        weights=weights or name,
        weights_sha256=state_sha256(nn.ModuleList([network.encoder, network.decoder]), *projections),
        sample_rate=SAMPLE_RATE,
        hop_length=network.hop_length,
        codebook_sizes=(sizes["codebook_size"],) * kept,
        codes_per_frame=(1,) * kept,
        latent_dim=sizes["rvq_dim"],
        policies=policies(f"{CHUNK_FRAMES} frames, carried keys and values", device, loudness="none"),
        versions=versions("torch", "soxr"),
    )
    return MossCodec(network, card, device)


def files(name: str, weights: str | None) -> tuple[Path, list[Path]]:
    """Find config.json and the files with the tensors, of which the hub may have several."""
    if weights is None:
        config = hub_file(name, REPOSITORY, CONFIG)
        try:
            index = hub_file(name, REPOSITORY, INDEX)
        except UserError:
            return config, [hub_file(name, REPOSITORY, WEIGHTS)]
        return config, [hub_file(name, REPOSITORY, file) for file in listed(index)]
    folder = Path(weights)
    names = listed(folder / INDEX) if (folder / INDEX).is_file() else [WEIGHTS]
    for file in (CONFIG, *names):
        if not (folder / file).is_file():
            raise missing(name, weights, f" (no {file} in it)")
    return folder / CONFIG, [folder / file for file in names]


def listed(index: Path) -> list[str]:
    """Return the files that an index lists, each a name without a folder."""
    try:
        return sorted({Path(str(file)).name for file in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of files with tensors ({error})") from error


def renamed(key: str) -> str:
    """Return the name of a tensor in this module. Older checkpoints name the projections of attention otherwise."""
    for projection in ("in_proj", "out_proj"):
        key = key.replace(f"self_attn.{projection}.weight", f"self_attn.{projection}s.0.weight")
    return key.replace("self_attn.in_proj_weight", "self_attn.in_projs.0.weight")
