"""Qwen3-TTS-Tokenizer-12Hz (Qwen team 2026): Mimi's encoder, retrained, with the first 16 of its codebooks.

The checkpoint holds a `transformers.MimiModel` without decoder under the prefix `encoder.`, so `backends/mimi.py`
encodes it, exactly for any length. Its decoder is another network with codebooks of its own, in the `qwen-tts` package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from codecssl.tokenize.backends.mimi import CUDA_LANES, MimiCodec, make_card
from codecssl.tokenize.backends.parts.weights import fill_part, find_weights, hub_file, read_tensors
from codecssl.tokenize.codec import keep_codebooks
from codecssl.tokenize.common.errors import UserError, one_line

REPOSITORY = "Qwen/Qwen3-TTS-Tokenizer-12Hz"
MODEL_TYPE = "qwen3_tts_tokenizer_12hz"


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> MimiCodec:
    """Load `qwen3_tts_12hz` from a folder in the hub's format or the hub's cache (`Codec` loader; see `load_codec`)."""
    if weights is None:
        hub_file(name, REPOSITORY, "config.json")  # it lies next to the weights
    path = find_weights(name, weights, REPOSITORY, "model.safetensors", "model.safetensors")
    values = read_config(path.with_name("config.json"))
    model = build(values, path.with_name("config.json"))
    fill_part(model, read_tensors(path, name), "encoder.", path, name)
    kept = keep_codebooks(name, num_codebooks, values["encoder_valid_num_quantizers"], model.config.num_quantizers)
    card = make_card(name, weights or name, model.float().eval().requires_grad_(False), kept, device)
    return MimiCodec(model, card, device, lanes=CUDA_LANES if device.startswith("cuda") else 1)


def read_config(path: Path) -> dict[str, Any]:
    """Read the tokenizer's config.json. Raises UserError if it is another model's."""
    try:
        values = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a model's configuration ({one_line(error)})") from error
    if values.get("model_type") != MODEL_TYPE or not isinstance(values.get("encoder_config"), dict):
        raise UserError(f"{path}: model_type {values.get('model_type')!r} with encoder_config, must be {MODEL_TYPE!r}")
    return {"encoder_valid_num_quantizers": 16} | values


def build(values: dict[str, Any], path: Path) -> Any:
    """Build the encoder, a MimiModel without decoder, with random weights."""
    try:
        config = transformers.MimiConfig(**values["encoder_config"])
        if config.sampling_rate != 24_000 or not config.use_causal_conv or config.audio_channels != 1:
            raise UserError(f"an encoder at {config.sampling_rate} Hz, must be causal, mono, at 24000 Hz")
        model = transformers.MimiModel(config)
    except Exception as error:  # values of any type and size
        raise UserError(f"{path}: not the configuration of Qwen3-TTS's encoder ({one_line(error)})") from error
    model.upsample = model.decoder_transformer = model.decoder = None  # type: ignore[assignment]
    return model
