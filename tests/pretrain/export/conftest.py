"""Exported models with random weights."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codecssl.pretrain.config import ModelConfig
from codecssl.pretrain.export.export import FORMAT, VERSION
from codecssl.pretrain.model.model import untrained
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.mel import MelSpec

SHAPE: dict[str, Any] = {"dim": 32, "layers": 3, "heads": 2, "ffn_dim": 64, "conv_kernel": 16, "conv_groups": 4}


@pytest.fixture
def export_of(tmp_path: Path) -> Callable[..., Path]:
    """export_of(card, input="both", norm="pre", ...): a model's folder, as `codecssl-pretrain export` writes it."""
    from safetensors.torch import save_file

    def make(card: CodecCard, **settings: Any) -> Path:
        config = ModelConfig(**SHAPE | settings)
        spec = None if config.input == "codes" else MelSpec.for_codec(24, card)
        folder = tmp_path / "-".join(["model", *map(str, settings.values())])
        folder.mkdir()
        save_file(untrained(config, card, None, 7, spec).state_dict(), folder / "model.safetensors")
        description = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(config), "training": {}}
        description |= {"codec": card.to_dict()} | ({} if spec is None else {"mel": spec.to_dict()})
        (folder / "config.json").write_text(json.dumps(description))
        return folder

    return make
