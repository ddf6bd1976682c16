"""Task folders of HEAR 2021, as hearpreprocess writes them.

    TASK/task_metadata.json      task_name, embedding_type, prediction_type, split_mode, nfolds, evaluation, ...
    TASK/labelvocabulary.csv     idx,label
    TASK/SPLIT.json              file -> labels; of an event task: file -> [{"label", "start", "end"}], in milliseconds
    TASK/16000/SPLIT/FILE        the clips, at 16 kHz

SPLIT is train, valid and test, or fold00, fold01, ... for tasks with folds.
"""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from codecssl.superb.hear.metrics import Event, metric
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.tokenize.common.errors import UserError

METADATA, VOCABULARY = "task_metadata.json", "labelvocabulary.csv"


class Fold(NamedTuple):
    """Splits that train, choose and test a predictor."""

    train: tuple[str, ...]
    valid: str
    test: str


class TaskFolder:
    """A task: its splits, labels and clips. Raises UserError if the folder is not one of HEAR's, or not at 16 kHz."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.metadata: dict[str, Any] = json.loads((path / METADATA).read_text(encoding="utf-8"))
            self.name = str(self.metadata["task_name"])
            self.events = {"scene": False, "event": True}[self.metadata["embedding_type"]]
            self.multilabel = {"multiclass": False, "multilabel": True}[self.metadata["prediction_type"]]
            self.metrics = [str(name) for name in self.metadata["evaluation"]]
            self.folds = self._folds()
            self.vocabulary = self._vocabulary()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a task folder of hearpreprocess ({error!r})") from error
        if not (path / str(SAMPLE_RATE)).is_dir():
            raise UserError(f"{path}: has no clips at {SAMPLE_RATE} Hz; run hearpreprocess with --sample-rate 16000")
        for name in self.metrics:
            if metric(name).of_events != self.events:
                raise UserError(f"{path}: metric {name} does not fit a task of {self.metadata['embedding_type']}s")

    def _folds(self) -> list[Fold]:
        """Split the folds: the one after the test fold validates, the others train (as in heareval)."""
        if self.metadata["split_mode"] == "trainvaltest":
            return [Fold(("train",), "valid", "test")]
        names = [f"fold{number:02d}" for number in range(int(self.metadata["nfolds"]))]
        if len(names) < 3:
            raise ValueError(f"nfolds {len(names)}")
        pairs = [(names[i], names[(i + 1) % len(names)]) for i in range(len(names))]
        return [Fold(tuple(name for name in names if name not in pair), pair[1], pair[0]) for pair in pairs]

    def _vocabulary(self) -> list[str]:
        with (self.path / VOCABULARY).open(newline="", encoding="utf-8") as file:
            rows = {int(row["idx"]): row["label"] for row in csv.DictReader(file)}
        return [rows[index] for index in range(len(rows))]

    @property
    def splits(self) -> list[str]:
        return sorted({name for fold in self.folds for name in (*fold.train, fold.valid, fold.test)})

    def labels(self, split: str) -> dict[str, list[Any]]:
        """Labels of each file, or its events. Raises UserError for labels that are not in the vocabulary."""
        try:
            found: dict[str, list[Any]] = json.loads((self.path / f"{split}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: no readable {split}.json ({error})") from error
        for file, labels in found.items():
            for label in labels:
                if str(label["label"] if self.events else label) not in self.index:
                    raise UserError(f"{self.path}/{split}.json: {file}: {label} is not in {VOCABULARY}")
        return found

    def event_lists(self, split: str) -> dict[str, list[Event]]:
        """Return the events of each file."""
        rows = self.labels(split)
        return {
            file: [Event(str(e["label"]), float(e["start"]), float(e["end"])) for e in events]
            for file, events in rows.items()
        }

    @cached_property
    def index(self) -> dict[str, int]:
        """Class of each label."""
        return {label: index for index, label in enumerate(self.vocabulary)}

    def clip(self, split: str, file: str) -> Path:
        return self.path / str(SAMPLE_RATE) / split / file

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of metadata, vocabulary and labels, and of the clips' sizes."""
        digest = hashlib.sha256()
        for path in (METADATA, VOCABULARY, *(f"{split}.json" for split in self.splits)):
            digest.update((self.path / path).read_bytes())
        for split in self.splits:
            sizes = [(file, self.clip(split, file).stat().st_size) for file in sorted(self.labels(split))]
            digest.update(json.dumps(sizes).encode())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip to write: samples at 16 kHz, and its labels or events."""

    file: str
    split: str
    wave: NDArray[np.float32]
    labels: Sequence[str] | Sequence[Event]


def write_task(root: Path, metadata: Mapping[str, Any], clips: Sequence[Clip]) -> Path:
    """Write a task folder ROOT/NAME-VERSION-full, its metadata last, and return it."""
    import soundfile

    from codecssl.tokenize.common.files import write_atomic

    folder = root / f"{metadata['task_name']}-{metadata['version']}-full"
    (folder / METADATA).unlink(missing_ok=True)
    found: dict[str, dict[str, list[Any]]] = {}
    for clip in clips:
        path = folder / str(SAMPLE_RATE) / clip.split / clip.file
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.clip(clip.wave, -1.0, 1.0), SAMPLE_RATE, subtype="PCM_16")
        rows = [vars(label) if isinstance(label, Event) else label for label in clip.labels]
        found.setdefault(clip.split, {})[clip.file] = rows
    for split, rows_of in found.items():
        write_atomic(folder / f"{split}.json", (json.dumps(rows_of, indent=1) + "\n").encode())
    vocabulary = sorted({x.label if isinstance(x, Event) else x for clip in clips for x in clip.labels})
    lines = ["idx,label", *(f"{index},{label}" for index, label in enumerate(vocabulary))]
    write_atomic(folder / VOCABULARY, ("\n".join(lines) + "\n").encode())
    write_atomic(folder / METADATA, (json.dumps(dict(metadata), indent=1) + "\n").encode())
    return folder
