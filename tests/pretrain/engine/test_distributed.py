"""Runs of 1, 2 and 4 real processes over gloo: they compute the same, resume bit for bit, and stop together.

This file is also the launcher: `python test_ranks.py SESSIONS` imports the heavy libraries once and forks the ranks.
"""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

Job = dict[str, Any]
Rows = list[dict[str, Any]]

SMALL: dict[str, dict[str, Any]] = {
    "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "positions": "rotary", "embedding_init": "random"},
    "data": {"batch_frames": 400, "crop_frames": 60, "valid_fraction": 0.2, "valid_frames": 2_000},
    "optim": {"steps": 8, "lr": 3e-3, "clip_norm": 0.3},
    "log": {"log_every": 1, "valid_every": 1000, "checkpoint_every": 4},
}
NO_DROPOUT = {"dropout": 0.0, "input_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
STEPS, SHORT = 50, 12
EXACT = [(stage, precision, "adamw") for stage in (0, 1, 2) for precision in ("fp32", "bf16")]
EXACT += [(0, "fp32", "muon"), (1, "bf16", "muon")]
MACHINE = {
    "frames_per_second",
    "audio_hours_per_hour",
    "step_seconds",
    "data_wait_percent",
    "seconds_left",
    "tflops",
    "memory_gib",
}


def main(sessions: Path) -> None:
    """Fork the ranks of each session (name, world size, jobs), one session after the other."""
    import matplotlib.pyplot  # noqa: F401  (imported before the forks, as all of these: it takes seconds)
    import torch.utils.tensorboard  # noqa: F401

    from codecssl.pretrain import run  # noqa: F401
    from codecssl.pretrain.engine.distributed import quiet_deepspeed

    quiet_deepspeed()
    import fairseq2  # after `run`, which loads libsndfile for it

    fairseq2.init_fairseq2()
    for name, world, jobs in json.loads(sessions.read_text()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = {_fork(rank, world, jobs, port, sessions.with_name(f"{name}-{rank}")) for rank in range(world)}
        while ranks:
            ended, status = os.wait()
            ranks.remove(ended)
            if status:  # the others would wait for it
                for rank in ranks:
                    os.kill(rank, signal.SIGKILL)


def _fork(rank: int, world: int, jobs: list[Job], port: int, outcomes: Path) -> int:
    if child := os.fork():
        return child
    if world > 1:
        names = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
    status = 1
    try:
        done: list[dict[str, Any]] = []
        outcomes.write_text("[]")
        for job in jobs:
            done.append(_work(job, rank))
            outcomes.write_text(json.dumps(done))
            if done[-1]["code"] and not job["trouble"]:
                break  # an unexpected error: the next run would find the ranks at different places
        else:
            status = 0
    finally:
        os._exit(status)


def _work(job: Job, rank: int) -> dict[str, Any]:
    """Execute a run as the command line does. Return its output, its end, and the codes read at each step."""
    from codecssl.configs.load import from_dict
    from codecssl.pretrain.config import RunConfig
    from codecssl.pretrain.run import run
    from codecssl.tokenize.common.errors import TransientError, UserError

    output = Path(job["output"])
    if rank == 0 and "begin" in job:
        _copy(Path(job["begin"]["run"]), job["begin"]["step"], output)
    printed: dict[str, Any] = {"out": io.StringIO(), "err": io.StringIO(), "code": 0, "error": None, "read": {}}
    with (
        redirect_stdout(printed["out"]),
        redirect_stderr(printed["err"]),
        _trouble(rank, printed["read"], **job["trouble"]),
    ):
        try:
            run(from_dict(RunConfig, job["config"]), output)
        except UserError as error:
            printed["code"], printed["error"] = 70 if isinstance(error, TransientError) else 1, str(error)
        except SystemExit as end:
            printed["code"] = end.code
        except BaseException:
            printed["code"], printed["error"] = -1, traceback.format_exc()
    return {**printed, "out": printed["out"].getvalue(), "err": printed["err"].getvalue()}


def _copy(run: Path, step: int, output: Path) -> None:
    """Copy a run as it would be after a crash soon after the checkpoint of `step`."""
    shutil.copytree(run, output, symlinks=True)
    for found in (output / "checkpoints").glob("step-*"):
        if int(found.name.removeprefix("step-")) > step:
            shutil.rmtree(found)


@contextmanager
def _trouble(rank: int, read: dict[int, list[str]], kind: str = "", at: int = 0, on: int = 0) -> Iterator[None]:
    """Record the data that is read. Before step `at` (0, 1, ...), cause a fault of the given kind on one rank."""
    import torch

    from codecssl.pretrain import training
    from codecssl.pretrain.data.loader import Loader
    from codecssl.pretrain.objectives import codec2vec
    from codecssl.tokenize.common.errors import TransientError, UserError

    step, update, forward = Loader.step, training.Training.update, codec2vec.MaskedPrediction.forward
    now = {"step": -1}

    def noted(self: Any, number: int) -> Any:
        if (kind, number, rank) in (("unreadable", at, on), ("away", at, on)):
            raise (TransientError if kind == "away" else UserError)("shard 00017: is gone; bring it back")
        batches = step(self, number)
        if not self._fixed:  # the training loader
            read[number] = [hashlib.sha256(item.numpy().tobytes()).hexdigest()
                            for b in batches for item in b.codes.split(b.frames, 1)]  # fmt: skip
        return batches

    def signalled(self: Any, number: int, *args: Any, **kwargs: Any) -> Any:
        now["step"] = number
        if (kind, number, rank) == ("signal", at, on):
            os.kill(os.getpid(), signal.SIGUSR2)
        return update(self, number, *args, **kwargs)

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (kind, now["step"], rank) == ("nccl", at, on):
            raise torch.distributed.DistBackendError("NCCL error in: x.cpp:3,\n unhandled cuda error, Xid 94 on n7")
        if (kind, now["step"], rank) == ("ecc", at, on):
            raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCompile with X for Y")
        loss = forward(self, *args, **kwargs)
        bad = (kind, now["step"], rank) == ("nan", at, on)
        return replace(loss, total=loss.total * float("nan")) if bad else loss

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        patch.object(Loader, "step", noted),
        patch.object(training.Training, "update", signalled),
        patch.object(codec2vec.MaskedPrediction, "forward", poisoned),
        patch("codecssl.pretrain.monitor.telemetry.draw_curves"),  # it takes longer than the run
    ):
        if (kind, rank) == ("full", on):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def config(shards: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    values = {key: {**SMALL.get(key, {}), **sections.get(key, {})} for key in {*SMALL, *sections}}
    values["data"]["dirs"] = [str(shards)]
    return values


def same(shards: Path, stage: int, *, steps: int = STEPS, accumulation: int = 1) -> dict[str, Any]:
    """Runs that must agree for any division among ranks. They have no dropout, which each rank draws separately."""
    return config(
        shards, model=NO_DROPOUT, engine={"zero_stage": stage, "accumulation": accumulation},
        optim={"steps": steps}, log={"valid_every": steps, "checkpoint_every": steps // 2},
    )  # fmt: skip


def exact(shards: Path, stage: int, precision: str, optimizer: str = "adamw") -> dict[str, Any]:
    """Runs that must repeat bit for bit, with dropout, accumulation and averaged weights."""
    return config(
        shards, engine={"zero_stage": stage, "precision": precision, "accumulation": 2},
        objective={"target": "online"}, online={"top_layers": 2, "clusters": 8}, log={"log_every": 3},
        optim={"name": optimizer},
    )  # fmt: skip


def muon(shards: Path) -> dict[str, Any]:
    """Runs with Muon in bf16. With two ranks, ZeRO 1 cuts one of the matrices."""
    return config(
        shards, model=NO_DROPOUT, engine={"precision": "bf16"}, optim={"name": "muon", "steps": SHORT},
        log={"valid_every": SHORT, "checkpoint_every": SHORT},
    )  # fmt: skip


class Sessions:
    """Processes that do some jobs (runs) one after the other, and what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sessions: list[tuple[str, int, list[Job]]] = []
        self._places: dict[str, tuple[str, int, int]] = {}

    def session(self, world: int) -> None:
        self._sessions.append((f"session{len(self._sessions)}", world, []))

    def add(self, run: str, config: dict[str, Any], **job: Any) -> None:
        """begin: (run, step of the checkpoint) to start from a copy of; trouble: see `_trouble`."""
        if "begin" in job:
            job["begin"] = {"run": str(self.folder / job["begin"][0]), "step": job["begin"][1]}
        session, world, jobs = self._sessions[-1]
        self._places[run] = (session, world, len(jobs))
        jobs.append({"trouble": {}, **job, "config": config, "output": str(self.folder / run)})

    def launch(self) -> None:
        file = self.folder / "sessions.json"
        file.write_text(json.dumps(self._sessions))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu"}
        subprocess.run([sys.executable, __file__, str(file)], env=environment, check=True, cwd=self.folder, timeout=900)

    def outcomes(self, run: str) -> list[dict[str, Any]]:
        """Outcomes of all ranks."""
        session, world, number = self._places[run]
        done = [json.loads((self.folder / f"{session}-{rank}").read_text()) for rank in range(world)]
        assert all(len(jobs) > number for jobs in done), [job["error"] for jobs in done for job in jobs[-1:]]
        return [jobs[number] for jobs in done]

    def rows(self, name: str) -> Rows:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in MACHINE} for line in lines]

    def tensors(self, name: str) -> dict[str, Any]:
        """All that the last checkpoint holds, but for the state of the loop."""
        from safetensors.torch import load_file

        last = self.folder / name / "checkpoints" / "latest"
        return {**load_file(last / "model.safetensors"), **load_file(last / "training.safetensors")}


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory, write_learnable: Callable[[Path, int], None]) -> Sessions:
    folder = tmp_path_factory.mktemp("ranks")
    made, shards, half = Sessions(folder), folder / "shards", STEPS // 2
    write_learnable(shards, 60)
    made.session(2)
    for stage in (0, 1):
        made.add(f"two-{stage}", same(shards, stage))
    for stage in (2, 3):
        made.add(f"two-{stage}", same(shards, stage, steps=SHORT, accumulation=stage - 1))
    made.add("two-muon", muon(shards))
    _add_exact(made, shards, 2)
    made.session(1)
    made.add("one", same(shards, 0))
    made.add("one-muon", muon(shards))
    made.add("short", same(shards, 0, steps=SHORT))
    made.add("one-from-two", same(shards, 0), begin=("two-1", half))
    _add_exact(made, shards, 1)
    made.session(4)
    made.add("four-from-two", same(shards, 2), begin=("two-1", half))
    made.session(2)
    made.add("stopped", exact(shards, 1, "fp32"), trouble={"kind": "signal", "at": 5, "on": 1})
    made.session(2)
    made.add("stopped-resumed", exact(shards, 1, "fp32"), begin=("stopped", 99))
    for kind, stage in (("nan", 0), ("nan", 2), ("unreadable", 0), ("away", 0), ("nccl", 0), ("ecc", 0), ("full", 1)):
        made.session(2)
        trouble = {"kind": kind, "at": 6, "on": 0 if kind == "full" else 1}
        values = config(shards, engine={"zero_stage": stage}, log={"log_every": 8})
        made.add(f"{kind}-{stage}", values, trouble=trouble)
    made.launch()
    return made


def _add_exact(made: Sessions, shards: Path, world: int) -> None:
    for stage, precision, optimizer in EXACT:
        name, values = f"exact-{world}-{stage}-{precision}-{optimizer}", exact(shards, stage, precision, optimizer)
        made.add(name, values)
        made.add(f"{name}-resumed", values, begin=(name, 4))


def assert_close(left: dict[str, Any], right: dict[str, Any], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert float((value - right[name]).abs().max()) <= tolerance, name


@pytest.mark.parametrize(
    ("name", "steps"),
    [("two-0", STEPS), ("two-1", STEPS), ("two-2", SHORT), ("two-3", SHORT), ("one-from-two", STEPS),
     ("four-from-two", STEPS)],
)  # fmt: skip
def test_the_same_global_batches_train_the_same_model(sessions: Sessions, name: str, steps: int) -> None:
    """The number of ranks, of micro-batches and the ZeRO stage do not matter, even if they change during the run."""
    assert {outcome["error"] for outcome in sessions.outcomes(name)} == {None}
    alone = "one" if steps == STEPS else "short"
    one, other = sessions.rows(alone), sessions.rows(name)
    assert len(one) == steps + 1
    assert [row["split"] for row in one] == [row["split"] for row in other]
    for left, right in zip(one, other, strict=True):
        assert right["loss"] == pytest.approx(left["loss"], abs=1e-4)
        for key in ("grad_norm", "masked_percent", "frames", "cross_entropy", "target_perplexity"):
            assert right.get(key) == pytest.approx(left.get(key), abs=1e-4), key
        # a rounding may turn a guess where two classes are level
        assert right["accuracy"] == pytest.approx(left["accuracy"], abs=0.02)
    assert one[-2]["loss"] < one[0]["loss"] - 0.1, "the model must have learned something"
    assert_close(sessions.tensors(alone), sessions.tensors(name), 2e-3)


def test_two_ranks_orthogonalize_whole_matrices(sessions: Sessions) -> None:
    for name in ("one-muon", "two-muon"):
        assert {outcome["error"] for outcome in sessions.outcomes(name)} == {None}
    one, two = sessions.rows("one-muon"), sessions.rows("two-muon")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=5e-3)
    assert one[-2]["loss"] < one[0]["loss"] - 0.03, "the model must have learned something"
    left, right = sessions.tensors("one-muon"), sessions.tensors("two-muon")
    momenta = [name for name in left if name.startswith("momentum_buffer/")]
    assert len(momenta) == 12  # of two layers: query, key, value, output and both of the feed-forward
    for name in momenta:
        assert float((left[name] - right[name]).norm()) < 0.1 * float(left[name].norm()), name


@pytest.mark.parametrize(("name", "first"), [("two-0", 0), ("one-from-two", STEPS // 2), ("four-from-two", STEPS // 2)])
def test_ranks_read_the_one_order_of_utterances(sessions: Sessions, name: str, first: int) -> None:
    whole, parts = sessions.outcomes("one")[0]["read"], [outcome["read"] for outcome in sessions.outcomes(name)]
    for step in map(str, range(first, STEPS)):
        assert [code for part in parts for code in part[step]] == whole[step]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("stage", "precision", "optimizer"), EXACT)
def test_resume_is_bit_exact(sessions: Sessions, world: int, stage: int, precision: str, optimizer: str) -> None:
    name = f"exact-{world}-{stage}-{precision}-{optimizer}"
    for part in (name, f"{name}-resumed"):
        assert {outcome["error"] for outcome in sessions.outcomes(part)} == {None}
    assert "resumes from step-00000004" in sessions.outcomes(f"{name}-resumed")[0]["out"]
    assert sessions.rows(name) == sessions.rows(f"{name}-resumed")
    whole, resumed = sessions.tensors(name), sessions.tensors(f"{name}-resumed")
    assert any(key.startswith("extra/") for key in whole)
    assert any(key.startswith("exp_avg_sq/") for key in whole)
    assert any(key.startswith("momentum_buffer/") for key in whole) == (optimizer == "muon")
    assert_close(whole, resumed, 0.0)
    kept = sum(int((value != value.bfloat16()).sum()) for key, value in whole.items() if key.endswith("weight"))
    assert kept > 1000, "weights must be kept in fp32"


def test_only_the_first_rank_speaks(sessions: Sessions) -> None:
    for name in ("two-0", "two-3", "exact-2-1-bf16-adamw", "stopped"):
        first, second = sessions.outcomes(name)
        assert (second["out"], second["err"]) == ("", "")
        assert first["err"] == ""
        assert all(line.startswith(("model:", "data:", "validation:", "targets:", "engine:", "step ", "stopped by"))
                   for line in first["out"].splitlines()), first["out"]  # fmt: skip


def test_a_signal_to_one_rank_saves_and_stops_all(sessions: Sessions) -> None:
    outcomes = sessions.outcomes("stopped")
    assert [outcome["code"] for outcome in outcomes] == [75, 75]
    assert "stopped by a signal to another rank after step 6" in outcomes[0]["out"]
    assert (sessions.folder / "stopped" / "checkpoints" / "step-00000006").is_dir()
    assert_close(sessions.tensors("exact-2-1-fp32-adamw"), sessions.tensors("stopped-resumed"), 0.0)
    assert sessions.rows("exact-2-1-fp32-adamw") == sessions.rows("stopped-resumed")


@pytest.mark.parametrize(
    ("name", "says", "saved", "code"),
    [
        ("nan-0", "step 7: the loss is nan; lower optim.lr (now 0.003)", [4], 1),
        ("nan-2", "step 7: the loss is nan; lower optim.lr (now 0.003)", [4], 1),
        ("unreadable-0", "shard 00017: is gone; bring it back (rank 1); step", None, 1),
        ("away-0", "shard 00017: is gone; bring it back (rank 1); step", None, 70),
        ("full-1", "step-00000004: could not be written", [], 1),
    ],
)
def test_trouble_on_one_rank_stops_all_with_one_line(
    sessions: Sessions, name: str, says: str, saved: list[int] | None, code: int
) -> None:
    first, second = sessions.outcomes(name)
    assert says in first["error"]
    assert "\n" not in first["error"]
    assert (first["code"], second["code"], second["error"]) == (code, code, None)
    if saved is None:  # readers are ahead of the step by some: that one is saved at which the error was met
        step = int(first["error"].split("; step ")[1].removesuffix(" is saved"))
        saved = sorted({4, step} - {0})
        assert 4 <= step <= 6
    found = sorted(path.name for path in (sessions.folder / name / "checkpoints").iterdir())
    assert found == (["latest", *(f"step-{step:08d}" for step in saved)] if saved else [])


def test_the_rank_with_a_broken_device_reports_it(sessions: Sessions) -> None:
    first, second = sessions.outcomes("ecc-0")
    assert second["err"] == (
        "error: rank 1: the device failed: CUDA error: uncorrectable ECC error encountered; start again, on another"
        " device\n"
    )
    assert "another process of this run has ended" in first["error"]
    assert (first["code"], second["code"]) == (70, 70)


def test_the_rank_with_an_nccl_error_reports_it(sessions: Sessions) -> None:
    """All ranks are alive. "another process has ended" on each of them would hide the cause."""
    first, second = sessions.outcomes("nccl-0")
    assert "error: rank 1: exchanging data with the other ranks failed: NCCL error in: x.cpp:3," in second["err"]
    assert "Xid 94 on n7" in second["err"]
    assert len(second["err"].splitlines()) == 1
    assert "another process of this run has ended; its own output has the cause" in first["error"]
    assert (first["code"], second["code"]) == (70, 70)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
