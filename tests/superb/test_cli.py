"""The commands: exit codes, one line for an error, and a whole run from corpus to report."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from codecssl.superb import results, tasks
from codecssl.superb.cli import main
from codecssl.superb.corpora.corpus import TaskCorpus


def test_run_then_report(
    corpus: Path,
    model_folder: Path,
    loads_codec: Any,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = tasks.Budget(name="smoke", divisor=10**6, least=8, evaluations=2, learning_rates=(1e-2, 1e-3))
    monkeypatch.setitem(tasks.BUDGETS, "smoke", few)
    monkeypatch.setenv("COLUMNS", "200")
    command = [
        "run",
        "--upstream",
        str(model_folder),
        "--upstream",
        "fbank",
        "--upstream",
        "codes",
        "--tasks",
        "ks,ic",
    ]
    command += [
        "--data",
        str(corpus),
        "--output",
        str(tmp_path / "out"),
        "--budget",
        "smoke",
        "--lr",
        "1e-2,1e-3",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "12 runs, 0 finished before" in said
    assert "Not SUPERB: smoke budget" in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{model_folder.name} − codes" in page
    assert main(command) == 0
    assert "12 runs, 12 finished before" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").read_text() == page


def test_a_failed_run_is_exit_1_and_one_line(corpus: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from codecssl.superb.runner import jobs

    def fails(run: Any, machine: Any) -> None:
        run.folder.mkdir(parents=True)
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(jobs.one, "run_one", fails)
    command = [
        "run",
        "--upstream",
        "fbank",
        "--tasks",
        "ks",
        "--data",
        str(corpus),
        "--output",
        str(tmp_path),
        "--lr",
        "1e-2",
    ]
    assert main(command) == 1
    assert capsys.readouterr().err == "error: 1 of 1 runs failed, the first with: RuntimeError: no memory\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["run", "--upstream", "nope", "--data", "CORPUS", "--output", "OUT"],
            "error: upstream nope: not known",
        ),
        (["run", "--upstream", "fbank", "--data", "OUT", "--output", "OUT"], "no manifest.jsonl in it"),
        (
            ["run", "--upstream", "fbank", "--tasks", "xx", "--data", "CORPUS", "--output", "OUT"],
            "error: task xx: not known",
        ),
        (["report", "OUT"], "no finished run"),
        (["probe", "--upstream", "fbank", "--data", "OUT", "--output", "OUT"], "no dataset.json"),
    ],
)
def test_user_errors_are_one_line(
    arguments: list[str], message: str, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    places = {"CORPUS": str(corpus), "OUT": str(tmp_path)}
    assert main([places.get(argument, argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_output_that_is_a_file_is_a_one_line_error(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out").write_text("")
    command = ["run", "--upstream", "fbank", "--tasks", "ks", "--data", str(corpus), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/out/runs/fbank/ks")
    assert error.endswith(": Not a directory; make it usable, or give another path\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["run"], "required: --upstream"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["run", "--lr", "x"], "--lr: x: must be learning rates between 0 and 10"),
        (["run", "--lr", "20"], "--lr: 20: must be learning rates between 0 and 10"),
        (["run", "--seeds", "0,b"], "--seeds: 0,b: must be whole numbers"),
        (["run", "--budget", "tiny"], "--budget: invalid choice: 'tiny'"),
        (["probe", "--jobs", "0"], "--jobs: 0: must be at least 1"),
        (["probe", "--jobs", "two"], "--jobs: invalid int value: 'two'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_tasks_lists_them(capsys: Any) -> None:
    assert main(["tasks"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in [*tasks.TASKS, *tasks.BUDGETS])


def test_help_is_quick() -> None:
    """Nothing heavy is imported before the arguments are parsed."""
    code = "import sys\ntry:\n from codecssl.superb.cli import main; main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 's3prl', 'transformers', 'numpy', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "codecssl.superb", "tasks"], capture_output=True, text=True, check=True
    )
    assert "SuperbKS" in done.stdout


def test_sample_unpacks_the_shipped_corpus(tmp_path: Path, capsys: Any) -> None:
    """Every task must find its splits in the corpus."""
    assert main(["sample", str(tmp_path / "sample")]) == 0
    found = TaskCorpus(tmp_path / "sample")
    least = {"sd": 6, "sf": 32, "env": 32}
    for task in tasks.TASKS.values():
        assert all(len(examples) >= least.get(task.name, 40) for examples in found.examples(task).values())


def test_a_dry_run_lists_and_does_nothing(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["run", "--upstream", "fbank", "--data", str(corpus), "--output", str(tmp_path / "out"), "--dry-run"]
    assert main([*command, "--tasks", "ks,qbe,er", "--lr", "0.1", "--seeds", "0,1", "--folds"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "13 runs, 0 finished before; 1 at a time"
    assert len(said) == 14
    assert all(line.startswith("waiting  fbank  ") for line in said[1:])
    assert "fbank  er  lr 0.1  seed 1  fold 5" in said[-1]
    assert main([*command, "--tasks", "ks", "--lr", "0.1,0.2,0.3", "--parts", "2", "--part", "1"]) == 0
    assert capsys.readouterr().out.startswith("1 runs, 0 finished before")
    shared = [*command, "--tasks", "ks", "--lr", "0.1,0.2,0.3,0.4,0.5"]
    assert main([*shared, "--tasks", "2", "--task", "1"]) == 0
    assert [line.split("lr ")[1][:3] for line in capsys.readouterr().out.splitlines()[1:]] == ["0.2", "0.4"]
    assert not (tmp_path / "out").exists()


def test_sample_and_report_into_a_closed_pipe_are_silent(tmp_path: Path) -> None:
    budget = {key: value for key, value in vars(tasks.BUDGETS["smoke"]).items() if key != "learning_rates"}
    row: dict[str, Any] = {
        "upstream": {"name": "fbank", "kind": "fbank", "argument": None, "sha256": None}, "manifest_sha256": "0",
        "data": "x", "task": "ks", "budget": budget, "seed": 0, "value": 0.5, "valid": 0.5, "best_step": 5,
        "layer_weights": None, "curves": {}, "values": {"accuracy": 0.5}, "metric": "accuracy", "chance": 0.1,
        "utterances": {"train": 6, "valid": 2, "test": 4}, "learning_rate": 1e-2, "steps": 5, "batch": 32,
        "official_steps": 200_000, "versions": {"s3prl": "0.4.18", "torch": "2.9.1"}, "seconds": 3.0,
    }  # fmt: skip
    results.write_json(tmp_path / "out" / "runs" / "fbank" / "ks" / "0" / "result.json", row)
    for words in (["sample", str(tmp_path / "sample")], ["report", str(tmp_path / "out")]):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "codecssl.superb", *words]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
        os.close(write)
        assert done.stderr == b"", words
    assert (tmp_path / "sample" / "manifest.jsonl").exists()
    assert (tmp_path / "out" / "report.html").exists()


def test_a_signal_to_the_group_of_a_sweep_prints_one_line(corpus: Path, tmp_path: Path) -> None:
    """Two workers train; a batch system sends USR2 to every process of the job."""
    words = ["run", "--upstream", "fbank", "--tasks", "ks,ic", "--data", str(corpus), "--output", str(tmp_path)]
    command = [sys.executable, "-m", "codecssl.superb", *words, "--budget", "quick", "--lr", "1e-3", "--jobs", "2"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("runs/*/*/*/run.log"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGUSR2)
        _, errors = process.communicate(timeout=60)
    assert errors == "error: stopped by SIGUSR2; the same command skips finished runs and resumes this one\n"
    assert process.returncode == 75
