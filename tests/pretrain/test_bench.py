"""Every variant of the benchmark is timed on the same frames, and the reported figures follow from the times."""

from collections.abc import Callable
from pathlib import Path

import pytest

from codecssl.pretrain.bench import SYNTHETIC, bench, in_turns, make_batch, table
from codecssl.pretrain.config import RunConfig
from codecssl.tokenize.common.errors import UserError


def test_ways_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []
    best = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, steps=2)  # type: ignore[misc]
    assert calls == ["a", "b"] * 3
    assert set(best) == {"a", "b"}
    assert min(best.values()) > 0.0


def test_a_batch_has_the_seconds_asked_for_and_the_configs_mask() -> None:
    batch = make_batch(RunConfig(), SYNTHETIC, seconds=60.0, clip_seconds=15.0)
    assert batch.codes.shape == (12, 3000)
    assert batch.frames == [750] * 4
    assert abs(batch.masked_total / 3000 - 0.566) < 0.03
    assert batch.masked_total == int(batch.mask.sum()) == 3000 - batch.visible_total


def test_rows_follow_from_their_times(make_shards: Callable[..., Path], small_config: Callable[..., RunConfig]) -> None:
    config = small_config(
        make_shards(), model={"dim": 32, "heads": 2, "conv_groups": 16}, objective={"target": "online"},
        online={"top_layers": 2, "clusters": 4},
    )  # fmt: skip
    rows = list(bench(config, seconds=2.0, clip_seconds=1.0, steps=1))
    ours, plain, hubert, loader, checks = rows
    assert [row["what"] for row in (plain, hubert, loader, checks)] == [
        "plain loop, no DeepSpeed", "waveform HuBERT, same encoder", "loader alone", "checksums of first reads"
    ]  # fmt: skip
    assert ours["frames_per_second"] == pytest.approx(100 / ours["step_seconds"])
    assert ours["audio_hours_per_hour"] == pytest.approx(2.0 / ours["step_seconds"])
    assert hubert["times_slower_than_ours"] == pytest.approx(hubert["step_seconds"] / ours["step_seconds"])
    taken = loader["frames_per_second"] / ours["frames_per_second"]
    assert loader["times_what_the_model_takes"] == pytest.approx(taken)
    percent = 100 * ours["frames_per_second"] / checks["frames_per_second"]
    assert checks["percent_of_a_step"] == pytest.approx(percent)
    assert 0 < percent < 100
    lines = list(table(iter(rows)))
    assert lines[2].startswith("waveform HuBERT")
    assert lines[2].endswith(f"{hubert['times_slower_than_ours']:.2f} x ours")
    with pytest.raises(UserError, match=r"--clip-seconds 9: must be above 0 and at most --seconds \(2.0\)"):
        list(bench(config, seconds=2.0, clip_seconds=9))
