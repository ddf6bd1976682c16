"""Random weights of each codec, narrow, in the files that the hub has: write(folder) returns the path to give."""

import json

import helpers
import torch

from codecssl.tokenize.backends import hificodec, speechtokenizer, wavtokenizer
from codecssl.tokenize.backends.parts.noncausal_seanet import build_encoder
from codecssl.tokenize.backends.parts.vocos import Backbone, FourierHead


def entries_of(latents, count, size, seed=0):
    """Codebooks [count, size, D] drawn from what they have to code: latents [D, T] and what is left of them."""
    generator = torch.Generator().manual_seed(seed)
    residual, tables = latents.t(), []
    for _ in range(count):
        picked = residual[torch.randint(len(residual), (size,), generator=generator)]
        table = picked + 1e-3 * picked.std() * torch.randn(picked.shape, generator=generator).to(picked)
        residual = residual - table[torch.cdist(residual, table).argmin(1)]
        tables.append(table)
    return torch.stack(tables)


def livened(module, seed=0):
    """The module with weights that carry its input through all layers, which those of a new one may not."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        with torch.no_grad():
            if name.endswith(("weight_v", "weight")) and parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
            elif name.endswith("weight_g"):
                parameter.fill_(1.0)
    return module


SPEECHTOKENIZER = {
    "sample_rate": 16_000, "n_filters": 2, "strides": [8, 5, 4, 2], "dimension": 16, "semantic_dimension": 12,
    "bidirectional": True, "dilation_base": 2, "residual_kernel_size": 3, "n_residual_layers": 1, "lstm_layers": 2,
    "activation": "ELU", "codebook_size": 64, "n_q": 8,
}  # fmt: skip


def speechtokenizer_state(seed=0):
    """As the authors' package stores it."""
    torch.manual_seed(seed)
    network = livened(speechtokenizer.Network(speechtokenizer.DEFAULTS | SPEECHTOKENIZER), seed)
    with torch.no_grad():
        latents = network.encoder(helpers.wave(32_000, rate=16_000)[None, None])[0]
    state = network.state_dict() | {"transform.weight": torch.randn(12, 16), "transform.bias": torch.randn(12)}
    return state | quantizer_state("quantizer.vq", entries_of(latents, 8, 64))


def quantizer_state(prefix, tables):
    """The encodec package's residual quantizer."""
    state = {}
    for k, table in enumerate(tables):
        stem = f"{prefix}.layers.{k}._codebook."
        state |= {stem + "embed": table, stem + "embed_avg": table.clone(), stem + "inited": torch.ones(1)}
        state[stem + "cluster_size"] = torch.ones(len(table))
    return state


def write_speechtokenizer(folder, seed=0):
    (folder / "config.json").write_text(json.dumps(SPEECHTOKENIZER))
    torch.save(speechtokenizer_state(seed), folder / "SpeechTokenizer.pt")
    return folder


def wavtokenizer_state(ratios=(8, 5, 4, 2), seed=0):
    """As the authors' Lightning module stores it, without its discriminators."""
    torch.manual_seed(seed)
    encoder = livened(
        build_encoder(lstm_layers=2, bidirectional=False, dimension=16, n_filters=2, ratios=list(ratios)), seed
    )
    with torch.no_grad():
        latents = encoder(helpers.wave(48_000, rate=24_000)[None, None])[0]
    hop = int(torch.tensor(ratios).prod())
    parts = {
        wavtokenizer.ENCODER: encoder.state_dict(),
        "backbone.": Backbone(16, 64, 48, 2, 4).state_dict(),
        "head.": FourierHead(64, 4 * hop, hop).state_dict() | {"istft.window": torch.hann_window(4 * hop)},
    }
    state = {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}
    return state | quantizer_state("feature_extractor.encodec.quantizer.vq", entries_of(latents, 1, 256))


def write_wavtokenizer(folder, ratios=(8, 5, 4, 2), seed=0):
    path = folder / "wavtokenizer_large_speech_320_v2.ckpt"
    more = {"multiperioddisc.x": torch.ones(1)}
    torch.save({"epoch": 1, "state_dict": wavtokenizer_state(ratios, seed) | more, "hyper_parameters": {}}, path)
    return path


def hificodec_state(channels=8, block_kernels=(3, 5), size=64, rate=16_000, seed=0):
    """As the authors' code stores it. The authors' own network has 32 channels."""
    torch.manual_seed(seed)
    latent_dim, kernels = 16 * channels, [4, 8, 11, 16]
    encoder = livened(hificodec.Encoder(channels, kernels, list(block_kernels)[::-1], latent_dim), seed)
    generator = livened(hificodec.Generator(latent_dim, 32, kernels[::-1], list(block_kernels)), seed)
    with torch.no_grad():
        latents = encoder(helpers.wave(2 * rate, rate=rate)[None, None])[0]
    groups = [entries_of(part, 2, size, seed) for part in latents.chunk(2)]
    quantizer = {
        f"{module}.{group}.embedding.weight": tables[layer].clone()
        for group, tables in enumerate(groups)
        for layer, module in enumerate(("quantizer_modules", "quantizer_modules2"))
    }
    return {"encoder": encoder.state_dict(), "generator": generator.state_dict(), "quantizer": quantizer}


def write_hificodec(folder, seed=0):
    torch.save(hificodec_state(seed=seed), path := folder / "HiFi-Codec-16k-320d")
    return path


WRITERS = {
    "hificodec_16khz": write_hificodec,
    "speechtokenizer": write_speechtokenizer,
    "wavtokenizer": write_wavtokenizer,
}
