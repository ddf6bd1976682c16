"""HEAR's evaluation of an upstream on a task folder: embeddings once, then the predictor on each fold."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import ParameterGrid
from torch import Tensor

from codecssl.superb.hear.metrics import Event, metric
from codecssl.superb.hear.predictor import (
    MEDIAN_MS,
    SHORTEST_MS,
    Perceptron,
    PredictorSettings,
    TrainedPredictor,
    events_of,
    predict,
    train,
)
from codecssl.superb.hear.task_folder import Fold, TaskFolder
from codecssl.superb.suites.hear_2021 import HearModel, get_timestamp_embeddings
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.tokenize.sources.audio import read_wave

BATCH = 16
"""Clips that go through the upstream together."""


@dataclass(frozen=True, kw_only=True)
class SplitData:
    """Embeddings of a split: a row for each clip, or for each time of each clip of an event task."""

    embeddings: Tensor
    """[N, D]"""
    targets: Tensor
    """One-hot or multi-hot, [N, C]."""
    files: list[str]
    """File of each row."""
    times: NDArray[np.float64]
    """Milliseconds of each row of an event task, [N]."""
    events: dict[str, list[Event]]
    """Events of each file of an event task."""


def evaluate(task: TaskFolder, model: HearModel, settings: PredictorSettings) -> dict[str, Any]:
    """Train and test the predictor on each fold.

    Returns "scores" (mean over folds of each of the task's metrics), "deviations", "folds" (the metrics of each),
    "point" (of the grid), "valid" and "epochs" (best validation score and its epoch, of each fold).
    """
    data = {split: embed(task, split, model) for split in task.splits}
    tried = [_train(task, data, task.folds[0], [point], settings)[0] for point in settings.drawn()]
    best = max(tried, key=lambda one: one.score)
    trained = [best, *(_train(task, data, fold, [best.point], settings)[0] for fold in task.folds[1:])]
    folds = [_test(task, data, fold, one) for fold, one in zip(task.folds, trained, strict=True)]
    values = {name: [fold[name] for fold in folds] for name in task.metrics}
    return {
        "scores": {name: float(np.mean(found)) for name, found in values.items()},
        "deviations": {name: float(np.std(found)) for name, found in values.items()},
        "folds": folds,
        "point": asdict(best.point),
        "valid": [one.score for one in trained],
        "epochs": [one.epoch for one in trained],
    }


@torch.no_grad()
def embed(task: TaskFolder, split: str, model: HearModel) -> SplitData:
    """Embed the clips of a split."""
    labels = task.labels(split)
    files = sorted(labels)
    rows: list[Tensor] = []
    names: list[str] = []
    times: list[Tensor] = []
    targets: list[Tensor] = []
    for start in range(0, len(files), 1 if task.events else BATCH):
        some = files[start : start + (1 if task.events else BATCH)]
        waves = [torch.from_numpy(read_wave(task.clip(split, file), SAMPLE_RATE)) for file in some]
        if task.events:
            found, at = get_timestamp_embeddings(waves[0][None], model)
            rows.append(found[0])
            times.append(at[0].double())
            names += some * found.shape[1]
            targets.append(_active(task, labels[some[0]], times[-1]))
        else:
            rows += [frames.double().mean(0, keepdim=True).float() for frames in model.features(waves)]
            names += some
            targets += [_multi_hot(task, labels[file])[None] for file in some]
    return SplitData(
        embeddings=torch.cat(rows),
        targets=torch.cat(targets),
        files=names,
        times=torch.cat(times).numpy() if times else np.zeros(0),
        events=task.event_lists(split) if task.events else {},
    )


def _multi_hot(task: TaskFolder, labels: Sequence[Any]) -> Tensor:
    found = torch.zeros(len(task.vocabulary))
    found[[task.index[str(label)] for label in labels]] = 1.0
    return found


def _active(task: TaskFolder, events: Sequence[dict[str, Any]], times: Tensor) -> Tensor:
    """Labels that are active at each time in milliseconds, [T, C]; an event includes both its ends."""
    found = torch.zeros(len(times), len(task.vocabulary))
    for event in events:
        during = (times >= float(event["start"])) & (times <= float(event["end"]))
        found[during, task.index[str(event["label"])]] = 1.0
    return found


def _train(
    task: TaskFolder, data: dict[str, SplitData], fold: Fold, points: Sequence[Any], settings: PredictorSettings
) -> list[TrainedPredictor]:
    embeddings = torch.cat([data[split].embeddings for split in fold.train])
    targets = torch.cat([data[split].targets for split in fold.train])

    def validate(model: Perceptron) -> float:
        return _validated(task, model, data[fold.valid])[0]

    multilabel = task.multilabel or task.events
    return [train(embeddings, targets, validate, point, settings, multilabel=multilabel) for point in points]


def _validated(task: TaskFolder, model: Perceptron, data: SplitData) -> tuple[float, dict[str, float]]:
    """Score by the task's first metric, higher is better, and the smoothing of events that gives it."""
    first = metric(task.metrics[0])
    sign = 1.0 if first.higher_is_better else -1.0
    probabilities = predict(model, data.embeddings, multilabel=task.multilabel or task.events)
    if not task.events:
        return sign * float(np.nan_to_num(first(probabilities, data.targets.numpy()), nan=0.0)), {}
    found = []
    for smoothing in ParameterGrid({"median_ms": MEDIAN_MS, "shortest_ms": SHORTEST_MS}):
        value = first(_events(task, probabilities, data, smoothing), data.events)
        found.append((sign * float(np.nan_to_num(value, nan=0.0)), smoothing))
    return max(found, key=lambda pair: pair[0])


def _events(
    task: TaskFolder, probabilities: NDArray[np.float64], data: SplitData, smoothing: dict[str, float]
) -> dict[str, list[Event]]:
    files = np.array(data.files)
    return {
        file: events_of(probabilities[files == file], data.times[files == file], task.vocabulary, **smoothing)
        for file in data.events
    }


def _test(task: TaskFolder, data: dict[str, SplitData], fold: Fold, trained: TrainedPredictor) -> dict[str, float]:
    test, multilabel = data[fold.test], task.multilabel or task.events
    probabilities = predict(trained.model, test.embeddings, multilabel=multilabel)
    found: Any = probabilities
    expected: Any = test.targets.numpy()
    if task.events:
        _, smoothing = _validated(task, trained.model, data[fold.valid])
        found, expected = _events(task, probabilities, test, smoothing), test.events
    return {name: metric(name)(found, expected) for name in task.metrics}
