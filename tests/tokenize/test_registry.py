"""Codecs of other packages: a toy codec is installed as a package, and every stage finds it by name."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from helpers import wave

from codecssl.tokenize.shards import Shards

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "toy-codec"
version = "1"

[project.entry-points."codecssl.codecs"]
toy = "toy_codec:TOY"
broken_toy = "toy_codec_that_is_missing:TOY"

[tool.setuptools]
py-modules = ["toy_codec"]
"""

MODULE = '''
"""Quantizes the mean and the peak of each frame: two codebooks of 16 entries."""

import torch

from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.codec import Backend, CodecCard, encode_each

TOY = Backend(module="toy_codec", summary="a toy", weights="none needed", model_type="toy")
HOP = 320


class ToyCodec:
    device = "cpu"

    def __init__(self, count):
        self.card = CodecCard(
            name="toy", weights="toy", weights_sha256="1" * 64, sample_rate=16_000, hop_length=HOP,
            codebook_sizes=(16,) * count, codes_per_frame=(1,) * count, latent_dim=2,
        )

    def encode(self, waves):
        return encode_each(self, waves)

    def stream(self):
        return ToyStream(self, chunk=HOP)

    def decode(self, codes, scales=None):
        return self.latents(codes)[0].repeat_interleave(HOP)

    def embeddings(self):
        values, tables = torch.linspace(-1, 1, 16), torch.zeros(2, 16, 2)
        tables[0, :, 0] = tables[1, :, 1] = values
        return list(tables[: self.card.num_codebooks])

    def latents(self, codes):
        return sum(table[row] for table, row in zip(self.embeddings(), codes)).T


class ToyStream(ChunkedStream):
    def encode_chunk(self, audio, last):
        values = torch.stack([audio.mean(), audio.abs().max()])[: self.codec.card.num_codebooks]
        return ((values + 1) / 2 * 15).round().clamp(0, 15).long()[:, None]


def load(name, weights, num_codebooks, device):
    return ToyCodec(num_codebooks or 2)
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that runs Python in a separate process and folder, with the toy package installed."""
    folder = tmp_path_factory.mktemp("toy")
    source, target = folder / "source", folder / "target"
    source.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "toy_codec.py").write_text(MODULE)
    install = "-m pip install --quiet --no-deps --no-build-isolation --disable-pip-version-check --target"
    subprocess.run([sys.executable, *install.split(), str(target), str(source)], check=True, timeout=120)

    def run(*argv):
        environment = os.environ | {"PYTHONPATH": str(target)}
        return subprocess.run(
            [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture(scope="module")
def shards(run, tmp_path_factory):
    """Two files, tokenized with the toy codec by a worker process."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "audio").mkdir()
    for i, samples in enumerate((16_000, 5_001)):
        soundfile.write(folder / "audio" / f"{i}.wav", wave(samples, i, rate=16_000).numpy(), 16_000)
    command = f"run {folder}/audio --output {folder}/shards --codec toy --workers 1"
    done = run("-m", "codecssl.tokenize", *command.split())
    assert done.returncode == 0, done.stderr
    return folder / "shards"


def test_a_plug_in_codec_tokenizes_and_verifies(run, shards):
    dataset = Shards(shards)
    assert (dataset.card.name, len(dataset), dataset.codes(0).shape) == ("toy", 2, (2, 50))
    assert len(np.unique(dataset.codes(0))) > 3
    done = run("-m", "codecssl.tokenize", "verify", str(shards))
    assert done.returncode == 0, done.stderr
    assert "2 utterances encoded again: 0 of 132 codes differ" in done.stderr
    (shards / "config.json").write_text('{"model_type": "toy"}')  # by the path of its weights, too
    done = run("-c", f"from codecssl.tokenize.registry import identify, Path; print(identify(Path('{shards}')))")
    assert done.stdout.strip() == "toy", done.stderr


def test_a_plug_in_codec_is_an_upstream(run):
    done = run("-c", UPSTREAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "50", "2"]


UPSTREAM = """
import torch
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import parse
[state] = UpstreamBuilder().build(parse("codes:toy"))([torch.rand(16_000)])["hidden_states"]
print(*state.shape)
"""


def test_a_broken_plug_in_is_a_one_line_error_and_hides_no_other(run):
    done = run("-m", "codecssl.tokenize", "codecs")
    assert done.returncode == 0, done.stderr
    assert "toy              a toy" in done.stdout
    assert "tiny_16khz" in done.stdout
    reason = "codec broken_toy: toy_codec_that_is_missing:TOY of package toy-codec cannot be imported"
    assert reason in done.stderr
    done = run("-m", "codecssl.tokenize", "run", "nothing", "--output", "out", "--codec", "broken_toy")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert reason in done.stderr
