"""The bench: one epoch each way, in turns; the caches spare the codec."""

import json
from pathlib import Path
from typing import Any

import pytest

from codecssl.superb import bench
from codecssl.superb.bench import SuperbBenchConfig
from codecssl.superb.cli import main
from codecssl.superb.corpora.corpus import open_corpus
from codecssl.tokenize.common.errors import UserError


@pytest.fixture
def slow_codec(codec: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The untrained codec, taking 20 ms a wave; how many waves each call had."""
    import time

    calls: list[int] = []
    genuine = codec.encode

    def encode(waves: Any) -> Any:
        calls.append(len(waves))
        time.sleep(0.02 * len(waves))
        return genuine(waves)

    monkeypatch.setattr(codec, "encode", encode)
    monkeypatch.setattr(bench, "load_codec", lambda name: codec)
    return calls


def test_the_codec_works_in_uncached_epochs_only(slow_codec: list[int], corpus: Path) -> None:
    config = SuperbBenchConfig(codec="x", tasks="ks,ic", utterances=16, rounds=1)
    keyword, intent = bench.run(config, open_corpus(corpus))
    assert (keyword["task"], intent["task"], keyword["utterances"]) == ("ks", "ic", 16)
    # filled once, warmed up with a batch of 16, one uncached epoch, and what s3prl asks of three upstreams when built
    assert 2 * 48 <= sum(slow_codec) <= 2 * (48 + 12)
    assert keyword["token_cache"]["cached"] >= 16
    assert keyword["audio_seconds"] == pytest.approx(sum(0.3 + 0.2 * (i % 3) for i in range(0, 24, 3)) * 2, abs=4)
    for row in (keyword, intent):
        assert set(row["epoch_seconds"]) == set(bench.WAYS)
        assert row["epoch_seconds"]["no cache"] > 16 * 0.02
        assert row["times_faster"]["token cache"] > 1


def test_the_command_prints_a_line_of_json_per_task(
    slow_codec: list[int], corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["bench", "--codec", "x", "--task", "ks", "--data", str(corpus), "--utterances", "8", "--rounds", "1"]
    assert main([*arguments, "--json"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert row["task"] == "ks"
    assert main(arguments) == 0
    assert "token cache" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": "asr"}, "task asr: bench runs one of ks, sid, ic, er"),
        ({"rounds": 0}, "rounds 0: at least 1"),
        ({"utterances": -1}, "utterances -1: at least 1"),
    ],
)
def test_impossible_benchmarks_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        SuperbBenchConfig(**{"codec": "x", "tasks": "ks", "utterances": 1, "rounds": 1, **options})
