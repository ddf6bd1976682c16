"""Status from the files alone: their times are set by hand, so that rates and remaining times are known."""

import json
import os
import shutil
import time

import pytest
from helpers import card

from codecssl.tokenize.cli import main
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.status import status

RATE = 16_000


@pytest.fixture
def folder(tmp_path):
    """A run of 100 inputs, 10 a shard, begun 10,000 s ago."""
    plan = {"codec": card([4]).to_dict(), "sources": ["x"], "inputs": 100, "shard_inputs": 10, "block_inputs": 5}
    write(tmp_path / "plan.json", plan, 10_000)
    return tmp_path


def write(path, value, age):
    """A JSON file last written `age` seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    when = time.time() - age
    os.utime(path, (when, when))


def shard(root, number, age, failed=0):
    counts = {"inputs": 10, "samples": (10 - failed) * 20 * RATE, "failed": [{}] * failed}
    write(root / f"shards/{number:05d}.json", counts, age)


def block(root, number, block, age):
    write(root / f"work/{number:05d}/{block:05d}.json", {"inputs": 5, "samples": 100 * RATE, "failed": []}, age)


def test_counts_rate_and_time_left(folder):
    for number in range(4):  # one each 100 s, the last one 20 s ago
        shard(folder, number, 10_000 - 100 * (number + 1), failed=number % 2)
    state = status(folder)
    assert not state["finished"]
    assert (state["shards"], state["shards_total"], state["blocks"]) == (4, 10, 0)
    assert (state["inputs"], state["inputs_total"], state["fraction"], state["failed"]) == (40, 100, 0.4, 2)
    assert state["hours"] == pytest.approx(38 * 20 / 3600)
    assert state["inputs_per_second"] == pytest.approx(0.1, rel=1e-3)
    assert state["times_real_time"] == pytest.approx(38 * 20 / 400, rel=1e-3)
    assert state["seconds_left"] == pytest.approx(600, rel=1e-3)
    assert state["age_seconds"] == pytest.approx(9600, abs=5)
    assert state["stalled"] == []


def test_a_shard_that_is_finished_while_status_reads(folder, monkeypatch):
    """The shard's folder of blocks exists when it is listed and is gone when it is opened."""
    shard(folder, 0, 100)
    block(folder, 1, 0, 50)
    block(folder, 2, 0, 20)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("work/00001"):
            shutil.rmtree(path, ignore_errors=True)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert (status(folder)["shards"], status(folder)["blocks"]) == (1, 1)
    assert not (folder / "work" / "00001").exists()


def test_a_pause_of_hours_between_two_runs_is_not_counted(folder):
    for number, age in enumerate([9900, 9800, 9700, 1200, 1100, 1000]):
        shard(folder, number, age)
    assert status(folder)["inputs_per_second"] == pytest.approx(0.1, rel=1e-3)


def test_blocks_of_unfinished_shards_count_once(folder):
    shard(folder, 0, 9800)
    for number in range(2):  # those of shard 0 were about to be removed
        block(folder, number, 0, 9900)
        block(folder, number, 1, 9850)
    state = status(folder)
    assert (state["shards"], state["blocks"], state["inputs"]) == (1, 2, 20)


def test_a_stalled_shard_is_named_with_its_task(folder):
    for n in range(5):
        block(folder, 1, n, 9000 - 100 * n)  # a block each 100 s, until 8600 s ago
        block(folder, 2, n, 900 - 100 * n)  # until 500 s ago
    state = status(folder, tasks=4)
    assert [(s["shard"], s["task"]) for s in state["stalled"]] == [(1, 1)]
    assert state["stalled"][0]["age_seconds"] == pytest.approx(8600, abs=5)
    assert "task" not in status(folder)["stalled"][0]


def test_a_run_that_has_just_begun_and_one_whose_inputs_cannot_be_counted(folder):
    state = status(folder)
    assert (state["inputs"], state["fraction"], state["inputs_per_second"], state["seconds_left"]) == (0, 0, None, None)
    plan = json.loads((folder / "plan.json").read_text())
    write(folder / "plan.json", plan | {"inputs": None}, 10_000)
    shard(folder, 0, 9900)
    state = status(folder)
    assert (state["fraction"], state["seconds_left"], state["shards_total"]) == (None, None, None)
    assert state["inputs_per_second"] == pytest.approx(0.1, rel=1e-2)


def test_a_finished_run_and_a_strangers_folder(folder, tmp_path_factory):
    for number in range(10):
        shard(folder, number, 9000)
    counts = ("inputs", "utterances", "frames", "samples", "bytes", "failed", "shards", "hours")
    header = {
        "format": "codecssl-shards",
        "format_version": 1,
        "sha256": "0" * 64,
        "totals": dict.fromkeys(counts, 100),
    }
    write(folder / "dataset.json", header | json.loads((folder / "plan.json").read_text()), 9000)
    state = status(folder)
    assert (state["finished"], state["fraction"], state["seconds_left"], state["stalled"]) == (True, 1.0, 0.0, [])
    with pytest.raises(UserError, match=r"no plan\.json"):
        status(tmp_path_factory.mktemp("stranger"))


def test_unfinished_tasks_are_listed_in_the_syntax_of_arrays(folder, capsys):
    """Ten shards in eight tasks: 0 and 1 have two each."""
    for number in (0, 1, 3, 7, 8):
        shard(folder, number, 9000 - number)
    assert status(folder, tasks=8)["tasks_unfinished"] == [1, 2, 4, 5, 6]
    assert status(folder)["tasks_unfinished"] is None
    assert main(["status", str(folder), "--tasks", "8"]) == 0
    assert "unfinished tasks: 1-2,4-6\n" in capsys.readouterr().out
