"""Tasks: the manifest becomes what s3prl's own datasets read, and only steps are scaled."""

import json
from pathlib import Path
from typing import Any

import pytest

from codecssl.superb import compat
from codecssl.superb.tasks import (
    BUDGETS,
    TASKS,
    Corpus,
    Example,
    chance,
    choose,
    make_problem,
    official_config,
    write_csvs,
)
from codecssl.tokenize.errors import UserError


def test_the_official_settings_are_superbs() -> None:
    """Steps, batch (with accumulation) and learning rate as the SUPERB paper's table gives them."""
    compat.install()
    table = {}
    for name, task in TASKS.items():
        config = official_config(task)
        train, batch = config["train"], config["build_batch_sampler"]["train"]["batch_size"]
        rate = config["build_optimizer"]["conf"]["lr"]
        table[name] = (train["total_steps"], batch, train["gradient_accumulate"], rate)
    assert table == {
        "ks": (200_000, 32, 1, 1e-4),
        "sid": (200_000, 8, 4, 1e-4),
        "er": (30_000, 4, 8, 1e-4),
        "ic": (200_000, 32, 1, 1e-4),
    }


def test_budgets_scale_steps() -> None:
    steps = {name: [budget.steps(official) for official in (200_000, 30_000, 50)] for name, budget in BUDGETS.items()}
    assert steps == {"full": [200_000, 30_000, 50], "quick": [2000, 300, 50], "smoke": [100, 100, 50]}


@pytest.mark.parametrize("name", TASKS)
def test_s3prl_reads_every_utterance_with_its_label(name: str, corpus: Path, tmp_path: Path) -> None:
    """Through s3prl's own encoder and dataset: ids, waves and labels come out as the manifest has them."""
    import pickle

    import soundfile

    compat.install()
    task = TASKS[name]
    splits = Corpus(corpus).examples(task)
    csvs = write_csvs(task, splits, tmp_path)
    problem = make_problem(task, csvs)
    config = official_config(task)
    problem.build_encoder({}, tmp_path, tmp_path, csvs["train"], csvs["valid"], [csvs["test"]])
    encoder = pickle.loads((tmp_path / "encoder.pkl").read_bytes())
    dataset = problem.build_dataset(
        config["build_dataset"], tmp_path, tmp_path, "test", csvs["test"], tmp_path / "encoder.pkl", 320
    )
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()][36:]
    assert len(dataset) == len(rows) == len(splits["test"])
    for item, row in zip((dataset[i] for i in range(len(dataset))), rows, strict=True):
        wave, _ = soundfile.read(corpus / row["path"], dtype="float32")
        gain = 10 ** (-3 / 20) if name == "ks" else 1.0
        assert abs(item["x"].flatten().numpy() - gain * wave).max() < 1e-6
        if name == "ic":
            assert encoder.decode(item["class_ids"].tolist()) == list(row["slots"].values())
        else:
            column = {"ks": "keyword", "sid": "speaker", "er": "style"}[name]
            assert encoder.decode(item["class_id"]) == row[column]


def test_the_seed_reaches_the_head(corpus: Path, tmp_path: Path) -> None:
    """s3prl's own building of the upstream seeds everything with 0 again; here the run's seed survives it."""
    import torch

    compat.install()
    problem = make_problem(TASKS["ks"], write_csvs(TASKS["ks"], Corpus(corpus).examples(TASKS["ks"]), tmp_path))
    heads: dict[int, Any] = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = problem.build_model({}, 3, {"name": "fbank"}, {}, {})
        heads[seed] = model.downstream.final_proj.weight
    torch.manual_seed(0)
    again = problem.build_model({}, 3, {"name": "fbank"}, {}, {}).downstream.final_proj.weight
    assert torch.equal(heads[0], again)
    assert not torch.equal(heads[0], heads[1])


def test_labels_that_a_csv_would_change_are_refused(tmp_path: Path) -> None:
    for labels in (["NA", "x"], ["7", "007"]):
        examples = [Example(id=str(i), path=Path("a.wav"), label=label) for i, label in enumerate(labels)]
        with pytest.raises(UserError, match="don't survive a CSV"):
            write_csvs(TASKS["sid"], {"train": examples}, tmp_path)


def test_chance_answers_the_most_frequent_training_class() -> None:
    def examples(labels: str) -> list[Example]:
        return [Example(id="", path=Path(), label=label) for label in labels]

    assert chance({"train": examples("aab"), "test": examples("abbb")}) == 0.25


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"path": "a.flac", "task": "ks", "keyword": "yes"},
            r'manifest.jsonl:1: splits has "ks": None; give one of',
        ),
        ({"path": "a.flac", "task": "ks", "splits": {"ks": "dev"}}, r"'dev'; give one of train, valid, test"),
        (
            {"path": "a.flac", "task": "ks", "splits": {"ks": "test"}},
            r"task ks needs the column 'keyword or label'",
        ),
        ({"path": "a.flac", "task": "ks", "splits": {"ks": "test"}, "label": "x"}, r"a.flac: no such file"),
        (
            {"path": "a.flac", "task": "ic", "splits": {"ic": "test"}, "slots": {"action": 1}},
            r"needs the column 'object'",
        ),
        ({"path": "a.flac", "task": "asr"}, r"has no train utterance for it"),
        ({"task": "ks"}, r"manifest.jsonl:1: not a JSON object with a path"),
    ],
)
def test_a_bad_manifest_is_one_clear_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    name = "ic" if row.get("task") == "ic" else "ks"
    with pytest.raises(UserError, match=message):
        Corpus(tmp_path).examples(TASKS[name])


def test_choose() -> None:
    assert [task.name for task in choose("er, ks,er")] == ["er", "ks"]
    assert [task.name for task in choose("all")] == list(TASKS)
    for wrong in ("ks,xx", ""):
        with pytest.raises(UserError, match="give some of ks,sid,er,ic or all"):
            choose(wrong)
