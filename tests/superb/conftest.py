"""A codec with untrained weights, a small exported model, and a corpus of tones: all made here, nothing is
fetched.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

RATE = 16_000


@pytest.fixture(scope="session")
def codec() -> Any:
    from helpers import random_codec

    return random_codec(0)


@pytest.fixture
def loads_codec(codec: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace every loaded codec by the untrained one, and return it."""
    from codecssl.superb.upstreams import build

    monkeypatch.setattr(build, "load_codec", lambda *arguments, **options: codec)
    monkeypatch.setattr(build, "load_codec_for", lambda *arguments, **options: codec)
    return codec


@pytest.fixture(scope="session")
def shipped() -> Any:
    """tiny_16khz with its trained weights, which is found by its name."""
    from codecssl.tokenize.registry import load_codec

    return load_codec("tiny_16khz")


def small_model(codec: Any) -> Any:
    """An untrained model of two layers that reads the codec's codes."""
    from codecssl.pretrain.config import ModelConfig
    from codecssl.pretrain.model.model import untrained

    config = ModelConfig(dim=32, layers=2, heads=2, ffn_dim=64, conv_kernel=8, conv_groups=4)
    return untrained(config, codec.card, codec.embeddings(), seed=7)


def exported(codec: Any, folder: Path) -> Path:
    """`small_model` in the layout of codecssl-pretrain export."""
    from safetensors.torch import save_file

    from codecssl.pretrain.export.export import FORMAT, VERSION

    model = small_model(codec)
    save_file(model.state_dict(), folder / "model.safetensors")
    description = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(model.config), "training": {}}
    (folder / "config.json").write_text(json.dumps({**description, "codec": codec.card.to_dict()}))
    return folder


@pytest.fixture(scope="session")
def export_model() -> Callable[[Any, Path], Path]:
    """export_model(codec, folder): a small model of any codec."""
    return exported


@pytest.fixture(scope="session")
def model_folder(codec: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the untrained codec."""
    return exported(codec, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def shipped_model(shipped: Any) -> Any:
    """A model of the shipped codec."""
    return small_model(shipped)


@pytest.fixture(scope="session")
def upstream(shipped: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported model's path, as given to `--upstream`."""
    return exported(shipped, tmp_path_factory.mktemp("upstream"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones for all ten tasks. Short ones, whose length is the keyword and whose pitch is the speaker, for ks, sid, er
    and ic; longer ones of one to three pitches, each a word, for pr, asr, sf, asv, qbe; two voices in turns for sd.
    """
    root, noise, rows = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), []

    def write(name: str, *tones: tuple[float, float]) -> str:
        """(Hz, seconds) one after the other."""
        parts = [0.3 * np.sin(2 * np.pi * pitch * np.arange(int(RATE * seconds)) / RATE) for pitch, seconds in tones]
        wave = np.concatenate(parts)
        soundfile.write(root / name, (wave + 0.01 * noise.standard_normal(len(wave))).astype("f4"), RATE)
        return name

    for i in range(48):
        word, speaker, split = i % 3, i // 3 % 4, ("train", "train", "valid", "test")[i // 12]
        labels = {
            "keyword": ["yes", "no", "_silence_"][word],
            "speaker": f"s{speaker}",
            "style": ["sad", "happy"][i % 2],
            "fold": i % 5 + 1,
            "pitch": 200 * (1 + speaker),
        }
        slots = {"action": f"a{word}", "object": f"o{speaker}", "location": "none"}
        splits = dict.fromkeys(("ks", "sid", "er", "ic", "pitch"), split)
        path = write(f"{i:02d}.flac", (200 * (1 + speaker), 0.3 + 0.2 * word))
        rows.append({"path": path, "task": ",".join(splits), "splits": splits, "slots": slots, **labels})
    rows += _spoken(write) + _turns(write)
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


WORDS = {"low": 300.0, "mid": 700.0, "high": 1500.0}


def _spoken(write: Any) -> list[dict[str, Any]]:
    """Twelve sentences of three words (2.4 s), and each word alone as a query of valid and of test."""
    rows, names = [], list(WORDS)
    for i in range(12):
        split = ("train", "train", "valid", "test")[i // 3]
        words = [names[i % 3], names[(i + i // 3) % 3], names[i % 2]]
        path = write(f"long{i:02d}.flac", *((WORDS[word], 0.8) for word in words))
        splits = {"pr": split, "asr": split, "sf": split, "asv": "train" if split == "train" else "test"}
        columns = {"text": " ".join(words), "phones": [word[0].upper() for word in words], "speaker": f"v{i % 2}"}
        tags = ["B-pitch" if word == "high" else "O" for word in words]
        row = {"path": path, "task": "pr,asr,sf,asv", "splits": splits, "iob": " ".join(tags), **columns}
        if split != "train":
            row |= {"task": "pr,asr,sf,asv,qbe", "role": "document", "queries": sorted(set(words))}
            splits["qbe"] = split
        rows.append(row)
    for i, (word, pitch) in enumerate(WORDS.items()):
        for split in ("valid", "test"):
            path = write(f"query-{split}{i}.flac", (pitch, 0.5))
            rows.append({"path": path, "task": "qbe", "splits": {"qbe": split}, "role": "query", "query": word})
    return rows


def _turns(write: Any) -> list[dict[str, Any]]:
    rows = []
    for i, split in enumerate(("train", "train", "valid", "test")):
        path = write(f"two{i}.wav", (300.0, 1.0), (900.0, 1.0 + 0.1 * i))
        segments = [{"speaker": "a", "start": 0.0, "end": 1.0}, {"speaker": "b b", "start": 1.0, "end": 2.0 + 0.1 * i}]
        rows.append({"path": path, "task": "sd", "splits": {"sd": split}, "segments": segments})
    return rows


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
