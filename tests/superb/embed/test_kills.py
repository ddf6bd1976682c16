"""`embed` killed by SIGKILL five times leaves, in the end, the bytes of a run that was never killed."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from codecssl.superb.embed import embed as module
from codecssl.superb.embed.embed import EmbedConfig, embed
from codecssl.tokenize.common.files import temporary_for


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_five_kills_leave_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for number in range(20):
        soundfile.write(tmp_path / "audio" / f"{number:02d}.wav", 0.1 * random.standard_normal(4_000), 16_000)

    def config(output: str) -> EmbedConfig:
        audio = (str(tmp_path / "audio"),)
        return EmbedConfig(sources=audio, upstream="logmel", output=tmp_path / output, shard_inputs=2, frames=True)

    embed(config("whole"))
    output, marker, write = tmp_path / "killed", tmp_path / "marker", module.write_atomic
    for number in range(5):
        if not (child := os.fork()):
            calls = 0

            def stuck(path: Path, content: bytes, stop: int = number + 3) -> None:
                """Write; at the call `stop`, which is another file of a shard for each child, stay in the middle."""
                nonlocal calls
                calls += 1
                if calls == stop:
                    temporary_for(path).write_bytes(content[:10])
                    marker.touch()
                    time.sleep(600)
                write(path, content)

            monkeypatch.setattr(module, "write_atomic", stuck)
            embed(config("killed"))
            os._exit(0)
        while not marker.exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "must be killed before it ends"
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        marker.unlink()
    assert 0 < len(list(output.glob("data/*.parquet"))) < 10
    assert embed(config("killed")) == {"shards": 10, "embeddings": 20, "failed": 0}

    def files(folder: Path) -> dict[Path, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".lock", ".tmp"))
        return {path.relative_to(folder): path.read_bytes() for path in found}

    assert files(output) == files(tmp_path / "whole")
