"""Runs: s3prl trains and tests; results appear whole, finished ones are skipped, torn ones dropped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from codecssl.superb import results, tasks
from codecssl.superb import run as running
from codecssl.superb.expert import parse
from codecssl.superb.run import Machine, Run, configure, run_all, run_one

FEW = tasks.Budget(name="few", divisor=10**6, least=20, evaluations=2)


@pytest.fixture
def make(corpus: Path, tmp_path: Path) -> Any:
    def make(task: str = "ks", upstream: str = "fbank", **options: Any) -> Run:
        settings: dict[str, Any] = {
            "learning_rate": 1e-2,
            "budget": FEW,
            "seed": 0,
            "data": "tones",
            **options,
        }
        return Run(upstream=parse(upstream), task=task, root=corpus, output=tmp_path, **settings)

    return make


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_runs_and_its_row_is_complete(task: str, make: Any, model_folder: Path, loads_codec: Any) -> None:
    row = run_one(make(task, str(model_folder)), Machine())
    assert 0 <= row["value"] <= 1
    assert row["steps"] == 20
    assert row["utterances"] == {"train": 24, "valid": 12, "test": 12}
    assert len(row["layer_weights"]) == 3
    assert abs(sum(row["layer_weights"]) - 1) < 1e-3
    assert [step for step, _ in row["curves"]["valid-accuracy"]] == [10, 20]
    assert len(row["curves"]["train-loss"]) == 20
    assert row == json.loads(json.dumps(row))


def test_training_lowers_the_loss(make: Any) -> None:
    losses = run_one(make("sid", learning_rate=1e-2), Machine())["curves"]["train-loss"]
    assert losses[-1][1] < 0.9 * losses[0][1]


def test_the_value_is_s3prls_and_agrees_with_its_predictions(make: Any) -> None:
    import yaml

    run = make()
    row = run_one(run, Machine())
    said = yaml.safe_load((run.folder / "evaluate" / "valid_best" / "test" / "result.yaml").read_text())
    assert row["value"] == said["accuracy"]
    assert row["value"] * 12 == pytest.approx(round(row["value"] * 12))


def test_only_paths_steps_and_the_learning_rate_differ_from_s3prl(make: Any) -> None:
    """Heads, batch sizes, clipping, accumulation, optimiser, effects: as published."""
    run = make("er", learning_rate=0.5)
    ours, official = configure(run, Machine()), tasks.official_config(tasks.TASKS["er"])
    for key in (
        "build_downstream",
        "build_featurizer",
        "build_dataset",
        "build_model",
        "evaluate",
        "build_scheduler",
    ):
        assert ours[key] == official[key]
    batches = ours["build_batch_sampler"]
    assert {split: batches[split]["batch_size"] for split in batches} == {"train": 4, "valid": 4, "test": 4}
    assert ours["build_optimizer"] == {"name": "Adam", "conf": {"lr": 0.5}}
    changed = {key for key, value in official["train"].items() if ours["train"][key] != value}
    assert changed == {"total_steps", "eval_step", "save_step", "log_step"}


def test_a_full_run_is_s3prls_own_training(make: Any) -> None:
    ours = configure(make("ks", budget=tasks.BUDGETS["full"], learning_rate=None), Machine())
    official = tasks.official_config(tasks.TASKS["ks"])
    assert ours["train"] == {**official["train"], "seed": 0}
    assert ours["build_optimizer"] == official["build_optimizer"]


def test_the_same_run_gives_the_same_result_and_another_seed_another(make: Any, tmp_path: Path) -> None:
    def losses(run: Run) -> Any:
        return run_one(run, Machine())["curves"]["train-loss"]

    first, again = losses(make()), losses(replace(make(), output=tmp_path / "again"))
    uncached = run_one(replace(make(), output=tmp_path / "uncached"), Machine(feature_cache_gib=0))
    assert first == again
    assert first != losses(make(seed=1))
    for (_, a), (_, b) in zip(first, uncached["curves"]["train-loss"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_finished_runs_are_skipped_and_failures_do_not_stop_the_rest(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, calls = [make("ks"), make("er"), make("ic")], []

    def stand_in(run: Run, machine: Machine) -> Any:
        calls.append(run.task)
        run.folder.mkdir(parents=True, exist_ok=True)
        if run.task == "er" and len(calls) <= 3:
            raise RuntimeError("boom")
        results.write_json(run.folder / "result.json", {"task": run.task})
        return {"task": run.task}

    monkeypatch.setattr(running, "run_one", stand_in)
    failures = run_all(runs, Machine(), report=lambda run, outcome: None)
    assert list(failures) == [str(runs[1].folder)]
    assert "raise RuntimeError" in (runs[1].folder / "run.log").read_text()
    assert [row["task"] for row in results.read_rows(runs[0].output)] == ["ic", "ks"]
    assert run_all(runs, Machine(), report=lambda run, outcome: None) == {}
    assert calls == ["ks", "er", "ic", "er"]
    lines = (runs[0].output / "results.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["task"] for line in lines) == ["er", "ic", "ks"]


def test_another_setting_is_another_folder(make: Any, tmp_path: Path) -> None:
    base = make()
    others = [
        make("er"),
        make(learning_rate=1e-3),
        make(seed=1),
        make(upstream="codes"),
        make(data="x"),
        make(budget=tasks.BUDGETS["quick"]),
    ]
    assert len({run.folder for run in [base, *others]}) == 7
    assert make().folder == base.folder


def test_a_changed_model_is_another_run(make: Any, model_folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    before = make(upstream=str(copy)).folder
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert make(upstream=str(copy)).folder != before


@pytest.mark.parametrize("torn", ["", "step_20/model/state_dict.pt", "valid_best/task/state.pt", "step_20/config.yaml"])
def test_a_run_killed_while_saving_goes_on(torn: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint cut short is dropped, and the run ends like one that was never killed."""
    run = make()
    whole = run_one(replace(run, output=run.output / "whole"), Machine())
    with monkeypatch.context() as patch:
        patch.delattr(running, "outcome")
        with pytest.raises(NameError):
            run_one(run, Machine())
    assert not run.finished
    if torn:
        path = run.folder / "train" / torn
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if path.suffix == ".pt" else b"")
    row = run_one(run, Machine())
    assert run.finished
    assert row["curves"]["train-loss"][-1][0] == 20
    if torn in ("", "valid_best/task/state.pt"):  # nothing was lost, or all was and the run started over
        assert (row["value"], row["valid"]) == (whole["value"], whole["valid"])
    assert not list((run.folder / "train").glob("step_*"))


def test_two_processes_give_what_one_gives(make: Any) -> None:
    runs = [make("er"), make("er", seed=1)]
    alone = [run_one(replace(run, output=run.output / "alone"), Machine(threads=1)) for run in runs]
    outcomes: dict[int, Any] = {}
    assert run_all(runs, Machine(threads=1), jobs=2, report=lambda run, row: outcomes.update({run.seed: row})) == {}
    assert [outcomes[seed]["curves"] for seed in (0, 1)] == [row["curves"] for row in alone]
    assert len(results.read_rows(runs[0].output, "runs")) == 2
