"""Codecs with one large codebook from audio to a SUPERB result, on random weights in the files of the hub."""

import json
from pathlib import Path
from typing import Any

import helpers
import pytest
import random_weights
import soundfile

from codecssl.configs.load import from_dict
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.export.export import export
from codecssl.pretrain.run import run as pretrain
from codecssl.superb import tasks
from codecssl.superb.runner.run import Machine, Run, run_one
from codecssl.superb.upstreams.names import parse
from codecssl.tokenize.cli import main
from codecssl.tokenize.shards import Shards

ENCODE_ONLY = ("s3tokenizer_v2",)
TWO = tasks.Budget(name="two", divisor=10**6, least=2, evaluations=1)
MODEL = {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "conv_kernel": 8, "conv_groups": 4}
CONFIG: dict[str, dict[str, Any]] = {
    "model": MODEL,
    "data": {"batch_frames": 200, "crop_frames": 40, "valid_fraction": 0.2, "valid_frames": 60},
    "optim": {"steps": 20, "lr": 3e-3},
    "log": {"log_every": 10, "valid_every": 20, "checkpoint_every": 20},
}


@pytest.mark.parametrize("name", ["s3tokenizer_v2", "xcodec2"])
def test_from_audio_to_keyword_spotting(
    name: str, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("audio", "weights"):
        (tmp_path / folder).mkdir()
    for i in range(8):
        wave = helpers.wave(24_000 + 4_000 * i, i, rate=16_000, levels=(0.1, 0.9))
        soundfile.write(tmp_path / "audio" / f"{i}.flac", wave.numpy().clip(-1, 1), 16_000)
    weights, shards = random_weights.WRITERS[name](tmp_path / "weights"), tmp_path / "shards"
    tokenize = ["run", str(tmp_path / "audio"), "--output", str(shards), "--codec", f"{name}@{weights}"]
    assert main([*tokenize, "--workers", "0"]) == 0, capsys.readouterr().err
    assert main(["verify", str(shards), "--sample", "2"]) == 0, capsys.readouterr().err
    dataset = Shards(shards)
    assert (dataset.card.name, len(dataset)) == (name, 8)
    capsys.readouterr()
    assert main(["stats", str(shards), "--json"]) == 0
    books = json.loads(capsys.readouterr().out)["codebooks"]
    assert [book["size"] for book in books] == list(dataset.card.codebook_sizes)
    assert all(book["used"] > 1 for book in books)
    decoded = main(["decode", str(shards), "--id", dataset.utterance(0).id, "--output", str(tmp_path / "0.wav")])
    assert decoded == (1 if name in ENCODE_ONLY else 0)
    assert ("encodes only" in capsys.readouterr().err) == (name in ENCODE_ONLY)
    config = {**CONFIG, "data": CONFIG["data"] | {"dirs": [str(shards)]}}
    pretrain(from_dict(RunConfig, config), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    run = Run(
        upstream=parse(str(tmp_path / "model")), task="ks", root=corpus, output=tmp_path / "superb", data="tones",
        learning_rate=1e-2, budget=TWO, seed=0,
    )  # fmt: skip
    row = run_one(run, Machine(device="cpu"))
    assert 0 <= row["value"] <= 100
