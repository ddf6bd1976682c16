"""`embed-bench` with a clock that only the model, the codec and the writing of Parquet advance."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from codecssl.superb.cli import main
from codecssl.superb.embed import embed as module
from codecssl.superb.tokens.token_cache import CachedCodec
from codecssl.superb.upstreams.codec_upstream import CodecUpstream
from codecssl.superb.upstreams.token_reader import TokenReader
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.run import run


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """Four files of half a second, and one that cannot be read."""
    (tmp_path / "audio").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).standard_normal(8_000)
        soundfile.write(tmp_path / "audio" / f"{number}.wav", 0.1 * noise, 16_000)
    (tmp_path / "audio" / "bad.wav").write_bytes(b"RIFF")
    return tmp_path / "audio"


class Clock:
    """Stands still but for `slow` functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.monkeypatch = 0.0, monkeypatch
        for name in ("perf_counter", "process_time"):
            monkeypatch.setattr(time, name, lambda: self.now)

    def slow(self, owner: Any, name: str, seconds: float) -> None:
        genuine = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.now += seconds
            return genuine(*arguments, **options)

        self.monkeypatch.setattr(owner, name, call)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["embed-bench", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_shares_of_audio(
    audio: Path, upstream: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One batch of four files: codec 3 s within the upstream's 3 + 5 s, Parquet 2 s."""
    clock = Clock(monkeypatch)
    clock.slow(CodecUpstream, "forward", 5.0)
    clock.slow(CachedCodec, "__call__", 3.0)
    clock.slow(module, "_parquet", 2.0)
    assert measured(capsys, str(audio), "--upstream", str(upstream)) == {
        "inputs": 5, "failed": 1, "seconds": 10.0, "cpu_seconds": 10.0, "files_per_second": 0.4,
        "model_share": 0.5, "codec_share": 0.3, "other_share": 0.2,
    }  # fmt: skip


def test_shares_of_tokens(
    audio: Path, tmp_path: Path, upstream: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four utterances: the model 4 x 2 s, what surrounds it 4 x 0.25 s, Parquet 1 s."""
    run(TokenizeConfig(sources=(str(audio),), output=tmp_path / "shards", workers=0))
    clock, genuine = Clock(monkeypatch), TokenReader.__init__

    def slow_model(self: TokenReader, *arguments: Any) -> None:
        genuine(self, *arguments)
        clock.slow(self.encoder, "extract", 2.0)

    monkeypatch.setattr(TokenReader, "__init__", slow_model)
    clock.slow(module.TokenInputs, "_row", 0.25)
    clock.slow(module, "_parquet", 1.0)
    row = measured(capsys, str(tmp_path / "shards"), "--upstream", str(upstream))
    assert (row["cpu_seconds"], row["files_per_second"]) == (10.0, 0.4)
    assert (row["model_share"], row["codec_share"], row["other_share"]) == (0.8, 0.0, 0.2)


def test_nothing_to_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    assert main(["embed-bench", str(tmp_path), "--upstream", "logmel"]) == 1
    assert "no input could be embedded" in capsys.readouterr().err
