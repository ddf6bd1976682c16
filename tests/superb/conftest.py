"""A codec with untrained weights, a small exported model, and a corpus of tones: all made here, nothing is
fetched.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

RATE = 16_000


@pytest.fixture(scope="session")
def codec() -> Any:
    from codecssl.tokenize.tiny import random_codec

    return random_codec(0)


@pytest.fixture
def loads_codec(codec: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever codec is asked for, the untrained one comes; returns it."""
    from codecssl.superb import expert

    monkeypatch.setattr(expert, "load_codec", lambda *arguments, **options: codec)
    monkeypatch.setattr(expert, "load_codec_for", lambda *arguments, **options: codec)
    return codec


@pytest.fixture(scope="session")
def model_folder(codec: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the layout of codecssl-pretrain export."""
    from safetensors.torch import save_file

    from codecssl.pretrain.config import ModelConfig
    from codecssl.pretrain.export import FORMAT, VERSION
    from codecssl.pretrain.model import untrained

    config = ModelConfig(dim=32, layers=2, heads=2, ffn_dim=64, conv_kernel=8, conv_groups=4)
    folder = tmp_path_factory.mktemp("model")
    save_file(untrained(config, codec.card, codec.embeddings(), seed=7).state_dict(), folder / "model.safetensors")
    description = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(config), "training": {}}
    (folder / "config.json").write_text(json.dumps({**description, "codec": codec.card.to_dict()}))
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones whose length in seconds is the keyword and whose pitch is the speaker; splits for ks, sid, er and
    ic.
    """
    root, noise, rows = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), []
    for i in range(48):
        word, speaker, split = i % 3, i // 3 % 4, ("train", "train", "valid", "test")[i // 12]
        time = np.arange(int(RATE * (0.3 + 0.2 * word))) / RATE
        wave = 0.3 * np.sin(2 * np.pi * 200 * (1 + speaker) * time) + 0.01 * noise.standard_normal(len(time))
        soundfile.write(root / f"{i:02d}.flac", wave.astype("f4"), RATE)
        labels = {
            "keyword": ["yes", "no", "_silence_"][word],
            "speaker": f"s{speaker}",
            "style": ["sad", "happy"][i % 2],
        }
        slots = {"action": f"a{word}", "object": f"o{speaker}", "location": "none"}
        splits = dict.fromkeys(("ks", "sid", "er", "ic"), split)
        rows.append({"path": f"{i:02d}.flac", "task": "ks,sid,er,ic", "splits": splits, "slots": slots, **labels})
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
