"""A scene task folder of HEAR as a classification task of MTEB: logistic regression on 8 clips of each class.

task = maeb_task(Path("tasks/environment-codecssl1-full"))
scores = task.evaluate(codecssl.superb.suites.maeb.load("model"), "test", encode_kwargs={"batch_size": 16})
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata
from numpy.typing import NDArray
from torch import Tensor

from codecssl.superb.hear.task_folder import TaskFolder
from codecssl.superb.suites.maeb import CodecSSLAudio
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.audio import read_wave

DRAWS = 3
"""Draws of the 8 clips, in each fold. MTEB has 10, and one fold."""


def maeb_task(folder: Path, fold: int = 0) -> AbsTaskClassification:
    """Build the task: a fold's test split tests, its others train. Raises UserError for event tasks."""
    task = TaskFolder(folder)
    if task.events or task.multilabel:
        raise UserError(f"{folder}: a task with one label a clip is needed")

    class HearScenes(AbsTaskClassification):
        metadata = TaskMetadata(
            name=task.name,
            description=f"HEAR task folder {folder.name}",
            reference=None,
            dataset={"path": str(folder), "revision": task.fingerprint},
            type="AudioClassification",
            category="a2c",
            eval_splits=["test"],
            eval_langs=["zxx-Zxxx"],
            main_score="accuracy",
            modalities=["audio"],
        )
        input_column_name = "audio"
        n_experiments = DRAWS

        def load_data(self, num_proc: int | None = None, **options: Any) -> None:
            from datasets import DatasetDict

            chosen = task.folds[fold]
            self.dataset = DatasetDict(
                train=_dataset(task, (*chosen.train, chosen.valid)), test=_dataset(task, (chosen.test,))
            )
            self.data_loaded = True

    return HearScenes()


def _dataset(task: TaskFolder, splits: tuple[str, ...]) -> Any:
    from datasets import Dataset

    found: dict[str, list[Any]] = {"audio": [], "label": []}
    for split in splits:
        for file, labels in sorted(task.labels(split).items()):
            wave = read_wave(task.clip(split, file), SAMPLE_RATE)
            found["audio"].append({"array": wave, "sampling_rate": SAMPLE_RATE})
            found["label"].append(task.index[str(labels[0])])
    return Dataset.from_dict(found)


class RememberingAudio(CodecSSLAudio):
    """Computes the embedding of each distinct clip once, since the folds of a task share their clips."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._known: dict[bytes, NDArray[np.float32]] = {}

    def embed(self, waves: Sequence[Tensor]) -> list[NDArray[np.float32]]:
        keys = [hashlib.sha256(wave.numpy().tobytes()).digest() for wave in waves]
        new = {key: wave for key, wave in zip(keys, waves) if key not in self._known}
        if new:
            self._known.update(zip(new, super().embed(list(new.values()))))
        return [self._known[key] for key in keys]


def evaluate_maeb(folder: Path, model: Any) -> list[float]:
    """Return the accuracy of each fold, 0 to 1, the mean over draws."""
    found = []
    for fold in range(len(TaskFolder(folder).folds)):
        with warnings.catch_warnings():  # MTEB stops its regression after 100 iterations
            warnings.simplefilter("ignore")
            scores = maeb_task(folder, fold).evaluate(model, "test", encode_kwargs={"batch_size": 16})
        found.append(float(scores["default"]["accuracy"]))  # type: ignore[arg-type]
    return found
