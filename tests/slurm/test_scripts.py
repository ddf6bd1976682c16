"""The batch scripts as files: clean, documented, dry, and packaged; what they do is tested on a real Slurm."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from codecssl.slurm import scripts

SLURM = Path(__file__).resolve().parents[2] / "slurm"
SCRIPTS = sorted(path.name for path in SLURM.glob("*.sbatch"))


def bash(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "CODECSSL_"))}
    command = ["bash", str(SLURM / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=120)


def dry(script: str, *arguments: str, cwd: Path, **environment: str) -> list[list[str]]:
    """The commands that --dry-run prints, as words."""
    done = bash(script, "--dry-run", *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stderr.splitlines() if line.startswith("sbatch ")]


def test_shellcheck_passes():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    files = [*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")]
    done = subprocess.run(["shellcheck", "-x", *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(files) >= 9


@pytest.mark.parametrize("script", [*SCRIPTS, "pipeline.sh"])
def test_help_is_the_comment_at_the_top(script, tmp_path):
    done = bash(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"bash slurm/{script} [--dry-run]" in done.stdout
    assert "set -euo" not in done.stdout
    assert "#SBATCH" not in done.stdout


def test_scripts_submitted_by_sbatch_itself_warn_as_early_as_site_sh():
    seconds = re.search(r"CODECSSL_WARN_SECONDS:=(\d+)", (SLURM / "site.sh").read_text())[1]
    found = {name: re.findall(r"^#SBATCH --signal=(.*)$", (SLURM / name).read_text(), re.M) for name in SCRIPTS}
    warned = {name: lines for name, lines in found.items() if name != "export.sbatch"}  # an export takes seconds
    assert set(map(tuple, warned.values())) == {(f"B:USR2@{seconds}",)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_settings_of_the_site_reach_sbatch_and_nothing_is_submitted(script, tmp_path):
    site = {"CODECSSL_PARTITION": "short", "CODECSSL_GPU_PARTITION": "h100", "CODECSSL_ACCOUNT": "me",
            "CODECSSL_QOS": "low", "CODECSSL_SBATCH": "--mem=0 --exclude=n3", "CODECSSL_TASK_GPUS": "1",
            "CODECSSL_GPUS": "4", "CODECSSL_WARN_SECONDS": "77", "CODECSSL_TIME": "1:00:00"}  # fmt: skip
    [*_, last] = dry(script, "x", "--output", "y", "--after", "5:6", cwd=tmp_path, **site)
    expected = {"--account=me", "--qos=low", "--mem=0", "--exclude=n3", "--signal=B:USR2@77", "--time=1:00:00",
                "--requeue", "--open-mode=append"}  # fmt: skip
    assert expected <= set(last)
    on_gpus = {"pretrain.sbatch": "4", "export.sbatch": None}.get(script, "1")
    assert ("--partition=h100" in last, f"--gpus-per-node={on_gpus}" in last) == (bool(on_gpus), bool(on_gpus))
    assert not list(tmp_path.iterdir()), "--dry-run must create nothing, no folder of logs either"


def test_pretrain_asks_for_a_process_per_gpu_on_each_node(tmp_path):
    run = ("codec2vec_base_codes", "--data", "a b", "c", "--output", "run", "--optim.lr", "1e-3")
    [words] = dry("pretrain.sbatch", "--nodes", "4", "--gpus", "8", *run, cwd=tmp_path)
    assert {"--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8"} <= set(words)
    assert words[-len(run):] == list(run)  # fmt: skip
    [words] = dry("pretrain.sbatch", "--gpus", "0", *run, cwd=tmp_path)
    assert "--ntasks-per-node=1" in words
    assert not [word for word in words if word.startswith("--gpus")]


def test_an_array_beyond_the_clusters_limit_folds_several_tasks_into_an_element(tmp_path):
    """1,001 is Slurm's default MaxArraySize, used if the cluster reports no other."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")  # the real one looks for a cluster for a minute
    (tmp_path / "scontrol").chmod(0o755)
    array, finish = dry("tokenize.sbatch", "audio", "-o", "shards", "--tasks", "2500", "--throttle", "50",
                        cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")  # fmt: skip
    assert "--array=0-1000%50" in array
    assert array[array.index("--elements") + 1] == "1001"
    covered = sorted(task for element in range(1001) for task in range(element, 2500, 1001))
    assert covered == list(range(2500)), "the elements must cover each task once"
    assert "--finish" in finish
    assert "--dependency=afterany:JOB-OF-codecssl-tokenize" in finish


def test_superb_has_an_element_for_each_task_and_rate(tmp_path):
    arguments = ("--upstream", "m", "--data", "sample", "--output", "out", "--tasks", "ks,sid,er", "--lr", "1e-2,1e-3")
    array, report = dry("superb.sbatch", *arguments, cwd=tmp_path)
    assert "--array=0-5" in array
    assert array[array.index("--parts") + 1] == "6"
    assert "--dependency=afterany:JOB-OF-codecssl-superb" in report
    assert "--parts" not in report, "the last job must do the remaining work"
    assert "--array=0-19%4" in dry("superb.sbatch", *arguments, "--parts", "20", "--throttle", "4", cwd=tmp_path)[0]


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("tokenize.sbatch", ["audio"], "--output: not given"),
        ("pretrain.sbatch", ["codec2vec_base_codes", "--data", "x"], "--output: not given"),
        ("label.sbatch", ["latents"], "--output: not given"),
        ("superb.sbatch", ["--output", "x", "--after"], "--after: has no value"),
        ("pipeline.sh", ["nowhere.sh"], "nowhere.sh: no such file"),
    ],
)
def test_user_errors_are_one_line(script, arguments, says, tmp_path):
    done = bash(script, *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def settings(folder: Path, **changes: str) -> Path:
    values = {"WORK": str(folder / "work"), "SOURCES": "audio", "TOKENIZE": "--tasks 4 --codec tiny_16khz",
              "PRETRAIN": "--nodes 2 codec2vec_base_codes", "ROUNDS": "2", "LABEL": "--layer 6 --clusters 500",
              "PRETRAIN_LABELS": "codec2vec_base_labels", "SUPERB": "--tasks ks,sid --data sample"}  # fmt: skip
    path = folder / "settings.sh"
    path.write_text("".join(f"{key}={shlex.quote(value)}\n" for key, value in (values | changes).items()))
    return path


def test_each_job_of_the_pipeline_waits_for_the_previous_one(tmp_path):
    words = dry("pipeline.sh", str(settings(tmp_path)), cwd=tmp_path)
    names = [next(w.partition("=")[2] for w in line if w.startswith("--job-name=")) for line in words]
    stages = [name.split("-", 2)[2] for name in names]
    assert stages == ["shards", "shards-finish", "run-0", "labels-1", "run-1", "labels-2", "run-2", "model", "superb",
                      "superb-report"]  # fmt: skip
    waits = [next((w.partition("=")[2] for w in line if w.startswith("--dependency=")), "") for line in words]
    assert ["--nodes=2" in line for line in words] == [stage == "run-0" for stage in stages], (
        "only run-0 must have the options of PRETRAIN"
    )
    jobs = [f"JOB-OF-{name}" for name in names]
    assert waits[:2] == ["", f"afterany:{jobs[0]}"]
    assert waits[2:9] == [f"afterok:{job}" for job in jobs[1:8]]
    assert waits[9] == f"afterok:{jobs[7]},afterany:{jobs[8]}", "without a model there must be no report"
    assert f"--data.labels=['{tmp_path}/work/labels-2']" in words[6]
    assert not (tmp_path / "work").exists()


def test_the_pipeline_skips_finished_stages_and_refuses_other_settings(tmp_path):
    done = tmp_path / "work" / "done"
    done.mkdir(parents=True)
    for stage in ("shards", "run-0", "labels-1"):
        (done / stage).touch()
    words = dry("pipeline.sh", str(settings(tmp_path)), cwd=tmp_path)
    assert "run-1" in next(w for w in words[0] if w.startswith("--job-name="))
    assert not [w for w in words[0] if w.startswith("--dependency")]
    (done / "run-0.settings").write_text("pretrain.sbatch something else")
    refused = bash("pipeline.sh", "--dry-run", str(settings(tmp_path)), cwd=tmp_path)
    assert refused.returncode == 1
    assert "stage run-0 was begun with 'pretrain.sbatch something else'" in refused.stderr


def test_the_pipeline_names_the_setting_that_is_missing(tmp_path):
    done = bash("pipeline.sh", str(settings(tmp_path, PRETRAIN="")), cwd=tmp_path)
    assert (done.returncode, "does not set PRETRAIN" in done.stderr) == (2, True)
    done = bash("pipeline.sh", str(settings(tmp_path, PRETRAIN_LABELS="")), cwd=tmp_path)
    assert (done.returncode, "ROUNDS is 2, but PRETRAIN_LABELS is not set" in done.stderr) == (2, True)


def test_a_copy_of_the_scripts_works_and_keeps_the_sites_settings(tmp_path, capsys):
    assert scripts.main([str(tmp_path / "mine")]) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {path.name for path in scripts.scripts()}
    (tmp_path / "mine/site.sh").write_text((SLURM / "site.sh").read_text() + "CODECSSL_ACCOUNT=ours\n")
    (tmp_path / "mine/label.sbatch").write_text("old")
    assert scripts.main([str(tmp_path / "mine")]) == 0
    done = subprocess.run(
        ["bash", str(tmp_path / "mine/label.sbatch"), "--dry-run", "latents", "--output", "x"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--account=ours" in done.stderr
    capsys.readouterr()
    assert scripts.main([]) == 0
    assert capsys.readouterr().out == f"{SLURM}\n"
    (tmp_path / "file").touch()
    assert scripts.main([str(tmp_path / "file")]) == 1
    assert "the scripts cannot be copied there" in capsys.readouterr().err
