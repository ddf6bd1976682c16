"""`bench --peers` at a tiny size."""

import pytest

from codecssl.configs.load import load_config
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.peers.speed import peers, table

SMALL = ["--model.dim=32", "--model.layers=1", "--model.heads=2", "--model.ffn_dim=32", "--data.num_codebooks=2"]


def test_every_peer_has_a_row_and_reads_what_it_says() -> None:
    config = load_config(RunConfig, "pretrain", "encodecmae_base", [*SMALL, "--model.embedding_init=random"])
    rows = {row["what"]: row for row in peers(config, seconds=0.5, clip_seconds=0.5, steps=1)}
    assert list(rows) == [
        "ours, 50 frames/s", "HuBERT, 256 channels", "HuBERT, 512 channels", "ours, 75 frames/s", "codec in the loop"
    ]  # fmt: skip
    ours, half, whole, denser, codec = rows.values()
    assert ours["times_ours"] == denser["times_ours"] == 1.0
    assert min(whole["times_ours"], codec["times_ours"]) > 1.5, "they read samples"
    assert whole["saved_mib"] > half["saved_mib"] > ours["saved_mib"]
    assert ours["read_mb_per_hour"] == pytest.approx(50 * 2 * 10 / 8 * 3600 / 1e6)
    assert whole["read_mb_per_hour"] == pytest.approx(115.2)
    assert codec["read_mb_per_hour"] == pytest.approx(172.8)
    lines = list(table(iter(rows.values())))
    assert len(lines) == 7
    assert {line.count("|") for line in lines} == {7}
