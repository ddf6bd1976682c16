"""sources.bin: which audio files a model was trained on, in a bounded size."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from codecssl.pretrain.export import sources
from codecssl.tokenize.shards import Shards


def test_files_of_the_training_shards_are_recognised(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    shards = [Shards(make_shards("a", seed=1)), Shards(make_shards("b", seed=2)), Shards(make_shards("c", seed=1))]
    sources.write_sources(shards, tmp_path)
    reported = sources.seen_sources(tmp_path)
    assert reported is not None
    seen = [utterance.source_sha256 for utterance in shards[1].utterances()]
    other = [hashlib.sha256(bytes([i])).hexdigest() for i in range(10)]
    assert reported.count(seen[3:6] + other) == (3, 13)
    assert (tmp_path / sources.FILE).stat().st_size == 8 * len(
        {u.source_sha256 for s in shards for u in s.utterances()}
    )
    assert sources.seen_sources(tmp_path / "nothing") is None


def test_of_many_files_the_smallest_hashes_are_kept(
    make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LIMIT", 10)
    shards = Shards(make_shards())
    sources.write_sources([shards], tmp_path)
    reported = sources.seen_sources(tmp_path)
    assert reported is not None
    hashes = sorted(utterance.source_sha256 for utterance in shards.utterances())
    assert reported.count(hashes) == (10, 10)
    assert reported.count(["0" * 64, "f" * 64]) == (0, 1)
