"""CSVs: the manifest becomes what s3prl's own datasets read."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import soundfile

from codecssl.superb.corpora.corpus import Example, TaskCorpus
from codecssl.superb.patches import import_patches
from codecssl.superb.runner.csvs import write_csvs
from codecssl.superb.runner.problems import make_problem
from codecssl.superb.tasks import TASKS, official_config
from codecssl.tokenize.common.errors import UserError


def prepared(name: str, corpus: Path, folder: Path) -> tuple[Any, dict[str, Path], dict[str, list[Example]]]:
    import_patches.install()
    found = TaskCorpus(corpus)
    splits = found.examples(TASKS[name])
    csvs = write_csvs(TASKS[name], splits, folder, found)
    return make_problem(TASKS[name], csvs), csvs, splits


def manifest(corpus: Path, task: str, split: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    return [row for row in rows if row["splits"].get(task) == split]


@pytest.mark.parametrize("name", ["ks", "sid", "er", "ic"])
def test_s3prl_reads_every_utterance_with_its_label(name: str, corpus: Path, tmp_path: Path) -> None:
    """s3prl's own encoder and dataset read the files: ids, waves and labels come out as the manifest has them."""
    problem, csvs, splits = prepared(name, corpus, tmp_path)
    problem.build_encoder({}, tmp_path, tmp_path, csvs["train"], csvs["valid"], [csvs["test"]])
    encoder = pickle.loads((tmp_path / "encoder.pkl").read_bytes())
    settings = official_config(TASKS[name])["build_dataset"]
    dataset = problem.build_dataset(settings, tmp_path, tmp_path, "test", csvs["test"], tmp_path / "encoder.pkl", 320)
    rows = manifest(corpus, name, "test")
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


@pytest.mark.parametrize("name", ["pr", "asr", "sf"])
def test_s3prl_reads_every_text(name: str, corpus: Path, tmp_path: Path) -> None:
    """Tokens decode to the manifest's text, with slots at their tags."""
    problem, csvs, _ = prepared(name, corpus, tmp_path)
    config = official_config(TASKS[name])
    places = (tmp_path, tmp_path)
    data = problem.prepare_tokenizer_data({}, *places, csvs["train"], csvs["valid"], [csvs["test"]])
    tokenizer = problem.build_tokenizer(config["build_tokenizer"], *places, data)
    dataset = problem.build_dataset({}, *places, "test", csvs["test"], tokenizer)
    rows = manifest(corpus, name, "test")
    assert len(dataset) == len(rows) == 3
    for i, row in enumerate(rows):
        expected = " ".join(row["phones"]) if name == "pr" else row["text"]
        if name == "sf":
            tagged = zip(row["text"].split(), row["iob"].split(), strict=True)
            expected = " ".join(f"B-pitch {word} E-pitch" if tag == "B-pitch" else word for word, tag in tagged)
            expected = expected.replace("E-pitch B-pitch ", "")  # neighbours of one name are one slot, as in s3prl
        assert dataset[i]["labels"] == expected


def test_s3prl_reads_every_turn(corpus: Path, tmp_path: Path) -> None:
    """Frame labels of diarisation are the manifest's segments; a speaker's name may hold a space."""
    from s3prl.problem.diarization.util import csv_to_kaldi_dir

    problem, csvs, _ = prepared("sd", corpus, tmp_path)
    csv_to_kaldi_dir(csvs["test"], tmp_path / "kaldi")
    settings = official_config(TASKS["sd"])["build_dataset"]
    dataset = problem.build_dataset(settings, tmp_path, tmp_path, "test", csvs["test"], tmp_path / "kaldi", 2, 160)
    (row,) = manifest(corpus, "sd", "test")
    assert len(dataset) == 1
    label = dataset[0]["label"]
    for column, segment in enumerate(row["segments"]):
        frames = [round(segment[edge] * 100) for edge in ("start", "end")]
        assert label[frames[0] : frames[1], column].all()
        assert label[:, column].sum() == frames[1] - frames[0]


def test_verification_reads_trials(corpus: Path, tmp_path: Path) -> None:
    problem, csvs, splits = prepared("asv", corpus, tmp_path)
    assert csvs["test"].name == "test_trial.csv"
    dataset = problem.build_dataset({}, tmp_path, tmp_path, "test", csvs["test"], "")
    assert {dataset[i]["unique_name"] for i in range(len(dataset))} == {f"utt:{e.path}" for e in splits["test"]}


def test_the_seed_reaches_the_head(corpus: Path, tmp_path: Path) -> None:
    """s3prl's own building of the upstream seeds everything with 0 again; here the run's seed survives it."""
    import torch

    problem, _, _ = prepared("ks", corpus, tmp_path)
    heads: dict[int, Any] = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = problem.build_model({}, 3, {"name": "fbank"}, {}, {})
        heads[seed] = model.downstream.final_proj.weight
    torch.manual_seed(0)
    again = problem.build_model({}, 3, {"name": "fbank"}, {}, {}).downstream.final_proj.weight
    assert torch.equal(heads[0], again)
    assert not torch.equal(heads[0], heads[1])


@pytest.mark.parametrize(
    ("name", "column", "values"),
    [
        ("sid", "label", ["NA", "x"]),
        ("sid", "label", ["7", "007"]),
        ("asr", "transcription", ["null", "x"]),
        ("asr", "transcription", ["1", "2"]),
    ],
)
def test_text_that_csv_would_change_is_refused(
    name: str, column: str, values: list[str], corpus: Path, tmp_path: Path
) -> None:
    examples = [Example(id=str(i), path=Path("a.wav"), columns={column: value}) for i, value in enumerate(values)]
    with pytest.raises(UserError, match="change in a CSV file"):
        write_csvs(TASKS[name], {"train": examples}, tmp_path, TaskCorpus(corpus))


def test_diarisation_needs_16_khz_mono(corpus: Path, tmp_path: Path) -> None:
    import numpy as np

    soundfile.write(tmp_path / "a.wav", np.zeros(8000, "f4"), 8000)
    example = Example(id="a", path=tmp_path / "a.wav", columns={"segments": [("s", 0.0, 0.5)]})
    with pytest.raises(UserError, match="8000 Hz, 1 channels; sd needs 16000 Hz mono"):
        write_csvs(TASKS["sd"], {"test": [example]}, tmp_path, TaskCorpus(corpus))
