"""The CSV files that s3prl's problems read, as their `prepare_data` documents them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from codecssl.superb.corpora.asv_trials import Trial, trials_of
from codecssl.superb.corpora.corpus import Example, TaskCorpus
from codecssl.superb.tasks import Task
from codecssl.tokenize.common.errors import UserError

SAMPLE_RATE = 16_000
Table = dict[str, list[Any]]


def write_csvs(task: Task, splits: dict[str, list[Example]], folder: Path, corpus: TaskCorpus) -> dict[str, Path]:
    """Write a CSV per split and return their paths. The test CSV of verification is the list of trials."""
    tables = {split: _table(task, examples) for split, examples in splits.items()}
    if task.name == "asv":
        tables["test"] = _trial_table(trials_of(corpus, splits["test"]))
    names = {"test": "test_trial"} if task.name == "asv" else {}
    return {split: _write(task, table, folder / f"{names.get(split, split)}.csv") for split, table in tables.items()}


def _table(task: Task, examples: list[Example]) -> Table:
    if task.name == "sd":
        return _segment_table(examples)
    columns = dict.fromkeys(name for example in examples for name in example.columns)
    table: Table = {"id": [e.id for e in examples], "wav_path": [str(e.path) for e in examples]}
    return {**table, **{name: [e.columns.get(name) for e in examples] for name in columns}}


def _segment_table(examples: list[Example]) -> Table:
    """Build a table of turns. Recordings are renamed, since their names become file names and words of Kaldi lists."""
    rows = []
    for number, example in enumerate(examples):
        record, seconds = f"rec{number:06d}", _seconds_at_16k(example.path)
        for turn, (speaker, start, end) in enumerate(example.columns["segments"]):
            names = {"utt_id": f"{record}-{turn:04d}", "speaker": f"{record}-{speaker.replace(' ', '_')}"}
            times = {"start_sec": start, "end_sec": end, "duration": seconds}
            rows.append({"record_id": record, "wav_path": str(example.path), **names, **times})
    return {name: [row[name] for row in rows] for name in rows[0]}


def _seconds_at_16k(path: Path) -> float:
    """Return the length of a recording. Its rate must be 16 kHz, since s3prl does not resample diarisation files."""
    import soundfile

    info = soundfile.info(str(path))
    if info.samplerate != SAMPLE_RATE or info.channels != 1:
        raise UserError(f"{path}: {info.samplerate} Hz, {info.channels} channels; sd needs 16000 Hz mono: convert it")
    return float(info.duration)


def _trial_table(trials: list[Trial]) -> Table:
    return {
        "id1": [f"utt:{trial.enrol}" for trial in trials],
        "id2": [f"utt:{trial.test}" for trial in trials],
        "wav_path1": [trial.enrol for trial in trials],
        "wav_path2": [trial.test for trial in trials],
        "label": [int(trial.same) for trial in trials],
    }


def _write(task: Task, table: Table, path: Path) -> Path:
    """Write a table and read its labels and texts back as s3prl does.

    Refuses values that pandas would turn into a missing value or a number, or make equal ("7" and "007").
    """
    import pandas

    pandas.DataFrame(table).to_csv(path, index=False)
    read = pandas.read_csv(path)
    for name in ("label", "labels", "spk", "transcription", "iob"):
        if name in table and not _survives(table[name], read[name].tolist(), exact=name in ("transcription", "iob")):
            wrong = sorted({str(value) for value in table[name]})[:8]
            remedy = "rename those that look like NA or 007" if name != "transcription" else "give words, not numbers"
            raise UserError(f"task {task.name}: {name} {wrong} change in a CSV file; {remedy}")
    return path


def _survives(written: Iterable[Any], read: list[Any], *, exact: bool) -> bool:
    if exact:
        return list(written) == read
    return not any(value != value for value in read) and len(set(read)) == len(set(written))
