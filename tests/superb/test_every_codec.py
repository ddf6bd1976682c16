"""Every codec of the table from audio to a SUPERB result, with random weights in the files of the hub."""

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
from codecssl.tokenize.backends.table import BACKENDS
from codecssl.tokenize.cli import main
from codecssl.tokenize.shards import Shards

ENCODE_ONLY = ("qwen3_tts_12hz", "s3tokenizer_v2", "semanticodec")
WITHOUT_TABLES = ("semanticodec",)
"""Codecs whose latent is not a sum of embeddings."""
FIXED_DIGITS = ("xcodec2", "neucodec", "s3tokenizer_v2")
"""Codecs one of whose digits hardly varies with random weights, which training refuses as a target of its own."""
STEPS = 20
TWO = tasks.Budget(name="two", divisor=10**6, least=2, evaluations=1)
CONFIG: dict[str, dict[str, Any]] = {
    "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "conv_kernel": 8, "conv_groups": 4},
    "data": {"batch_seconds": 4.0, "crop_seconds": 1.0, "valid_fraction": 0.2, "valid_seconds": 2.0},
    "optim": {"steps": STEPS, "lr": 3e-3},
    "log": {"log_every": 10, "valid_every": STEPS, "checkpoint_every": STEPS},
}


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of 1 to 2.3 s at 16 kHz."""
    folder = tmp_path_factory.mktemp("audio")
    for i in range(6):
        wave = helpers.wave(16_000 + 4_000 * i, i, rate=16_000, levels=(0.1, 0.9))
        soundfile.write(folder / f"{i}.flac", wave.numpy().clip(-1, 1), 16_000)
    return folder


def test_every_codec_of_the_table_has_weights_here() -> None:
    assert {*random_weights.WRITERS, *random_weights.SHIPPED} == set(BACKENDS)


@pytest.mark.parametrize("name", list(BACKENDS))
def test_from_audio_to_keyword_spotting(
    name: str, tmp_path: Path, audio: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights").mkdir()
    weights = (random_weights.WRITERS | random_weights.SHIPPED)[name](tmp_path / "weights")
    shards = tmp_path / "shards"
    tokenize = ["run", str(audio), "--output", str(shards), "--codec", f"{name}@{weights}"]
    assert main([*tokenize, "--workers", "0"]) == 0, capsys.readouterr().err
    assert main(["verify", str(shards), "--sample", "2"]) == 0, capsys.readouterr().err
    dataset = Shards(shards)
    card = dataset.card
    assert (card.name, len(dataset)) == (name, 6)
    capsys.readouterr()
    assert main(["stats", str(shards), "--json"]) == 0
    books = json.loads(capsys.readouterr().out)["codebooks"]
    assert [book["size"] for book in books] == list(card.codebook_sizes)
    assert all(book["used"] > 1 for book in books)
    check_decoding(name, shards, tmp_path / "0.wav", capsys)
    changes = {"embedding_init": "random", "embedding_dim": 16} if name in WITHOUT_TABLES else {}
    whole = {"objective": {"fsq": "whole"}} if name in FIXED_DIGITS else {}
    config = {**CONFIG, **whole, "data": CONFIG["data"] | {"dirs": [str(shards)]}, "model": CONFIG["model"] | changes}
    pretrain(from_dict(RunConfig, config), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == STEPS
    export(tmp_path / "run", tmp_path / "model")
    run = Run(
        upstream=parse(str(tmp_path / "model")), task="ks", root=corpus, output=tmp_path / "superb", data="tones",
        learning_rate=1e-2, budget=TWO, seed=0,
    )  # fmt: skip
    row = run_one(run, Machine(device="cpu"))
    assert 0 <= row["value"] <= 100


def check_decoding(name: str, shards: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decode one utterance: a wave as long as its codes and not silent, or one line that says why not."""
    dataset = Shards(shards)
    decoded = main(["decode", str(shards), "--id", dataset.utterance(0).id, "--output", str(path)])
    assert decoded == (1 if name in ENCODE_ONLY else 0)
    assert ("encodes only" in capsys.readouterr().err) == (name in ENCODE_ONLY)
    if name not in ENCODE_ONLY:
        wave, rate = soundfile.read(path)
        card, samples = dataset.card, dataset.utterance(0).samples
        assert rate == card.sample_rate
        assert samples <= len(wave) < samples + card.hop_length or len(wave) == samples
        assert wave.std() > 0
