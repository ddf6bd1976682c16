"""pretrain.sbatch on a real Slurm: two nodes, a warning, a SIGKILL and a dead node, and the curve of a run without."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from codecssl.pretrain.monitor.status import status

STEPS, EVERY = 300, 20
LONG = 300.0
"""Seconds that a start may take on a machine with other work."""
CONFIG: dict[str, Any] = {
    "model": {"dim": 64, "layers": 3, "heads": 2, "ffn_dim": 128, "positions": "rotary", "embedding_init": "random",
              "dropout": 0.0, "input_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0},
    "data": {"batch_frames": 1600, "crop_frames": 60, "valid_fraction": 0.1, "valid_frames": 600},
    "optim": {"steps": STEPS, "lr": 1e-3, "clip_norm": 1.0},
    "engine": {"zero_stage": 1},
    "log": {"log_every": 5, "valid_every": 200, "checkpoint_every": EVERY, "keep_checkpoints": 40},
}  # fmt: skip
CLOCKS = {"frames_per_second", "audio_hours_per_hour", "step_seconds", "data_wait_percent", "seconds_left", "tflops"}
CLOCKS |= {"memory_gib"}


@pytest.fixture(scope="module")
def config(cluster, write_learnable) -> tuple[Path, Path]:
    """Paths of a config file and of shards."""
    root = cluster.root / "work-config"
    root.mkdir()
    (root / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    write_learnable(root / "shards", 120)
    return root / "tiny.yaml", root / "shards"


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics, but for what depends on the machine's speed."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCKS} for line in lines]


def step(run: Path) -> int:
    found = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*")]
    return max(found, default=0)


WITHOUT_SLURM = """
import os, sys
import fairseq2, matplotlib.pyplot, torch.utils.tensorboard
from codecssl.pretrain import run
from codecssl.pretrain.cli import main
from codecssl.pretrain.engine.distributed import quiet_deepspeed
quiet_deepspeed()
ranks = []
for rank in "01":
    if not (child := os.fork()):
        os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
        try:
            os._exit(main(sys.argv[2:]))
        finally:
            os._exit(1)
    ranks.append(child)
sys.exit(max(os.waitpid(rank, 0)[1] for rank in ranks))
"""


@contextmanager
def without_slurm(arguments: Sequence[str], log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the same training uninterrupted in two processes, with torchrun's variables and one shared import."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", WITHOUT_SLURM, str(port), "run", *arguments]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def reference(folder: Path, config: tuple[Path, Path], unused_port: int) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [str(config[0]), "--data", str(config[1]), "--output", str(folder / "whole")]
    with without_slurm(arguments, folder / "whole.log", unused_port) as process:
        yield process


def test_two_nodes_survive_a_warning_a_sigkill_and_a_dead_node(cluster, folder, config, reference):
    yaml_file, shards = config
    run, whole = folder / "run", folder / "whole"
    arguments = (yaml_file, "--data", shards, "--output", run)
    job = cluster.script("pretrain.sbatch", "--nodes", 2, "--gpus", 0, "--done", folder / "done", *arguments,
                         cwd=folder)  # fmt: skip
    log = folder / "logs" / f"codecssl-pretrain-{job}.out"

    cluster.until(lambda: step(run) >= EVERY, LONG, "a checkpoint")
    assert cluster.warn(f"SLURM_JOB_ID={job}") == 1
    cluster.until(lambda: f"job {job} goes back into the queue" in log.read_text(), LONG, "the first requeue")
    warned = step(run)
    stopped = status(run)
    assert (stopped["state"], stopped["ranks"], stopped["step_saved"]) == ("stopped", 2, warned)
    assert "stopped by SIGUSR2 after step" in log.read_text()
    assert "after USR2, stop 1 without progress on" in log.read_text()

    cluster.until(lambda: step(run) >= warned + EVERY, LONG, "a checkpoint after the warning")
    running = status(run)
    assert (running["state"], running["hosts"], running["job"]) == ("running", ["n1", "n2"], job)
    assert running["restarts"] == 1
    assert running["frames_per_second"] > 0
    assert running["seconds_left"] > 0
    assert cluster.kill(signal.SIGKILL, f"SLURM_JOB_ID={job}", "SLURM_PROCID=1") == 1
    cluster.until(lambda: "crash 1 without progress" in log.read_text(), LONG, "the second requeue")
    killed = step(run)

    cluster.until(lambda: step(run) >= killed + EVERY, LONG, "a checkpoint after the kill")
    cluster.fail_node("n2")
    failed = step(run)
    cluster.mend_node("n2")
    cluster.wait(job, seconds=LONG)
    assert EVERY <= warned < killed < failed < STEPS, "each interruption must come during training"
    assert log.read_text().count("resumes from step-") == 3
    assert (folder / "done").exists()

    assert reference.wait(LONG) == 0, (folder / "whole.log").read_text()
    assert rows(run) == rows(whole)
    weights = [path / "checkpoints/latest/training.safetensors" for path in (run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    one = resumed_on_one_node(cluster, folder, run, arguments[:-1])
    for ours, theirs in zip(rows(one), rows(whole), strict=True):
        for key in ("split", "step", "epoch", "frames", "masked_percent", "lr"):
            assert ours.get(key) == theirs.get(key), (key, ours["step"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)


def resumed_on_one_node(cluster: Any, folder: Path, run: Path, arguments: tuple[object, ...]) -> Path:
    """The same run from half-way on one node only."""
    one = folder / "one"
    shutil.copytree(run, one, symlinks=True)
    for found in (one / "checkpoints").glob("step-*"):
        if int(found.name.removeprefix("step-")) > STEPS - 100:
            shutil.rmtree(found)
    cluster.wait(cluster.script("pretrain.sbatch", "--nodes", 1, *arguments, one, cwd=folder), seconds=LONG)
    assert rows(one)[-2]["ranks"] == 1
    return one
