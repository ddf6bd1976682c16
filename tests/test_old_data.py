"""Data that an earlier version wrote still opens, with the same contents. See tests/data/v1/README.md."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from codecssl.pretrain import run_folder
from codecssl.pretrain.export.export import load_pretrained
from codecssl.pretrain.run import run
from codecssl.superb.tokens.token_cache import TokenCache, wave_key
from codecssl.tokenize.integrity.verify import examine
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.shards import Shards

DATA = Path(__file__).with_name("data") / "v1"
EXPECTED = json.loads((DATA / "expected.json").read_text())


def waves():
    return [torch.from_numpy(soundfile.read(DATA / "audio" / f"{i}.flac", dtype="float32")[0]) for i in range(3)]


@pytest.mark.parametrize("name", ["shards", "shards_compressed"])
def test_shards(name):
    shards = Shards(DATA / name)
    found = {u.id: shards.codes(u.index).tolist() for u in shards.utterances()}
    assert len(found) == 3
    assert found == EXPECTED[name]
    assert shards.card.fingerprint == load_codec("tiny_16khz", num_codebooks=2).card.fingerprint
    assert examine(DATA / name).damages == []


def test_shards_with_scales_and_codebooks_at_two_frame_rates():
    shards = Shards(DATA / "shards_with_scales")
    for utterance in shards.utterances():
        expected = EXPECTED["shards_with_scales"][utterance.id]
        assert shards.codes(utterance.index).tolist() == expected["codes"]
        assert np.array_equal(utterance.scales, np.float32(expected["scales"]))
        assert utterance.labels == {"text": "ä"}


def test_a_run_resumes_with_the_losses_that_it_would_have_had(tmp_path, monkeypatch):
    for name in ("run", "train_shards"):
        shutil.copytree(DATA / name, tmp_path / name, symlinks=True)
    monkeypatch.chdir(tmp_path)  # the run names its shards by a relative path
    run(run_folder.read_config(tmp_path / "run"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [(row["split"], row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(found) == 5
    for (*name, loss), (*expected_name, expected) in zip(found, EXPECTED["losses"], strict=True):
        assert name == expected_name
        assert loss == pytest.approx(expected, rel=1e-3)  # dropout draws other noise than it did then


def test_an_exported_model():
    model, codes = load_pretrained(DATA / "model"), Shards(DATA / "train_shards").codes(0).astype(np.int64)
    states = model.extract(torch.from_numpy(codes)[None], [codes.shape[1]])
    torch.testing.assert_close(
        torch.stack([state[0, -1] for state in states]), torch.tensor(EXPECTED["states"]), rtol=0, atol=1e-4
    )


def test_a_token_cache():
    codec = load_codec("tiny_16khz", num_codebooks=2)
    cache = TokenCache(DATA / "cache", codec.card)
    assert len(cache) == 3
    for wave, expected in zip(waves(), EXPECTED["cache"], strict=True):
        assert cache.find(wave_key(wave)).tolist() == expected


def test_a_task_codec():
    codec = load_codec(str(DATA / "task_codec"))
    assert [encoded.codes.tolist() for encoded in codec.encode(waves())] == EXPECTED["task_codec"]


def test_fingerprints_of_cards():
    cards = {"tiny_16khz": load_codec("tiny_16khz").card, "machine": load_codec(str(DATA / "task_codec")).card}
    assert {name: card.fingerprint for name, card in cards.items()} == EXPECTED["fingerprints"]
