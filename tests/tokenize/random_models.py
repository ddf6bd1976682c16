"""Narrow models of transformers and snac with random weights, in which every layer changes the codes."""

import json
from functools import partial

import helpers
import numpy as np
import torch
import transformers
from torch import nn

from codecssl.tokenize.backends import dac

speech = partial(helpers.wave, levels=(0.1, 0.9), noise=0.5)


def entries_of(latents, count, size, seed=0):
    """Draw codebooks [count, size, D] from their inputs: latents [D, T] and the residuals.

    All entries differ clearly: no code depends on rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    residual, tables = latents.t(), []
    for _ in range(count):
        picked = residual[torch.randint(len(residual), (size,), generator=generator)]
        table = 0.8 * picked + 0.2 * picked.std() * torch.randn(picked.shape, generator=generator).to(picked)
        residual = residual - table[torch.cdist(residual, table).argmin(1)]
        tables.append(table)
    return torch.stack(tables)


# ---------------------------------------------------------------- DAC

DAC_RATIOS = {"dac_16khz": [2, 4, 5, 8], "dac_24khz": [2, 4, 5, 8], "dac_44khz": [2, 4, 8, 8]}


def dac_model(name="dac_16khz", num_codebooks=6, seed=0, width=4):
    """A DacModel. Biases and alphas are random too, so that a border padded wrongly shows."""
    torch.manual_seed(seed)
    config = transformers.DacConfig(
        encoder_hidden_size=width,
        decoder_hidden_size=8 * width,
        downsampling_ratios=DAC_RATIOS[name],
        n_codebooks=num_codebooks,
        codebook_size=128,
        sampling_rate=dac.NETWORKS[name][0],
    )
    model = transformers.DacModel(config).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            fan_in = module.weight.numel() / module.out_channels
            module.weight.normal_(std=0.6 * fan_in**-0.5)
            module.bias.normal_(std=0.1)
        elif hasattr(module, "alpha"):
            module.alpha.uniform_(0.2, 3)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_()
    model.encoder.conv1.weight.mul_(5)
    _spread(model)
    return model


def _spread(model):
    """Center and scale each level's projection on some audio. Otherwise all frames have the same code."""
    residual = model.encoder(helpers.wave(16_384, 99, rate=16_000)[None, None])
    for level in model.quantizer.quantizers:
        level.in_proj.weight.div_(level.in_proj(residual).std())
        level.in_proj.bias.sub_(level.in_proj(residual).mean((0, 2)))
        residual = residual - level(residual)[0]


# ---------------------------------------------------------------- X-codec


def xcodec_model(seed=0, **changes):
    """hf-audio/xcodec-hubert-librispeech in float64; codebooks of 32 entries drawn from their inputs."""
    torch.manual_seed(seed)
    ratios = [8, 5, 4, 2]
    acoustic = transformers.DacConfig(
        encoder_hidden_size=4,
        downsampling_ratios=ratios,
        upsampling_ratios=ratios,
        decoder_hidden_size=32,
        hidden_size=16,
    )
    semantic = transformers.HubertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    config = transformers.XcodecConfig(
        codebook_size=32,
        target_bandwidths=[0.25, 0.5, 1.0, 2.0],
        acoustic_model_config=acoustic,
        semantic_model_config=semantic,
        **changes,
    )
    model = transformers.XcodecModel(config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.startswith("acoustic_encoder") and name.endswith("weight"):
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    residual = xcodec_latents(model, speech(32_000, rate=16_000).double()[None, None])
    for quantizer in model.quantizer.quantizers:
        entries = residual[0, :, torch.randperm(residual.shape[2])[:32]].t()
        quantizer.codebook.embed.copy_(entries + 1e-3 * torch.randn_like(entries))
        residual = residual - quantizer.decode(quantizer.encode(residual))
    return model


def xcodec_latents(model, audio):
    """Input [1, D, T] of the quantizer in transformers' own encode."""
    caught = []
    own, model.quantizer.encode = model.quantizer.encode, lambda z, _: caught.append(z) or torch.zeros(8, 1, z.shape[2])
    try:
        model.encode(audio)
    finally:
        model.quantizer.encode = own
    return caught[0]


# ---------------------------------------------------------------- SNAC

SNAC_CONFIG = {
    "sampling_rate": 24_000,
    "encoder_dim": 4,
    "encoder_rates": [2, 4, 8, 8],
    "decoder_dim": 32,
    "decoder_rates": [8, 8, 4, 2],
    "attn_window_size": None,
    "codebook_size": 64,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": True,
}
"""hubertsiuzdak/snac_24khz, but for its widths (48 and 1024) and 4096 entries."""


def snac_model(seed=0, **changes):
    from snac import SNAC

    torch.manual_seed(seed)
    net = SNAC(**(SNAC_CONFIG | changes)).eval().requires_grad_(False)
    for module in net.encoder.modules():
        if hasattr(module, "alpha"):
            module.alpha.uniform_(0.5, 2)
    for name, parameter in net.encoder.named_parameters():
        if name.endswith("original0"):  # the norms of the weights: signal and noise must come through a random net
            parameter.mul_(2)
    return net


def save_snac(net, folder, **changes):
    """Write the model in the hub's format; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SNAC_CONFIG | changes))
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    return folder


# ---------------------------------------------------------------- EnCodec


def encodec_24khz_model(**config):
    torch.manual_seed(0)
    model = transformers.EncodecModel(transformers.EncodecConfig(**{"num_filters": 8, **config})).eval()
    with torch.no_grad():
        channels = model.config.audio_channels
        latents = model.encoder(speech(48_000, rate=24_000).expand(1, channels, -1))[0]
        tables = entries_of(latents, len(model.quantizer.layers), model.config.codebook_size)
    for layer, table in zip(model.quantizer.layers, tables, strict=True):
        layer.codebook.embed.copy_(table)
    return model


def stereo_wave(samples, seed=0):
    """Float32 [2, samples] at 48 kHz."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 48_000
    level = np.interp(t, np.linspace(0, max(samples, 1) / 48_000, 9), rng.uniform(0.01, 0.5, 9))
    tone = np.sin(2 * np.pi * np.cumsum(150 + 60 * np.sin(t)) / 48_000)
    sides = [level * (side * tone + 0.3 * rng.standard_normal(samples)) for side in (0.4, 0.8)]
    return torch.from_numpy(np.stack(sides).astype(np.float32))


def randomise_48khz(model, encoder, embeds):
    """Make group norms non-trivial, and spread the codebooks' entries as widely as their inputs."""
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.3, 0.3)
    residual = encoder(stereo_wave(48_000)[None] * 5)[0].t()
    for embed in embeds:
        rows = residual[torch.randint(0, len(residual), (len(embed),))]
        embed.copy_(0.8 * rows + 0.2 * residual.std() * torch.randn(rows.shape))  # no two entries alike
        residual = residual - embed[torch.cdist(residual, embed).argmin(1)]


def encodec_48khz_model(**changes):
    """facebook/encodec_48khz's configuration, narrow."""
    torch.manual_seed(0)
    config = transformers.EncodecConfig(
        **{"target_bandwidths": [3.0, 6.0, 12.0, 24.0], "sampling_rate": 48_000, "audio_channels": 2}
        | {"normalize": True, "chunk_length_s": 1.0, "overlap": 0.01, "norm_type": "time_group_norm"}
        | {"use_causal_conv": False, "num_filters": 4, "hidden_size": 12, "codebook_dim": 12, "codebook_size": 1024}
        | changes
    )
    model = transformers.EncodecModel(config).eval().requires_grad_(False)
    randomise_48khz(model, model.encoder, [layer.codebook.embed for layer in model.quantizer.layers])
    return model
