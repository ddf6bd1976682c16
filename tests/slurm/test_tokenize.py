"""tokenize.sbatch on a real Slurm: an array whose elements are killed and warned makes the bytes of a local run."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from codecssl.tokenize.status import status

TASKS, SHARD, SHARDS = 9, 6, 18
SIZES = ("--shard-inputs", str(SHARD), "--block-inputs", "2")


@pytest.fixture(scope="module")
def manifest(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first utterances of the sample corpus, and one file that is not audio."""
    folder = tmp_path_factory.mktemp("some")
    (folder / "letter.wav").write_text("not a sound")
    rows = [json.loads(row) for row in (sample / "pretrain.jsonl").read_text().splitlines()[: SHARD * SHARDS - 1]]
    rows = [*(row | {"path": str(sample / row["path"])} for row in rows), {"path": "letter.wav"}]
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "some.jsonl"


SLOW = """
import os, runpy, sys, time
if sys.argv[1] != "-m":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
from codecssl.tokenize.format.writer import ShardWriter
add = ShardWriter.add_block
ShardWriter.add_block = lambda self, *arguments: (add(self, *arguments), time.sleep(0.7))[0]
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def slow_python(folder: Path) -> str:
    """A Python in which a block takes a moment, so that there is a middle in which to interrupt."""
    (folder / "slow.py").write_text(SLOW)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/slow.py "$@"\n')
    path.chmod(0o755)
    return str(path)


def alone(manifest: Path, output: Path, *arguments: str) -> None:
    """Tokenize without Slurm, in one process."""
    command = ["run", str(manifest), "--output", str(output), "--workers", "0", *SIZES, *arguments]
    subprocess.run([sys.executable, "-m", "codecssl.tokenize", *command], check=True, capture_output=True)


def contents(dataset: Path) -> dict[str, bytes]:
    return {str(p.relative_to(dataset)): p.read_bytes() for p in sorted(dataset.rglob("*")) if p.is_file()}


def started(shards: Path, task: int) -> bool:
    """True if the task has finished a block but not all of its shards."""
    return any((shards / f"work/{s:05d}/00000.json").exists() for s in range(task, SHARDS, TASKS))


def test_an_array_killed_and_warned_makes_the_bytes_of_a_local_run(cluster, folder, manifest, slow_python):
    """Nine tasks in eight elements (the cluster's MaxArraySize); one element is killed, one warned, one requeued."""
    shards, before = folder / "shards", cluster.arrays()
    arguments = ("--tasks", TASKS, manifest, "--output", shards, *SIZES)
    last = cluster.script("tokenize.sbatch", *arguments, "--done", folder / "done", cwd=folder,
                          CODECSSL_PYTHON=slow_python)  # fmt: skip
    (array,) = cluster.arrays() - before
    own = f"SLURM_ARRAY_JOB_ID={array}"
    trouble = {
        0: lambda: cluster.kill(signal.SIGKILL, own, "SLURM_ARRAY_TASK_ID=0"),
        1: lambda: cluster.warn(own, "SLURM_ARRAY_TASK_ID=1"),
        2: lambda: cluster.call("scontrol", "requeue", f"{array}_2"),
    }

    seen = {}

    def in_the_middle() -> bool:
        for task in [task for task in trouble if started(shards, task)]:
            trouble.pop(task)()
            seen[task] = status(shards, TASKS)  # from outside, while the jobs run
        return not trouble

    cluster.until(in_the_middle, 300, "three tasks to have a block", every=0.02)
    cluster.wait(array, last, seconds=600)
    for task, now in seen.items():
        assert task in now["tasks_unfinished"], "must have been interrupted"
        assert (now["finished"], now["inputs_total"], now["stalled"]) == (False, SHARD * SHARDS, [])
        assert 0 < now["inputs"] < SHARD * SHARDS
        assert now["inputs_per_second"] > 0
        assert now["seconds_left"] > 0
    logs = {path.name: path.read_text() for path in (folder / "logs").glob("*.out")}
    assert "exit code 137, crash 1 without progress" in logs[f"codecssl-tokenize-{array}_0.out"]
    assert "stopped by SIGUSR2 after a whole block" in logs[f"codecssl-tokenize-{array}_1.out"]
    assert "exit code 75 after USR2" in logs[f"codecssl-tokenize-{array}_1.out"]
    assert "whole" in logs[f"codecssl-tokenize-finish-{last}.out"]
    assert (folder / "done").exists()

    local = folder / "local"
    alone(manifest, local)
    assert contents(local) == contents(shards)
    assert json.loads((shards / "dataset.json").read_text())["totals"]["failed"] == 1


def test_only_elements_with_unfinished_tasks_are_submitted(cluster, folder, manifest):
    alone(manifest, folder / "shards", "--tasks", "10", "--task", "3")
    dry = subprocess.run(
        ["bash", str(Path(__file__).parents[2] / "slurm/tokenize.sbatch"), "--dry-run", "--tasks", "10", "--throttle",
         "2", str(manifest), "--output", str(folder / "shards")],
        env=cluster.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = map(shlex.split, dry.stderr.splitlines())
    assert "--array=0,1,2,4,5,6,7%2" in first
    assert "--dependency=afterany:JOB-OF-codecssl-tokenize" in second
    assert dry.stdout == "JOB-OF-codecssl-tokenize-finish\n"
