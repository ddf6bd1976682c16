"""A scene task folder of HEAR as a classification task of MTEB: 8 clips of each class, logistic regression, 10 draws.

task = maeb_task(Path("tasks/environment-codecssl1-full"))
scores = task.evaluate(codecssl.superb.suites.maeb.load("model"), "test", encode_kwargs={"batch_size": 16})
"""

from pathlib import Path
from typing import Any

from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata

from codecssl.superb.hear.task_folder import TaskFolder
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.audio import read_wave


def maeb_task(folder: Path) -> AbsTaskClassification:
    """Build the task: the first fold's test split tests, its others train. Raises UserError for event tasks."""
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

        def load_data(self, **options: Any) -> None:
            from datasets import DatasetDict

            fold = task.folds[0]
            self.dataset = DatasetDict(
                train=_dataset(task, (*fold.train, fold.valid)), test=_dataset(task, (fold.test,))
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
