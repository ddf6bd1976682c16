"""Random weights of each codec, narrow, in the files that the hub has: write(folder) returns the path to give."""

import json
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import random_dualcodec
import random_models
import random_moss
import torch
import transformers
from random_models import entries_of
from safetensors.torch import save_file

from codecssl.tokenize.backends import hificodec, speechtokenizer, tiny_16khz, wavtokenizer
from codecssl.tokenize.backends.fsq import focalcodec, s3tokenizer, xcodec2
from codecssl.tokenize.backends.parts import bigcodec_encoder
from codecssl.tokenize.backends.parts.noncausal_seanet import build_encoder
from codecssl.tokenize.backends.parts.vocos import FourierHead, VocosBackbone
from codecssl.tokenize.backends.semanticodec import audiomae, grid


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
    """State dict in the layout of the authors' package."""
    torch.manual_seed(seed)
    network = livened(speechtokenizer.SpeechTokenizerNetwork(speechtokenizer.DEFAULTS | SPEECHTOKENIZER), seed)
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
    """State dict in the layout of the authors' Lightning module, without discriminators."""
    torch.manual_seed(seed)
    encoder = livened(
        build_encoder(lstm_layers=2, bidirectional=False, dimension=16, n_filters=2, ratios=list(ratios)), seed
    )
    with torch.no_grad():
        latents = encoder(helpers.wave(48_000, rate=24_000)[None, None])[0]
    hop = int(torch.tensor(ratios).prod())
    parts = {
        wavtokenizer.ENCODER: encoder.state_dict(),
        "backbone.": VocosBackbone(16, 64, 48, 2, 4).state_dict(),
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
    """State dict in the layout of the authors' code. The authors' network has 32 channels."""
    torch.manual_seed(seed)
    latent_dim, kernels = 16 * channels, [4, 8, 11, 16]
    encoder = livened(hificodec.HiFiCodecEncoder(channels, kernels, list(block_kernels)[::-1], latent_dim), seed)
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


def write_hificodec_24khz(folder, seed=0):
    torch.save(hificodec_state(rate=24_000, seed=seed), path := folder / "HiFi-Codec-24k-320d")
    return path


def mimi_model(seed=0, **changes):
    """A narrow transformers.MimiModel in which every layer has an effect, with codebooks drawn from their inputs."""
    torch.manual_seed(seed)
    config = transformers.MimiConfig(
        **{"num_filters": 4, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 30, "upsample_groups": 32}
        | {"codebook_size": 64, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "num_quantizers": 6}
        | changes
    )
    model = transformers.MimiModel(config).eval().requires_grad_(False)
    for layer in model.encoder_transformer.layers:
        layer.self_attn_layer_scale.scale.uniform_(0.5, 1)
        layer.mlp_layer_scale.scale.uniform_(0.5, 1)
    audio = helpers.wave(48_000, rate=24_000)[None, None]
    hidden = model.encoder_transformer(model.encoder(audio).transpose(1, 2))[0].transpose(1, 2)
    latents = model.downsample(hidden)
    split = model.quantizer
    for part in (split.semantic_residual_vector_quantizer, split.acoustic_residual_vector_quantizer):
        tables = entries_of(part.input_proj(latents)[0], len(part.layers), config.codebook_size, seed)
        for layer, table in zip(part.layers, tables):
            layer.codebook.embed_sum.copy_(table)
            layer.codebook.cluster_usage.fill_(1)
            layer.codebook._embed = None
    return model


def write_qwen3_tts(folder, seed=0):
    """Write the hub's layout: a Mimi without decoder under `encoder.`, another decoder, 4 of 6 codebooks valid."""
    model = mimi_model(seed)
    decoder = ("decoder", "decoder_transformer", "upsample")
    state = {k: v for k, v in model.state_dict().items() if k.partition(".")[0] not in decoder}
    state = {f"encoder.{key}": value.clone() for key, value in state.items()} | {"decoder.pre_conv.bias": torch.ones(1)}
    save_file(state, folder / "model.safetensors")
    config = {"model_type": "qwen3_tts_tokenizer_12hz", "encoder_config": model.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config | {"encoder_valid_num_quantizers": 4}))
    return folder


def xcodec2_state(seed=0):
    """State dict in the layout of the authors' packages: narrow, 2 layers in the decoder, 17 in w2v-BERT."""
    torch.manual_seed(seed)
    semantic = transformers.Wav2Vec2BertModel(
        transformers.Wav2Vec2BertConfig(
            hidden_size=16, output_hidden_size=16, num_hidden_layers=17, num_attention_heads=2, intermediate_size=32,
            conv_depthwise_kernel_size=5,
        )
    )  # fmt: skip
    shapes = {"semantic_model": semantic, "SemanticEncoder_module": xcodec2.SemanticEncoder(16)}
    shapes |= {"CodecEnc": livened(bigcodec_encoder.BigCodecEncoder(2, xcodec2.STRIDES, 64), seed)}
    shapes |= {"fc_prior": torch.nn.Linear(80, 80), "fc_post_a": torch.nn.Linear(80, 64)}
    shapes |= {"generator.quantizer.project_in": torch.nn.Linear(80, 8)}
    shapes |= {"generator.quantizer.project_out": torch.nn.Linear(8, 80)}
    shapes |= {"generator.backbone": xcodec2.XCodec2Backbone(64, 2), "generator.head": FourierHead(64, 1280, 320)}
    state = {f"{part}.{key}": value for part, module in shapes.items() for key, value in module.state_dict().items()}
    state["generator.quantizer.project_in.weight"] *= 8  # so that all levels are used
    return state | {"generator.head.istft.window": torch.hann_window(1280)}


def write_xcodec2(folder, seed=0):
    save_file({k: v.contiguous() for k, v in xcodec2_state(seed).items()}, folder / "model.safetensors")
    return folder


def write_neucodec(folder, seed=0):
    state = {key.replace(".act.bias", ".act.beta"): value for key, value in xcodec2_state(seed).items()}
    head = FourierHead(64, 1920, 480).state_dict()
    state |= {f"generator.head.{key}": value for key, value in head.items()} | {"fc_post_s.bias": torch.ones(1)}
    state["generator.head.istft.window"] = torch.hann_window(1920)
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def write_s3tokenizer(folder, seed=0):
    """Write the package's state_dict with torch.save: 2 layers of 2 heads."""
    torch.manual_seed(seed)
    encoder, down = livened(s3tokenizer.S3Encoder(128, 128, 2, 31), seed), torch.nn.Linear(128, 8)
    with torch.no_grad():
        down.weight *= 2
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    state |= {f"quantizer._codebook.project_down.{key}": value for key, value in down.state_dict().items()}
    torch.save(state, path := folder / "speech_tokenizer_v2_25hz.pt")
    return path


FOCALCODEC = {
    "encoder_name": "WavLM",
    "encoder_config": {
        "hidden_dims": [8] * 7, "num_layers": 2, "dim": 32, "ffn_dim": 48, "num_heads": 2, "conv_pos": 16,
        "conv_pos_groups": 2, "num_buckets": 32, "max_distance": 80, "max_cached_steps": 0,
    },
    "compressor_name": "FocalEncoder",
    "compressor_config": {
        "input_dim": 32, "output_dim": 13, "hidden_dims": [32, 24, 16], "downscale_factors": [1, 1, 1],
        "focal_window": 7, "focal_level": 2, "focal_factor": 2, "use_layerscale": True,
    },
    "quantizer_name": "BinarySphericalQuantizer",
    "quantizer_config": {"codebook_size": 8192},
    "decompressor_name": "FocalDecoder",
    "decompressor_config": {
        "input_dim": 13, "output_dim": 32, "hidden_dims": [16, 24, 32], "upscale_factors": [1, 1, 1],
        "focal_window": 7, "focal_level": 2, "focal_factor": 2, "use_layerscale": True,
    },
    "decoder_name": "Vocos",
    "decoder_config": {"input_dim": 32, "num_layers": 2, "dim": 24, "ffn_dim": 32, "n_fft": 1024, "hop_length": 320},
}  # fmt: skip


def focalcodec_config(factors=(1, 1, 1), **changes):
    """changes: of compressor and decompressor."""
    compressor = FOCALCODEC["compressor_config"] | changes | {"downscale_factors": list(factors)}
    decompressor = FOCALCODEC["decompressor_config"] | changes | {"upscale_factors": list(factors)[::-1]}
    return FOCALCODEC | {"compressor_config": compressor, "decompressor_config": decompressor}


def write_focalcodec(folder, seed=0, config=None):
    """Write the files as on the hub. The bits of a code are balanced on some audio."""
    config = config or focalcodec_config()
    torch.manual_seed(seed)
    network = livened(focalcodec.FocalNetwork(config, folder, "focalcodec"), seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() < 2 or name.endswith("gru_rel_pos_const"):
                parameter.add_(0.1 * torch.randn(parameter.shape))
        wave = helpers.wave(32_000, rate=16_000, levels=(0.1, 0.9))[None]
        network.compressor.out_proj.bias.sub_(network.compressor(network.encoder(wave))[0].mean(0))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def semanticodec_state(joined=1, width=64, depth=10, layers=2, sizes=(300, 80), seed=0):
    """encoder.ckpt and the table of centroids, drawn from the features that it has to code.

    joined: patches in a cell. The published networks have width 768, depth 12, 4, 3 or 2 layers and 8,192 acoustic
    entries.
    """
    torch.manual_seed(seed)
    generator, dim = torch.Generator().manual_seed(seed), joined * width
    mae = audiomae.AudioMAE(width, depth)
    lstm, linear = (
        torch.nn.LSTM(2 * dim, 2 * dim, layers, bidirectional=True),
        torch.nn.Linear(4 * dim, dim, bias=False),
    )
    mels = torch.stack([audiomae.log_mel(window.audio) for window in grid.windows(semantic_wave(300_000))])
    with torch.no_grad():
        for module in (mae, lstm, linear):
            for name, parameter in module.named_parameters():
                if parameter.dim() > 1:
                    noise = torch.randn(parameter.shape, generator=generator)
                    gain = 8 if "patch" in name else 4 if module is lstm else 1
                    parameter.copy_(noise * gain * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        features = grid.GRIDS[joined].join(mae.eval()(mels)).flatten(0, 1)
        [centroids] = entries_of(features.t(), 1, sizes[0], seed)
        near = centroids[torch.cdist(features, centroids).argmin(1)]
        residual = linear(lstm(torch.cat([features, near], 1))[0])
        acoustic = entries_of(residual.t(), 1, sizes[1], seed)
    state = {f"audiomae.model.{key}": value for key, value in mae.state_dict().items()}
    state |= {f"encoder.{key}": value for key, value in lstm.state_dict().items()}
    state |= {"encoder_output_linear.weight": linear.weight.data, "quantizer._codebook.embed": acoustic}
    more = {"quantizer._codebook.embed_avg": acoustic, "quantizer._codebook.cluster_size": torch.ones(1, sizes[1])}
    return state | more | {"quantizer._codebook.initted": torch.ones(1)}, centroids


def semantic_wave(samples, seed=0):
    return helpers.wave(samples, seed, rate=16_000, levels=(0.1, 0.9), noise=0.5)


def write_semanticodec(folder, seed=0, **sizes):
    """Encoder and centroids in the hub's folders."""
    state, centroids = semanticodec_state(seed=seed, **sizes)
    rate = grid.GRIDS[sizes.get("joined", 1)].token_rate
    network = folder / f"semanticodec_tokenrate_{rate}" / "encoder.ckpt"
    codebook = folder / "codebook_idx" / "combine_audioset_dominate" / f"codebook_{len(centroids) // 2}_0.npy"
    for file in (network, codebook):
        file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, network)
    np.save(codebook, centroids.numpy())
    return folder


def saved(model):
    """Return a writer of a transformers model."""

    def write(folder, seed=0):
        model(seed).save_pretrained(folder)
        return folder

    return write


def write_snac(folder, seed=0):
    pytest.importorskip("snac")
    return random_models.save_snac(random_models.snac_model(seed), folder)


def shipped_lyra(folder):
    """Lyra's own weights, which nobody can write; skip where they are absent."""
    pytest.importorskip("ai_edge_litert")
    weights = Path(__file__).parents[3] / "shared" / "weights" / "lyra_v2"
    if not weights.exists():
        pytest.skip("the lyra_v2 weights beside the project are absent")
    return weights


def shipped_tiny(folder):
    return Path(tiny_16khz.__file__).with_suffix(".safetensors")


WRITERS = {
    "encodec_24khz": saved(lambda seed: random_models.encodec_24khz_model()),
    "encodec_48khz": saved(lambda seed: random_models.encodec_48khz_model()),
    "dac_16khz": saved(lambda seed: random_models.dac_model(seed=seed)),
    "dac_24khz": saved(lambda seed: random_models.dac_model("dac_24khz", seed=seed)),
    "dac_44khz": saved(lambda seed: random_models.dac_model("dac_44khz", seed=seed)),
    "mimi": saved(lambda seed: mimi_model(seed, num_quantizers=8)),
    "xcodec": saved(lambda seed: random_models.xcodec_model(seed).float()),
    "snac_24khz": write_snac,
    "semanticodec": write_semanticodec,
    "s3tokenizer_v2": write_s3tokenizer,
    "xcodec2": write_xcodec2,
    "focalcodec": write_focalcodec,
    "neucodec": write_neucodec,
    "qwen3_tts_12hz": write_qwen3_tts,
    "hificodec_16khz": write_hificodec,
    "hificodec_24khz": write_hificodec_24khz,
    "speechtokenizer": write_speechtokenizer,
    "wavtokenizer": write_wavtokenizer,
    "moss_audio": random_moss.write,
    "dualcodec_12hz": partial(random_dualcodec.write, name="dualcodec_12hz"),
    "dualcodec_25hz": partial(random_dualcodec.write, name="dualcodec_25hz"),
}
"""By codec. Every codec of the table is here or in SHIPPED."""
SHIPPED = {"tiny_16khz": shipped_tiny, "lyra_v2": shipped_lyra}
"""Codecs with trained weights."""
