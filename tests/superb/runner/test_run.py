"""Runs: s3prl trains and tests; results appear whole, finished runs are skipped, truncated checkpoints dropped."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from codecssl.superb import results, tasks
from codecssl.superb.corpora.corpus import TaskCorpus
from codecssl.superb.runner import jobs
from codecssl.superb.runner import run as running
from codecssl.superb.runner.jobs import run_all
from codecssl.superb.runner.qbe import mtwv, searches
from codecssl.superb.runner.run import Machine, Run, configure, run_one
from codecssl.superb.upstreams.names import parse
from codecssl.tokenize.common import files
from codecssl.tokenize.common.errors import UserError

FEW = tasks.Budget(name="few", divisor=10**6, least=20, evaluations=2)
TWO = tasks.Budget(name="two", divisor=10**6, least=2, evaluations=1)
POOLED = ("ks", "sid", "er", "ic", "pitch")


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


@pytest.fixture
def small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrent heads with 16 units: what runs is the same, in seconds."""
    official = tasks.official_config

    def small(task: tasks.Task) -> dict[str, Any]:
        config = official(task)
        if task.name in ("asr", "sf"):
            config["build_downstream"]["model_conf"] |= {"proj_size": 16, "hidden_size": [16, 16]}
        return config

    monkeypatch.setattr(running, "official_config", small)


def predicted(run: Run, name: str) -> list[str]:
    return (run.folder / "predict" / name).read_text().splitlines()


@pytest.fixture
def truth(corpus: Path) -> dict[str, Any]:
    """A file's row of the manifest by its stem."""
    rows = map(json.loads, (corpus / "manifest.jsonl").read_text().splitlines())
    return {Path(row["path"]).stem: row for row in rows}


@pytest.mark.parametrize("task", POOLED)
def test_every_pooled_task_runs_and_its_row_is_complete(
    task: str, make: Any, model_folder: Path, loads_codec: Any, tmp_path: Path
) -> None:
    row = run_one(make(task, str(model_folder)), Machine())
    assert 0 <= row["value"] <= 1
    assert row["values"] == {"accuracy": row["value"]}
    assert row["steps"] == 20
    assert row["utterances"] == {"train": 24, "valid": 12, "test": 12}
    assert row["skipped"] == {}
    assert row["codec"]["name"] == loads_codec.card.name
    assert len(row["layer_weights"]) == 3
    assert abs(sum(row["layer_weights"]) - 1) < 1e-3
    assert [step for step, _ in row["curves"]["valid-accuracy"]] == [10, 20]
    assert len(row["curves"]["train-loss"]) == 20
    assert row == json.loads(json.dumps(row))
    assert (tmp_path / row["folder"] / "result.json").is_file()


@pytest.mark.parametrize(
    ("task", "metrics", "counts"),
    [
        ("pr", {"per"}, {"train": 6, "valid": 3, "test": 3}),
        ("asr", {"wer"}, {"train": 6, "valid": 3, "test": 3}),
        ("sf", {"slot_type_f1", "slot_value_cer"}, {"train": 6, "valid": 3, "test": 3}),
        ("sd", {"der"}, {"train": 2, "valid": 1, "test": 1}),
    ],
)
def test_every_sequence_task_runs(
    task: str,
    metrics: set[str],
    counts: Any,
    make: Any,
    model_folder: Path,
    loads_codec: Any,
    small_heads: None,
    truth: dict[str, Any],
) -> None:
    if task == "sd":
        pytest.importorskip("pyannote.metrics", reason="pyannote.metrics is not installed")
    run = make(task, str(model_folder), budget=TWO)
    row = run_one(run, Machine())
    assert set(row["values"]) == metrics
    assert row["value"] == row["values"][tasks.TASKS[task].metric] >= 0
    assert row["valid"] is not None
    assert row["utterances"] == counts
    assert [step for step, _ in row["curves"][f"valid-{tasks.TASKS[task].metric}"]] == [2]
    assert not list(run.folder.rglob("optimizer.pt"))
    if task == "sd":
        assert row["values"]["der"] <= 3
        assert row["chosen"]["median_filter"] in (1, 11)
        _check_probabilities(run)
    if task == "pr":
        from s3prl.metric import per

        heard = [line.partition(" ") for line in predicted(run, "pr_public/predict.ark")]
        references = [" ".join(truth[name]["phones"]) for name, _, _ in heard]
        assert row["value"] == pytest.approx(per([text for _, _, text in heard], references))


def _check_probabilities(run: Run) -> None:
    """Check the activity of two speakers in each 20 ms of the tested recording of 2.3 s."""
    import h5py

    (path,) = (run.folder / "predict" / "sd_public" / "scoring" / "predictions").iterdir()
    assert path.name == "two3.wav.h5"
    with h5py.File(path) as file:
        shares = file["T_hat"][:]
    assert shares.shape == (115, 2)
    assert 0 <= shares.min() < shares.max() <= 1
    assert predicted(run, "sd_public/frame_shift") == ["320"]


def test_verification_tests_every_checkpoint_and_takes_the_best(
    make: Any, model_folder: Path, loads_codec: Any
) -> None:
    run = make("asv", str(model_folder), budget=replace(TWO, evaluations=2))
    row = run_one(run, Machine())
    scanned = row["chosen"]["checkpoints"]
    assert set(scanned) == {"1", "2"}
    assert row["values"] == {"eer": row["value"]}
    assert row["value"] == pytest.approx(min(scanned.values()), abs=1e-5)
    assert scanned[str(row["best_step"])] == min(scanned.values())
    assert row["valid"] is None
    assert row["utterances"] == {"train": 6, "test": 6}
    from s3prl.metric import compute_eer

    trials = list(csv.DictReader((run.folder / "test_trial.csv").open()))
    told = [line.rsplit(" ", 1) for line in predicted(run, "sv_public/predict.txt")]
    name = "-".join(Path(trials[0]["wav_path1"]).parts[-3:]).split(".")[0]
    assert told[0][0].startswith(f"{name}_")
    eer, _ = compute_eer([int(trial["label"]) for trial in trials], [float(score) for _, score in told])
    assert eer == pytest.approx(row["value"])
    assert not list(run.folder.rglob("answers.json"))  # those of the other checkpoints would be megabytes


def test_search_trains_nothing_and_chooses_a_layer(
    make: Any, model_folder: Path, loads_codec: Any, corpus: Path
) -> None:
    run = make("qbe", str(model_folder), learning_rate=None)
    row = run_one(run, Machine())
    assert row["steps"] == 0
    assert len(row["chosen"]["valid_by_layer"]) == 3
    assert row["chosen"]["valid_by_layer"][row["chosen"]["layer"]] == pytest.approx(row["valid"], abs=1e-5)
    assert not (run.folder / "train").exists()
    root = ElementTree.fromstring("\n".join(predicted(run, "qbe_public/benchmark.stdlist.xml")))
    told = np.array([[float(term.get("score", "")) for term in terms] for terms in root])
    found = searches(TaskCorpus(corpus).examples(tasks.TASKS["qbe"]))["test"].truth
    assert mtwv(told, found)[0] == pytest.approx(row["value"])


def test_recognition_with_a_language_model(
    make: Any, tmp_path: Path, small_heads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figure is the word error rate of the decoder's output, here always the same word."""
    from codecssl.superb.runner import lm_decoding

    (tmp_path / "lm.arpa").write_text("")
    monkeypatch.setattr(lm_decoding, "check_decoder", lambda: None)
    monkeypatch.setattr(lm_decoding, "make_decoder", lambda *arguments: None)
    monkeypatch.setattr(lm_decoding, "decode", lambda *arguments: "low")
    run = make("asr", budget=TWO, language_model=tmp_path / "lm.arpa")
    row = run_one(run, Machine())
    references = (run.folder / "evaluate" / "valid_best" / "test" / "ref").read_text().splitlines()
    words = [line.split()[1:] for line in references]
    assert row["values"]["wer_lm"] == pytest.approx(sum(3 - ("low" in line) for line in words) / 9)
    assert predicted(run, "asr_lm_public/predict.ark") == [f"{name} low" for name in ("long09", "long10", "long11")]
    assert run.folder != make("asr", budget=TWO).folder


def test_the_decoder_outputs_only_words_of_the_language_model(make: Any, tmp_path: Path, small_heads: None) -> None:
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    pytest.importorskip("kenlm", reason="kenlm is not installed")
    words = {"<unk>": -2, "<s>": -1, "</s>": -1, "low": -1, "mid": -1, "high": -1}
    counts = ["\\data\\", f"ngram 1={len(words)}", "ngram 2=1", ""]
    grams = ["\\1-grams:", *(f"{p}\t{word}\t0" for word, p in words.items()), "", "\\2-grams:", "-1\tlow mid", ""]
    (tmp_path / "lm.arpa").write_text("\n".join([*counts, *grams, "\\end\\", ""]))
    run = make("asr", budget=TWO, language_model=tmp_path / "lm.arpa")
    row = run_one(run, Machine())
    heard = [line.split()[1:] for line in (run.folder / "evaluate/valid_best/test/hyp_lm").read_text().splitlines()]
    assert len(heard) == 3
    assert {word for line in heard for word in line} <= {"low", "mid", "high"}
    assert row["values"]["wer_lm"] >= 0


def test_a_fold_tests_its_rows(make: Any) -> None:
    row = run_one(make("er", fold=2, budget=TWO), Machine())
    assert row["fold"] == 2
    assert row["utterances"] == {"train": 30, "valid": 8, "test": 10}


def test_odd_clips_are_run_or_counted(tmp_path: Path) -> None:
    """30 ms, silence, ten minutes (by its row) and noise among normal clips do not end a run."""
    import soundfile

    rows, noise = [], np.random.default_rng(0)
    odd = {"short": np.zeros(480), "silent": np.zeros(16_000), "long": np.zeros(800), "loud": noise.normal(size=8000)}
    for split in ("train", "valid", "test"):
        for name, wave in odd.items():
            soundfile.write(tmp_path / f"{split}-{name}.wav", wave.astype("f4"), 16_000, subtype="FLOAT")
            row = {"path": f"{split}-{name}.wav", "task": "ks", "splits": {"ks": split}, "keyword": name[:1]}
            rows.append(row | ({"seconds": 600.0} if name == "long" else {}))
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"learning_rate": 1e-2, "budget": TWO, "seed": 0, "data": "odd"}
    row = run_one(
        Run(upstream=parse("fbank"), task="ks", root=tmp_path, output=tmp_path / "out", **settings), Machine()
    )
    assert row["utterances"] == {"train": 3, "valid": 3, "test": 3}
    assert row["skipped"] == {"longer than 300 s": 3, "features not finite, set to 0": 1}  # s3prl's fbank of the 30 ms


def test_broken_features_are_counted_or_end_the_run(make: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN for one wave of 48 is a count in the row; for each it is an error that names the upstream."""
    import soundfile
    import torch

    class Broken(torch.nn.Module):
        """Fails for waves with this sum, or for all."""

        def __init__(self, total: float | None) -> None:
            super().__init__()
            self.total = total

        def get_downsample_rates(self, key: str) -> int:
            return 160

        def forward(self, wavs: list[Any]) -> dict[str, Any]:
            states = torch.ones(len(wavs), max(-(-len(wav) // 160) for wav in wavs), 4)
            for i, wav in enumerate(wavs):
                if self.total is None or abs(float(wav.sum()) - self.total) < 1e-4:
                    states[i] = float("nan")
            return {"hidden_states": [states]}

    one = float(soundfile.read(corpus / "00.flac", dtype="float32")[0].sum())
    monkeypatch.setattr(running, "_build", lambda *arguments: Broken(one))
    assert run_one(make("er", budget=TWO), Machine())["skipped"] == {"features not finite, set to 0": 1}
    monkeypatch.setattr(running, "_build", lambda *arguments: Broken(None))
    with pytest.raises(UserError, match="upstream fbank: NaN or infinite features for"):
        run_one(make("er", budget=TWO, seed=1), Machine())


def test_out_of_memory_has_its_own_error(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(running, "_trained", full)
    failures = run_all([make()], Machine(), on_result=lambda run, outcome: None)
    (error,) = failures.values()
    assert isinstance(error, UserError)
    assert str(error).startswith("out of memory on cpu (CUDA out of memory.")


def test_training_lowers_the_loss(make: Any) -> None:
    losses = run_one(make("sid", learning_rate=1e-2), Machine())["curves"]["train-loss"]
    assert losses[-1][1] < 0.9 * losses[0][1]


def test_the_value_equals_s3prls_and_agrees_with_its_predictions(make: Any, truth: dict[str, Any]) -> None:
    import yaml

    run = make()
    row = run_one(run, Machine())
    said = yaml.safe_load((run.folder / "evaluate" / "valid_best" / "test" / "result.yaml").read_text())
    assert row["value"] == said["accuracy"]
    told = [line.split("-")[-1].split(" ") for line in predicted(run, "ks_public/predict.txt")]
    right = [truth[Path(name).stem]["keyword"] == answer for name, answer in told]
    assert len(right) == 12
    assert row["value"] == pytest.approx(sum(right) / 12)


def test_only_paths_steps_and_the_learning_rate_differ_from_s3prl(make: Any) -> None:
    """Heads, batch sizes, clipping, accumulation, optimiser and effects are the published ones."""
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


def test_a_full_run_equals_s3prls_own_training(make: Any) -> None:
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

    monkeypatch.setattr(jobs.one, "run_one", stand_in)
    failures = run_all(runs, Machine(), on_result=lambda run, outcome: None)
    assert list(failures) == [str(runs[1].folder)]
    assert "raise RuntimeError" in (runs[1].folder / "run.log").read_text()
    assert [row["task"] for row in results.read_rows(runs[0].output)] == ["ic", "ks"]
    assert run_all(runs, Machine(), on_result=lambda run, outcome: None) == {}
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


def test_another_spelling_of_a_models_path_or_a_moved_disk_is_the_same_run(
    make: Any, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(model_folder, tmp_path / "m1")
    monkeypatch.chdir(tmp_path)
    first = make(upstream="m1").folder
    first.mkdir(parents=True)
    assert {make(upstream=name).folder for name in ("m1", "./m1", "m1/", str(tmp_path / "m1"))} == {first}
    shutil.move(tmp_path / "m1", tmp_path / "disk2")
    assert make(upstream="disk2").folder == first
    assert make(upstream="codes:disk2").folder != first
    first.rename(first.with_name("gone"))
    old = make(upstream="./disk2")
    spelled = first.with_name(f"{first.name.rpartition('-')[0]}-{running._digest(old.identity())}")
    place = spelled.parents[1].with_name("._disk2") / "ks" / spelled.name
    place.mkdir(parents=True)
    assert make(upstream="./disk2").folder == place, "results of an earlier version must be found"


@pytest.mark.parametrize("torn", ["", "step_20/model/state_dict.pt", "valid_best/task/state.pt", "step_20/config.yaml"])
def test_a_run_killed_while_saving_resumes(torn: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert (row["value"], row["valid"], row["curves"]) == (whole["value"], whole["valid"], whole["curves"])
    complete = torn in ("", "step_20/config.yaml")  # all of step 20 except for a file that is not read again
    assert bool(row.get("interrupted")) == (not complete), "a complete training must not be repeated"
    assert not list((run.folder / "train").glob("step_*"))


@pytest.mark.parametrize("full", [False, True])
def test_a_run_killed_in_training_gives_the_same_figure_or_records_it(
    full: bool, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3prl itself repeats the epoch with other batches. Only official trainings are too long to restart."""
    run = make()
    whole = run_one(replace(run, output=run.output / "whole"), Machine())
    assert "interrupted" not in whole
    import torch

    step, count = torch.optim.Adam.step, [0]

    def killed(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == 15:  # a checkpoint of step 10 is there
            raise RuntimeError("killed")
        return step(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run_one(run, Machine())
    assert (run.folder / "train" / "step_10").is_dir()
    if full:
        prepare = running.prepare_training
        monkeypatch.setattr(
            running, "prepare_training", lambda folder, steps, restart: prepare(folder, steps, restart=False)
        )
    row = run_one(run, Machine())
    assert row["interrupted"] == [{"at": 10, "then": "resumed" if full else "restarted"}]
    if not full:
        assert (row["value"], row["curves"], row["layer_weights"]) == (
            whole["value"],
            whole["curves"],
            whole["layer_weights"],
        )


def test_a_kill_after_the_result_is_written_repeats_no_training(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make()
    with monkeypatch.context() as patch:
        patch.setattr(running, "_tidy", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_one(run, Machine())
    assert run.finished, "the result must be written before anything is removed"
    assert list((run.folder / "train").glob("step_*"))
    monkeypatch.setattr(running, "_run", lambda *arguments: pytest.fail("trained again"))
    assert not run_all([run], Machine(), on_result=lambda *_: pytest.fail("a finished run has no new result"))
    assert not list((run.folder / "train").glob("step_*"))
    assert not list((run.folder / "train").rglob("optimizer.pt"))


def test_results_are_read_while_another_process_trains(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training process creates and deletes checkpoints. Others must not search for rows among them."""
    done, training = make("ks"), make("er")
    results.write_json(done.folder / "result.json", {"task": "ks"})
    (training.folder / "train" / "step_100" / "task").mkdir(parents=True)
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if "train" in str(path):
            raise FileNotFoundError(path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert results.publish(done.output) == [{"task": "ks"}]
    assert results.read_rows(done.output, "probes") == []


def test_a_run_locked_by_another_process_is_skipped(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", {"here": 0.3, "elsewhere": 0.3})
    run = make("ks")
    with files.alone_in(run.folder):
        failures = run_all([run], Machine(), on_result=lambda run, outcome: None)
        results.write_json(run.folder / "result.json", {"task": "ks"})
    assert "is at work there" in str(failures[str(run.folder)])
    assert run_one(run, Machine()) == {"task": "ks"}, "the other process's result must be returned"


def test_two_processes_match_one(make: Any) -> None:
    runs = [make("er"), make("er", seed=1)]
    alone = [run_one(replace(run, output=run.output / "alone"), Machine(threads=1)) for run in runs]
    outcomes: dict[int, Any] = {}
    assert run_all(runs, Machine(threads=1), jobs=2, on_result=lambda run, row: outcomes.update({run.seed: row})) == {}
    assert [outcomes[seed]["curves"] for seed in (0, 1)] == [row["curves"] for row in alone]
    assert len(results.read_rows(runs[0].output, "runs")) == 2
