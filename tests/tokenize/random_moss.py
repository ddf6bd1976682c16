"""MOSS-Audio-Tokenizer's files with random weights, narrow, in which every layer changes the codes."""

import json

import helpers
import torch
from random_models import entries_of
from safetensors.torch import save_file
from torch.nn import functional as F

from codecssl.tokenize.backends.moss import codec as moss
from codecssl.tokenize.backends.moss.transformer import Past


def patches(size):
    return {"module_type": "PatchedPretransform", "patch_size": size}


def transformer(inputs, outputs, width=16, layers=1):
    return {
        "module_type": "Transformer", "input_dimension": inputs, "output_dimension": outputs, "d_model": width,
        "num_heads": 2, "num_layers": layers, "dim_feedforward": 24, "causal": True, "norm": "layer_norm",
        "positional_embedding": "rope", "max_period": 10_000, "gating": "none", "layer_scale": 0.01,
        "conv_layout": True,
    }  # fmt: skip


def config(seconds=2.0, count=4):
    """Published: 10 s, 32 codebooks, 4 Transformers on either side."""
    return {
        "model_type": "speech_tokenizer",
        "sample_rate": 24_000,
        "sampling_rate": 24_000,
        "downsample_rate": 1920,
        "causal_transformer_context_duration": seconds,
        "encoder_kwargs": [patches(240), transformer(240, 8), patches(2), transformer(16, 8), patches(4),
                           transformer(32, 20, layers=2)],
        "decoder_kwargs": [transformer(20, 32, layers=2), patches(4), transformer(8, 16), patches(2),
                           transformer(8, 240), patches(240)],
        "quantizer_type": "rlfq",
        "quantizer_kwargs": {"input_dim": 20, "rvq_dim": 12, "output_dim": 20, "num_quantizers": count,
                             "codebook_size": 64, "codebook_dim": 6, "quantizer_type": "rlfq"},
    }  # fmt: skip


def state_of(values, seed=0):
    """State dict under the names of the authors' code, with weight norm in torch's new format."""
    torch.manual_seed(seed)
    network = moss.MossNetwork(values).eval().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name.endswith("scale"):
            parameter.uniform_(0.5, 1)
        elif parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn(parameter.shape))
    x, past = helpers.wave(96_000, rate=24_000, levels=(0.1, 0.9))[:, None], Past()
    x = torch.cat([x, x.new_zeros(-len(x) % network.hop_length, 1)])
    for module in network.encoder:
        x = module(x, past)
    residual = network.quantizer.input_proj(x.t()[None])
    for level in network.quantizer.quantizers:
        narrow = level.in_proj(residual)
        level.in_proj.bias.sub_(narrow.mean((0, 2)))
        narrow = narrow - narrow.mean(2, keepdim=True)
        level.codebook.weight.copy_(entries_of(narrow[0], 1, len(level.codebook.weight), seed)[0])
        near = F.normalize(narrow[0].t()) @ F.normalize(level.codebook.weight).t()
        residual = residual - level.out_proj(level.codebook.weight[near.argmax(1)].t()[None])
    state = {}
    for key, value in network.state_dict().items():
        stem = key.removesuffix("weight") + "parametrizations.weight.original"
        if "_proj.weight" in key and key.startswith("quantizer."):
            state |= {f"{stem}0": value.norm(dim=(1, 2), keepdim=True), f"{stem}1": value * 2}
        else:
            state[key] = value
    return state


def write(folder, seed=0, **sizes):
    """Write config.json, and the tensors in two files with an index, as on the hub."""
    values = config(**sizes)
    (folder / "config.json").write_text(json.dumps(values))
    state = state_of(values, seed)
    half = len(state) // 2
    files = {
        "model-00001-of-00002.safetensors": list(state)[:half],
        "model-00002-of-00002.safetensors": list(state)[half:],
    }
    for file, keys in files.items():
        save_file({key: state[key].contiguous() for key in keys}, folder / file)
    listed = {key: file for file, keys in files.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder
