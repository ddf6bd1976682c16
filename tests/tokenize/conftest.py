"""A folder of small audio files, and a codec that needs no training."""

import importlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from helpers import HASHCODEC, random_network, wave

from codecssl.tokenize.backends import table, tiny_16khz
from codecssl.tokenize.backends.parts import weights


def speechlike(seconds, rate, seed):
    return wave(int(seconds * rate), seed, rate=rate).numpy()


@pytest.fixture
def audio_folder(tmp_path):
    """11 good files of several kinds and lengths, and 4 that cannot be read."""
    root = tmp_path / "audio"
    (root / "deep").mkdir(parents=True)
    for i, seconds in enumerate([0.5, 1.0, 0.02, 2.3, 0.7, 1.5, 0.3]):
        soundfile.write(root / f"u{i}.wav", speechlike(seconds, 16_000, i), 16_000)
    soundfile.write(root / "a.wav", speechlike(0.6, 16_000, 20), 16_000)
    soundfile.write(root / "a.flac", speechlike(0.6, 16_000, 21), 16_000)
    stereo = np.stack([speechlike(0.8, 44_100, 30), speechlike(0.8, 44_100, 31)], 1)
    soundfile.write(root / "deep" / "stereo44.flac", stereo, 44_100)
    soundfile.write(root / "deep" / "eight.ogg", speechlike(1.1, 8_000, 32), 8_000)
    (root / "empty.wav").write_bytes(b"")
    (root / "text.wav").write_text("this is a letter, not a sound\n")
    whole = (root / "deep" / "stereo44.flac").read_bytes()
    (root / "truncated.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(root / "nothing.wav", np.zeros(0, "f4"), 16_000)
    (root / "notes.txt").write_text("not audio by name either")
    return root


@pytest.fixture(scope="session")
def codec_file(tmp_path_factory):
    """Weights of the untrained tiny network, loadable by path as tiny_16khz."""
    network = random_network(7)
    path = tmp_path_factory.mktemp("codec") / "tiny_16khz.safetensors"
    tiny_16khz.save_weights(network, path, {})
    return path


@pytest.fixture(scope="session")
def codec(codec_file):
    return tiny_16khz.load("tiny_16khz", str(codec_file), None, "cpu")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Tests must not use the network."""

    def ask(repository):
        raise OSError("no net")

    monkeypatch.setattr(weights, "ask_hub", ask)


@pytest.fixture
def hashcodec(monkeypatch):
    """Register the module next to this file as the codec hash_16khz, and skip fsync."""
    monkeypatch.setitem(table.BACKENDS, "hash_16khz", HASHCODEC)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return importlib.import_module("hashcodec")


READ = """
import hashlib, pickle, sys
for item in pickle.load(open(sys.argv[1], "rb")):
    print(hashlib.sha256(item.open().read()).hexdigest())
assert not set(sys.argv[2:]) & set(sys.modules)
"""


@pytest.fixture
def read_elsewhere(tmp_path):
    """read_elsewhere(items, *modules): sha256 of each, opened by a new process that imports none of these modules."""

    def read(items, *modules):
        (tmp_path / "inputs.pickle").write_bytes(pickle.dumps(items))
        command = [sys.executable, "-c", READ, str(tmp_path / "inputs.pickle"), *modules]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return read
