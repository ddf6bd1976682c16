"""SUPERB's tasks: which s3prl problem runs one, what its labels are, and how a manifest becomes the CSVs it
reads.

Heads, batch sizes, optimisers and metrics are s3prl's own. A budget scales the number of steps only (and,
since a short run can't afford SUPERB's small learning rates, the default learning rate), and a table says
which budget made it.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codecssl.tokenize.errors import UserError

SPLITS = ("train", "valid", "test")
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One SUPERB task. `label(row)` is the string that s3prl's CSV holds in `column`."""

    name: str
    title: str
    problem: str  # the class of s3prl.problem
    corpus: str  # of the official benchmark
    metric: str
    higher_better: bool
    column: str
    label: Callable[[Row], str]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many of the official steps to run: official / divisor, but at least `least`."""

    name: str
    divisor: int
    least: int
    evaluations: int  # on the validation set, evenly spaced; the best one is tested
    learning_rates: tuple[float, ...] = ()  # swept where the user names none; () is the task's official one

    def steps(self, official: int) -> int:
        return max(official // self.divisor, min(self.least, official))


def _first(*columns: str) -> Callable[[Row], str]:
    """The first of the columns that a row has."""

    def label(row: Row) -> str:
        for column in columns:
            if row.get(column) is not None:
                return str(row[column])
        raise KeyError(" or ".join(columns))

    return label


def _intent(row: Row) -> str:
    slots = row["slots"]
    return " ; ".join(str(slots[slot]) for slot in ("action", "object", "location"))


TASKS = {
    task.name: task
    for task in (
        Task(
            name="ks",
            title="Keyword spotting",
            problem="SuperbKS",
            corpus="Speech Commands v0.01",
            metric="accuracy",
            higher_better=True,
            column="label",
            label=_first("keyword", "label"),
        ),
        Task(
            name="sid",
            title="Speaker identification",
            problem="SuperbSID",
            corpus="VoxCeleb1",
            metric="accuracy",
            higher_better=True,
            column="label",
            label=_first("speaker"),
        ),
        Task(
            name="er",
            title="Emotion recognition",
            problem="SuperbER",
            corpus="IEMOCAP",
            metric="accuracy",
            higher_better=True,
            column="label",
            label=_first("style", "label"),
        ),
        Task(
            name="ic",
            title="Intent classification",
            problem="SuperbIC",
            corpus="Fluent Speech Commands",
            metric="accuracy",
            higher_better=True,
            column="labels",
            label=_intent,
        ),
    )
}

BUDGETS = {
    budget.name: budget
    for budget in (
        Budget(name="full", divisor=1, least=1, learning_rates=(), evaluations=40),
        Budget(name="quick", divisor=100, least=300, learning_rates=(1e-3, 1e-4), evaluations=10),
        Budget(name="smoke", divisor=2000, least=100, learning_rates=(1e-2, 1e-3), evaluations=4),
    )
}


def choose(names: str) -> list[Task]:
    """Tasks of a comma-separated list; `all` is every one."""
    wanted = list(TASKS) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in TASKS:
            raise UserError(f"task {name}: not known; give some of {','.join(TASKS)} or all")
    if not wanted:
        raise UserError(f"tasks '{names}': names no task; give some of {','.join(TASKS)} or all")
    return [TASKS[name] for name in dict.fromkeys(wanted)]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One utterance of one task."""

    id: str
    path: Path
    label: str


class Corpus:
    """A folder with manifest.jsonl: a row per utterance with path, task, splits and label columns."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / "manifest.jsonl"
        if not self.manifest.is_file():
            raise UserError(f"data {root}: no manifest.jsonl in it; give a folder that has one, or the word sample")
        lines = enumerate(self.manifest.read_text(encoding="utf-8").splitlines(), start=1)
        self.rows: list[Row] = [self._row(number, line) for number, line in lines if line.strip()]

    def _row(self, number: int, line: str) -> Row:
        try:
            row = json.loads(line)
            return {"path": row["path"], **row}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{self.manifest}:{number}: not a JSON object with a path ({error})") from error

    def examples(self, task: Task) -> dict[str, list[Example]]:
        """The task's utterances by split; UserError where a row lacks what the task needs or a split is
        empty.
        """
        splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
        for number, row in enumerate(self.rows, start=1):
            if task.name in str(row.get("task", "")).split(","):
                split, example = self._example(task, row, f"{self.manifest}:{number}")
                splits[split].append(example)
        for split, examples in splits.items():
            if not examples:
                raise UserError(f"task {task.name}: {self.manifest} has no {split} utterance for it")
        return splits

    def _example(self, task: Task, row: Row, where: str) -> tuple[str, Example]:
        split = (row.get("splits") or {}).get(task.name)
        if split not in SPLITS:
            raise UserError(f'{where}: splits has "{task.name}": {split!r}; give one of {", ".join(SPLITS)}')
        try:
            label = task.label(row)
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}: task {task.name} needs the column {error}; add it") from error
        path = (self.root / row["path"]).resolve()
        if not path.is_file():
            raise UserError(f"{where}: {path}: no such file")
        return split, Example(id=f"utt:{row['path']}", path=path, label=label)  # a prefix, so that pandas sees text


def write_csvs(task: Task, splits: dict[str, list[Example]], folder: Path) -> dict[str, Path]:
    """train.csv, valid.csv and test.csv as the task's `prepare_data` documents them.

    Labels are read back as s3prl will read them: one that pandas would turn into a missing value, or two that
    it would make equal ("7" and "007"), is refused.
    """
    import pandas

    paths = {}
    for split, examples in splits.items():
        paths[split] = folder / f"{split}.csv"
        columns = {"id": [e.id for e in examples], "wav_path": [str(e.path) for e in examples]}
        columns[task.column] = [e.label for e in examples]
        pandas.DataFrame(columns).to_csv(paths[split], index=False)
        read = pandas.read_csv(paths[split])[task.column]
        if read.isna().any() or read.nunique() != len({e.label for e in examples}):
            wrong = sorted({e.label for e in examples})[:8]
            raise UserError(
                f"task {task.name}: labels {wrong} don't survive a CSV; rename those that look like NA or 007"
            )
    return paths


def chance(examples: dict[str, list[Example]]) -> float:
    """Accuracy on the test set of always answering the training set's most frequent label."""
    answer, _ = Counter(e.label for e in examples["train"]).most_common(1)[0]
    return sum(e.label == answer for e in examples["test"]) / len(examples["test"])


def make_problem(task: Task, csvs: dict[str, Path]) -> Any:
    """s3prl's own problem, reading our CSVs.

    One more thing differs: s3prl seeds the generators, then builds the upstream, which seeds them again with
    0, so that its `train.seed` never reaches the head's weights; here building the upstream leaves the
    generators as they were.
    """
    import random

    import s3prl.problem
    import torch

    base: Any = getattr(s3prl.problem, task.problem)

    class OnManifest(base):  # type: ignore[misc]
        def prepare_data(self, *arguments: Any, **options: Any) -> tuple[Path, Path, list[Path]]:
            return csvs["train"], csvs["valid"], [csvs["test"]]

        def build_upstream(self, build_upstream: dict[str, Any]) -> Any:
            state, torch_state = random.getstate(), torch.get_rng_state()
            upstream = super().build_upstream(build_upstream)
            random.setstate(state)
            torch.set_rng_state(torch_state)
            return upstream

    return OnManifest()


def official_config(task: Task) -> dict[str, Any]:
    """The task's configuration as s3prl publishes it."""
    import s3prl.problem

    config: dict[str, Any] = getattr(s3prl.problem, task.problem)().default_config()
    return config
