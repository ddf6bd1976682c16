"""Signals, crashes and hangs in a batch script. A substitute for scontrol records the requeues; no Slurm is needed."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).resolve().parents[2] / "slurm"


class SlurmJob:
    """A batch script as Slurm starts it; its Python is a shell script of the test."""

    def __init__(self, folder: Path, script: str = "pretrain.sbatch", *arguments: str) -> None:
        self.folder = folder
        self.arguments = arguments or ("--done", "done/run", "tiny", "--data", "shards", "--output", "run")
        tools = folder / "bin"
        tools.mkdir()
        (folder / "slurm_script").write_bytes((SLURM / script).read_bytes())
        # the real one kills the batch script too, once the job is back in the queue
        self._tool("scontrol", 'echo "$@" >>requeued; kill $PPID')
        self._tool("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
        self.environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CODECSSL_SLURM": str(SLURM),
            "CODECSSL_PYTHON": str(tools / "python"),
            "CODECSSL_RETRIES": "2",
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NUM_NODES": "1",
        }

    def _tool(self, name: str, code: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{code}\n")
        path.chmod(0o755)

    def start(self, program: str) -> subprocess.Popen[str]:
        self._tool("python", program)
        command = ["bash", "slurm_script", *self.arguments]
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, program: str) -> tuple[int, str]:
        """Exit code and output of the script."""
        process = self.start(program)
        printed, _ = process.communicate(timeout=60)
        return process.returncode, printed

    @property
    def requeues(self) -> int:
        path = self.folder / "requeued"
        rows = path.read_text().splitlines() if path.exists() else []
        assert set(rows) <= {"requeue 17"}
        return len(rows)


@pytest.fixture
def job(tmp_path: Path) -> SlurmJob:
    return SlurmJob(tmp_path)


def test_a_finished_job_is_not_requeued(job):
    assert job.run('echo "$@" >arguments')[0] == 0
    assert (job.folder / "arguments").read_text() == "-m codecssl.pretrain run tiny --data shards --output run\n"
    assert (job.folder / "done/run").exists()
    assert job.requeues == 0


@pytest.mark.parametrize("code", [1, 2])
def test_a_mistake_is_not_tried_again(job, code):
    assert job.run(f"exit {code}")[0] == code
    assert job.requeues == 0
    assert not (job.folder / "done/run").exists()


def test_a_run_that_was_stopped_goes_back_as_often_as_it_takes(job):
    save = 'mkdir -p run/checkpoints; ln -sfn "step-$(date +%N)" run/checkpoints/latest; exit 75'
    for turn in range(1, 6):
        assert "goes back into the queue" in job.run(save)[1]
        assert job.requeues == turn


def test_a_run_stopped_before_its_first_step_is_not_requeued_for_ever(job):
    """An example is a time limit below the warning time."""
    for turn in (1, 2):
        assert f"after a signal, stop {turn} without progress" in job.run("exit 75")[1]
    code, printed = job.run("exit 75")
    assert "after a signal, stop 3 without progress; not tried again" in printed
    assert (code, job.requeues) == (75, 2)


@pytest.mark.parametrize("crash", ["exit 76", "exit 70", "kill -9 $$"])
def test_crashes_and_hangs_without_progress_have_a_limit_of_retries(job, crash):
    for turn in (1, 2):
        assert f"crash {turn} without progress" in job.run(crash)[1]
        assert job.requeues == turn
    code, printed = job.run(crash)
    assert code == {"exit 76": 76, "exit 70": 70}.get(crash, 137)
    assert "crash 3 without progress; not tried again" in printed
    assert job.requeues == 2


def test_a_new_checkpoint_counts_as_progress(job):
    crash = 'mkdir -p run/checkpoints; ln -sfn "step-$(date +%N)" run/checkpoints/latest; exit 76'
    for turn in range(1, 6):
        assert "crash 1 without progress" in job.run(crash)[1]
        assert job.requeues == turn


def test_only_own_blocks_are_progress_of_an_array_element(tmp_path):
    """With 8 tasks in 4 elements, element 1 has tasks 1 and 5: shards 1, 5, 9, 13, ..."""
    job = SlurmJob(tmp_path, "tokenize.sbatch", "--tasks", "8", "--elements", "4", "audio", "--output", "out")
    job.environment["SLURM_ARRAY_TASK_ID"] = "1"
    write = "mkdir -p out/shards out/work/{0}; touch out/work/{0}/{1}.json; exit 76"
    for number, count in (("00013", 1), ("00005", 1), ("00006", 2), ("00001", 1)):
        printed = job.run(write.format(number, f"{count:05d}"))[1]
        assert f"crash {count} without progress" in printed, number
    assert "crash 1 without progress" in job.run("rm -r out/work; touch out/shards/00005.json; exit 76")[1]


WAITS = 'trap "{trap}" USR2 TERM; touch ready; for i in $(seq 300); do sleep 0.1 & wait; done'


def signalled(job: SlurmJob, program: str, number: signal.Signals) -> tuple[int, str]:
    process = job.start(program)
    deadline = time.monotonic() + 30
    while not (job.folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)  # to the batch script alone, as --signal=B: does
    printed, _ = process.communicate(timeout=60)
    return process.returncode, printed


def test_a_warning_reaches_the_program_which_may_take_its_time(job):
    printed = signalled(job, WAITS.format(trap="sleep 1; touch saved; exit 75"), signal.SIGUSR2)[1]
    assert (job.folder / "saved").exists(), "the script must wait for the program"
    assert "exit code 75 after USR2, stop 1" in printed
    assert job.requeues == 1


def test_a_warning_before_the_program_listens_is_not_a_requeue_for_ever(job):
    for turn in (1, 2):
        printed = signalled(job, "touch ready; exec sleep 30", signal.SIGUSR2)[1]
        assert f"exit code 140 after USR2, stop {turn} without progress" in printed
        (job.folder / "ready").unlink()
    code, printed = signalled(job, "touch ready; exec sleep 30", signal.SIGUSR2)
    assert "3 without progress; not tried again" in printed
    assert (code, job.requeues) == (140, 2)


def test_checkpoints_of_s3prl_count_as_progress(tmp_path):
    arguments = ("--upstream", "m", "--tasks", "ks", "--data", "d", "--output", "out")
    job = SlurmJob(tmp_path, "superb.sbatch", *arguments)
    for turn in (1, 2):
        assert f"crash {turn} without progress" in job.run("exit 70")[1]
    train = "mkdir -p out/runs/m/ks/r/train/step_3; touch out/runs/m/ks/r/train/step_3/optimizer.pt; exit 70"
    assert "crash 1 without progress" in job.run(train)[1]
    assert "crash 2 without progress" in job.run("exit 70")[1]
    assert "crash 1 without progress" in job.run("touch out/runs/m/ks/r/result.json; exit 70")[1]


def test_a_warning_between_two_programs_is_not_lost(job):
    """This happens while shards are copied: the first program does not start, and the job is requeued."""
    job.environment["CODECSSL_SETUP"] = "kill -USR2 $$; touch ready; sleep 0.5"
    code, printed = job.run("touch started")
    assert "warned before the next start" in printed
    assert (code, job.requeues, (job.folder / "started").exists()) == (-signal.SIGTERM, 1, False)


def test_a_job_that_finishes_after_a_warning_is_done(job):
    assert signalled(job, WAITS.format(trap="exit 0"), signal.SIGUSR2)[0] == 0
    assert (job.folder / "done/run").exists()
    assert job.requeues == 0


def test_a_cancelled_job_saves_and_does_not_come_back(job):
    code, printed = signalled(job, WAITS.format(trap="touch saved; exit 75"), signal.SIGTERM)
    assert (code, job.requeues) == (75, 0)
    assert "ended by Slurm or scancel" in printed
    assert (job.folder / "saved").exists()


def test_without_requeueing_the_log_names_the_remedy(job):
    job._tool("scontrol", "exit 1")
    code, printed = job.run("exit 75")
    assert code == 75
    assert "job 17 cannot be requeued; submit it again to continue" in printed


def test_shards_are_copied_to_the_disk_of_the_node_once(job):
    for name in ("a", "b"):
        (job.folder / name / "shards").mkdir(parents=True)
        (job.folder / name / "dataset.json").write_text(name)
        (job.folder / name / "shards/00000.tar").write_text(f"codes of {name}")
    job.environment["CODECSSL_SCRATCH"] = str(job.folder / "local disk")
    job._tool("python", 'printf "%s\\n" "$@" >arguments')
    command = ["bash", "slurm_script", "tiny", "--data", "a", "b", "--output", "run", "--data.workers", "3"]
    for _ in range(2):
        subprocess.run(command, cwd=job.folder, env=job.environment, check=True)
        words = (job.folder / "arguments").read_text().splitlines()[3:]
        assert (words[0], words[1], *words[4:]) == ("tiny", "--data", "--output", "run", "--data.workers", "3")
        for name, copy in zip("ab", words[2:4], strict=True):
            assert Path(copy).parent == job.folder / "local disk"
            assert (Path(copy) / "shards/00000.tar").read_text() == f"codes of {name}"
        (Path(words[2]) / "shards/00000.tar").touch()
    assert len(list((job.folder / "local disk").iterdir())) == 2, "there must be one complete copy"
