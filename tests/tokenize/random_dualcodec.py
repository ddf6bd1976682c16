"""DualCodec's checkpoints with random weights, narrow: layers in the order of the authors' code, under its names."""

import shutil
import warnings
from pathlib import Path

import helpers
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from codecssl.tokenize.backends import dualcodec
from codecssl.tokenize.backends.parts.weights import folded
from codecssl.tokenize.registry import load_codec

WIDTH, CHANNELS, HIDDEN = 16, 12, 24
"""Channels of w2v-BERT, of the ConvNeXt blocks, and inside these."""
RATES = {"dualcodec_12hz": [4, 5, 6, 8, 2], "dualcodec_25hz": [4, 5, 6, 8]}


class Snake(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(1, channels, 1) + 0.5)


class Blocks(nn.Module):
    """Layers under one name."""

    def __init__(self, name, *layers):
        super().__init__()
        self.add_module(name, nn.Sequential(*layers))


def conv(kind, *sizes):
    """A convolution with weight norm. Biases are random, so that a border padded wrongly shows."""
    layer = kind(*sizes)
    nn.init.normal_(layer.bias, std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def unit(channels):
    wide, narrow = conv(nn.Conv1d, channels, channels, 7), conv(nn.Conv1d, channels, channels, 1)
    return Blocks("block", Snake(channels), wide, Snake(channels), narrow)


def encoder(width, rates, latent_dim):
    layers = [conv(nn.Conv1d, 1, width, 7)]
    for rate in rates:
        down = conv(nn.Conv1d, width, 2 * width, 2 * rate)
        layers.append(Blocks("block", unit(width), unit(width), unit(width), Snake(width), down))
        width *= 2
    return Blocks("block", *layers, Snake(width), conv(nn.Conv1d, width, latent_dim, 3))


def decoder(width, rates, latent_dim):
    layers = [conv(nn.Conv1d, latent_dim, width, 7)]
    for rate in rates:
        up, half = conv(nn.ConvTranspose1d, width, width // 2, 2 * rate), width // 2
        layers.append(Blocks("block", Snake(width), up, unit(half), unit(half), unit(half)))
        width = half
    return Blocks("model", *layers, Snake(width), conv(nn.Conv1d, width, 1, 7))


def quantizer(channels, count, size):
    found = nn.Module()
    found.quantizers = nn.ModuleList(nn.Module() for _ in range(count))
    for level in found.quantizers:
        level.in_proj, level.out_proj = conv(nn.Conv1d, channels, 8, 1), conv(nn.Conv1d, 8, channels, 1)
        level.codebook = nn.Embedding(size, 8)
    return found


def dualcodec_state(name="dualcodec_12hz", count=3, sizes=(100, 64), seed=0):
    """State dict in the layout of the authors' package. Published: count 7 or 11, sizes (16384, 4096 or 1024)."""
    torch.manual_seed(seed)
    rates = RATES[name]
    latent_dim = 2 * 2 ** len(rates)
    blocks = [[dualcodec.ConvNeXtBlock(CHANNELS, HIDDEN, 7) for _ in range(2)] for _ in range(2)]
    parts = {
        "dac.encoder": encoder(2, rates, latent_dim),
        "dac.decoder": decoder(2 ** (len(rates) + 1), rates[::-1], latent_dim),
        "dac.quantizer": quantizer(latent_dim, count, sizes[1]),
        "convnext_encoder": nn.Sequential(conv(nn.Conv1d, WIDTH, CHANNELS, 1), *blocks[0]),
        "semantic_vq": quantizer(CHANNELS, 1, sizes[0]),
        "convnext_decoder": nn.Sequential(*blocks[1], conv(nn.Conv1d, CHANNELS, latent_dim, 1)),
    }
    return {
        f"{part}.{key}": value.detach() for part, module in parts.items() for key, value in module.state_dict().items()
    }


def w2v_bert(seed=0):
    """A narrow w2v-BERT 2.0 with a layer that the codec does not use."""
    torch.manual_seed(seed)
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=WIDTH, output_hidden_size=WIDTH, num_hidden_layers=dualcodec.LAYER + 1, num_attention_heads=2,
        intermediate_size=32, conv_depthwise_kernel_size=5,
    )  # fmt: skip
    return transformers.Wav2Vec2BertModel(config).eval()


def write(folder, seed=0, name="dualcodec_12hz", **sizes):
    """Write the files as the README of the authors' package describes. The projections are centered on some audio."""
    state = dualcodec_state(name, seed=seed, **sizes)
    w2v_bert(seed).save_pretrained(folder / dualcodec.SEMANTIC_FOLDER)
    statistics = {"mean": torch.randn(WIDTH) / 4, "var": torch.rand(WIDTH) + 0.5}
    torch.save(statistics, folder / dualcodec.STATISTICS)
    path = folder / dualcodec.FILES[name]
    save_file(state, path)
    codec = load_codec(f"{name}@{folder}")
    with torch.no_grad():
        latents = codec.encode_latents(helpers.wave(96_000, rate=24_000, levels=(0.1, 0.9)))
        semantic, acoustic = latents[:CHANNELS], latents[CHANNELS:]
        center(state, "semantic_vq.quantizers.0", semantic)
        for level in range(len(codec.quantizer.codebooks) - 1):
            center(state, f"dac.quantizer.quantizers.{level}", acoustic)
    save_file(state, path)
    return folder


def copied(folder, target):
    """A copy of the weights whose files may be replaced."""
    return Path(shutil.copytree(folder, target))


def center(state, stem, latents):
    """Subtract the mean from a level's narrow projection: otherwise all frames have the same code."""
    weight = folded(state)[f"{stem}.in_proj.weight"][..., 0]
    state[f"{stem}.in_proj.bias"] = -(weight @ latents).mean(1)
