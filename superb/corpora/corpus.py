"""A corpus: a folder with manifest.jsonl, or with SUPERB's corpora as their archives unpack; utterances per task."""

import functools
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codecssl.superb.rows import ManifestRow
from codecssl.superb.tasks import TASKS, Task
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256

LONGEST_SECONDS = 300.0
"""Maximum length of a clip. Longer ones, for which a recurrent head needs gigabytes, are skipped and counted.
SUPERB's corpora have none."""
FOLDS = (1, 2, 3, 4, 5)
VALID_SHARE = 0.2
"""Share of the four training folds used for validation, as in SUPERB's emotion recognition."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One utterance of one task."""

    id: str
    path: Path
    columns: dict[str, Any]
    """Columns of s3prl's CSV in addition to id and wav_path."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A task's utterances by split, and the number of skipped ones by reason."""

    splits: dict[str, list[Example]]
    skipped: dict[str, int] = field(default_factory=dict)


class TaskCorpus:
    """Rows of a corpus by task. `side` is a folder with the small lists that official corpora need."""

    def __init__(self, root: Path, side: Path | None = None) -> None:
        self.root = Path(root)
        self.side = side
        self.manifest = self.root / "manifest.jsonl"
        self.official = not self.manifest.is_file()
        if not self.root.is_dir():
            raise UserError(f"data {root}: no such folder; give one with manifest.jsonl, or the word sample")

    @functools.cached_property
    def rows(self) -> list[ManifestRow]:
        """Return the manifest's rows, with absolute paths."""
        try:
            lines = self.manifest.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.manifest}: not UTF-8 ({error}); convert it") from error
        return [self._row(number, line) for number, line in enumerate(lines, start=1) if line.strip()]

    def _row(self, number: int, line: str) -> ManifestRow:
        try:
            row = json.loads(line)
            return {**row, "path": str((self.root / row["path"]).resolve()), "_line": number}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{self.manifest}:{number}: not a JSON object with a path ({error})") from error

    @functools.cache  # noqa: B019 - corpora are few and live as long as the process
    def rows_of(self, task: str) -> list[ManifestRow]:
        """Return the rows of a task. Raises UserError if the root has neither a manifest nor the official layout."""
        if not self.official:
            return [row for row in self.rows if task in str(row.get("task", "")).split(",")]
        from codecssl.superb.corpora.official import official_rows

        try:
            return official_rows(task, self.root, self.side)
        except UserError as error:
            raise UserError(f"data {self.root}: no manifest.jsonl in it; as SUPERB's own {task}: {error}") from error

    def identity(self, task: str) -> dict[str, Any]:
        """Return the sha256 of the inputs that determine a task's utterances.

        These are the manifest (and the list of trials), or the rows read from the official layout.
        """
        if not self.official:
            trials = self.root / "trials.txt"
            listed = {"trials_sha256": file_sha256(trials)} if task == "asv" and trials.is_file() else {}
            return {"manifest_sha256": file_sha256(self.manifest), **listed}
        return {"manifest_sha256": None, "rows_sha256": self._rows_sha256(task)}

    @functools.cache  # noqa: B019 - as above
    def _rows_sha256(self, task: str) -> str:
        """Return the sha256 of the rows, with paths relative to the root."""
        roots = str(self.root.resolve()), str(self.root.absolute())
        under = [row["path"].removeprefix(roots[0]).removeprefix(roots[1]) for row in self.rows_of(task)]
        rows = [{**row, "path": path} for row, path in zip(self.rows_of(task), under, strict=True)]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()

    def deviations(self, task: str) -> list[str]:
        """Return each count of a task that differs from SUPERB's official data. Empty for a manifest."""
        if not self.official:
            return []
        from codecssl.superb.corpora.official import official_trials
        from codecssl.superb.corpora.official_counts import deviations

        trials = len(official_trials(self.root, self.side)) if task == "asv" else None
        return deviations(task, self.rows_of(task), trials)

    def has_folds(self, task: str) -> bool:
        return all("fold" in row for row in self.rows_of(task))

    def examples(self, task: Task, fold: int | None = None) -> dict[str, list[Example]]:
        return self.select(task, fold).splits

    def select(self, task: Task, fold: int | None = None) -> Selection:
        """Return the task's utterances by split.

        With `fold`, that fold is the test set and a fifth of the others validates. Raises UserError if a row lacks a
        required column, a split is empty, or a test label never occurs in training.
        """
        splits: dict[str, list[Example]] = {split: [] for split in task.splits}
        skipped: Counter[str] = Counter()
        folds = _fold_splits(self.rows_of(task.name), fold) if fold is not None else {}
        for row in self.rows_of(task.name):
            split = folds[row["path"]] if folds else self._split(task, row)
            reason = None if self.official else self._unfit(task, row)
            if reason:
                skipped[reason] += 1
            elif split is not None:
                splits[split].append(self._example(task, row))
        self._check(task, splits)
        return Selection(splits=splits, skipped=dict(skipped))

    def where(self, row: ManifestRow) -> str:
        return f"{self.manifest}:{row['_line']}" if "_line" in row else str(row["path"])

    def _split(self, task: Task, row: ManifestRow) -> str:
        splits = row.get("splits") or {}
        if not isinstance(splits, dict):
            raise UserError(f'{self.where(row)}: splits is {splits!r}; give an object, {{"{task.name}": "train"}}')
        split = splits.get(task.name)
        if split not in task.splits:
            wanted = ", ".join(task.splits)
            raise UserError(f'{self.where(row)}: splits has "{task.name}": {split!r}; give one of {wanted}')
        return str(split)

    def _unfit(self, task: Task, row: ManifestRow) -> str | None:
        seconds = _seconds(row) if Path(row["path"]).is_file() else task.shortest
        if seconds < task.shortest:
            return f"shorter than {task.shortest:g} s"
        return f"longer than {LONGEST_SECONDS:g} s" if seconds > LONGEST_SECONDS else None

    def _example(self, task: Task, row: ManifestRow) -> Example:
        try:
            columns = task.columns(row)
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.where(row)}: task {task.name} needs the column {error}; add it") from error
        except ValueError as error:
            raise UserError(f"{self.where(row)}: task {task.name}: {error}; correct it") from error
        path = Path(row["path"])
        if not path.is_file():
            raise UserError(f"{self.where(row)}: {path}: no such file")
        name = row.get("id") or _relative(path, self.root)
        return Example(id=f"utt:{name}", path=path, columns=columns)  # a prefix, so that pandas sees text

    def _check(self, task: Task, splits: dict[str, list[Example]]) -> None:
        source = self.root if self.official else self.manifest
        for split, examples in splits.items():
            if not examples:
                raise UserError(f"task {task.name}: {source} has no {split} utterance for it{self._offer()}")
        if task.classes:
            for split, name, example in _never_trained(splits):
                raise UserError(
                    f"task {task.name}: {split} label {name!r} ({example.path.name}) never occurs in training; "
                    "move some of its utterances to train or remove it"
                )

    def _offer(self) -> str:
        """List the tasks of the manifest, for the error message."""
        there = {task for row in ([] if self.official else self.rows) for task in str(row.get("task", "")).split(",")}
        known = [name for name in TASKS if name in there]
        return f"; it has --tasks {','.join(known)}" if known else ""


def _relative(path: Path, root: Path) -> str:
    root = root.resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _seconds(row: ManifestRow) -> float:
    if isinstance(row.get("seconds"), int | float):
        return float(row["seconds"])
    import soundfile

    try:
        return float(soundfile.info(row["path"]).duration)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{row['path']}: no audio that can be read ({error}); replace it") from error


def _labels(example: Example) -> list[str]:
    """Return the labels of an example. Intents have one per slot, by position."""
    if "labels" in example.columns:
        return [f"{i}:{part}" for i, part in enumerate(example.columns["labels"].split(" ; "))]
    return [str(example.columns["label"])]


def _never_trained(splits: dict[str, list[Example]]) -> Iterator[tuple[str, str, Example]]:
    known = {label for example in splits["train"] for label in _labels(example)}
    for split in ("valid", "test"):
        for example in splits[split]:
            yield from ((split, label, example) for label in _labels(example) if label not in known)


def _fold_splits(rows: list[ManifestRow], fold: int) -> dict[str, str | None]:
    """Map paths to splits with `fold` as the test set, from the row's `fold_splits` or drawn as in SUPERB."""
    import torch

    if all("fold_splits" in row for row in rows):
        return {row["path"]: row["fold_splits"].get(str(fold)) for row in rows}
    if str(fold) not in {str(row.get("fold")) for row in rows}:
        raise UserError(f"fold {fold}: no row has it; folds are the column fold, {FOLDS[0]} to {FOLDS[-1]}")
    others = [row["path"] for row in rows if str(row.get("fold")) != str(fold)]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).tolist()
    train = {others[i] for i in order[: int((1 - VALID_SHARE) * len(others))]}
    found: dict[str, str] = defaultdict(lambda: "test")
    found.update({path: "train" if path in train else "valid" for path in others})
    return {row["path"]: found[row["path"]] for row in rows}


def open_corpus(root: Path, side: Path | None = None) -> TaskCorpus:
    """Open the corpus of a root. It is read once per process and state of its manifest."""
    manifest = Path(root) / "manifest.jsonl"
    return _opened(root, side, manifest.stat().st_mtime_ns if manifest.is_file() else None)


@functools.lru_cache(maxsize=8)
def _opened(root: Path, side: Path | None, stamp: int | None) -> TaskCorpus:
    return TaskCorpus(root, side)


def chance(splits: dict[str, list[Example]]) -> float:
    """Accuracy on the test set of always answering the training set's most frequent label."""

    def answers(split: str) -> list[tuple[str, ...]]:
        return [tuple(_labels(example)) for example in splits[split]]

    answer, _ = Counter(answers("train")).most_common(1)[0]
    return sum(label == answer for label in answers("test")) / len(splits["test"])
