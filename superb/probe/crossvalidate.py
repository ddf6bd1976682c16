"""Accuracy of a linear reader of features, layer by layer, with the layer chosen inside the training folds.

Features are standardised on the training folds and read by logistic regression. Folds keep the values of a
group column apart (unseen speakers), else they are stratified.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from codecssl.superb.results import Row
from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to probe. C is the inverse strength of the L2 penalty on standardised features."""

    folds: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    C: float = 0.1
    max_iterations: int = 1000
    device: str = "cpu"
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.folds < 3:
            raise UserError(f"folds {self.folds}: at least 3, since layers are chosen by the folds that remain")


def evaluate(features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, settings: Settings) -> Row:
    """Accuracies of pooled features [N, L, D].

    "layers": mean over seeds per layer; "best_layer": of the layer that the training folds chose, fold by
    fold; "optimistic_layer": of the layer that is best in "layers", which has seen the test folds.
    """
    by_seed = [_one_seed(features, labels, groups, settings, seed) for seed in settings.seeds]
    layers = np.mean([layers for layers, _, _ in by_seed], axis=0)
    nested = [accuracy for _, accuracy, _ in by_seed]
    return {
        "layers": [round(float(value), 5) for value in layers],
        "best_layer": round(float(np.mean(nested)), 5),
        "best_layer_deviation": round(float(np.std(nested)), 5),
        "chosen_layers": [chosen for _, _, chosen in by_seed],
        "optimistic_layer": round(float(layers.max()), 5),
    }


def _one_seed(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, settings: Settings, seed: int
) -> tuple[np.ndarray, float, list[int]]:
    """Accuracy per layer, accuracy with the layer chosen in each fold's training part, those layers.

    The model that chooses a layer for test fold f by validation fold g is trained on all other folds; it is
    the same one that chooses for g by f, so that each pair is fitted once.
    """
    from joblib import Parallel, delayed

    fold, count = assign_folds(labels, groups, settings.folds, seed), features.shape[1]
    held_out = [(f,) for f in range(settings.folds)] + list(combinations(range(settings.folds), 2))
    work = [(layer, out) for layer in range(count) for out in held_out]
    fits = Parallel(n_jobs=settings.jobs)(
        delayed(_right)(features[:, layer], labels, np.isin(fold, out), settings) for layer, out in work
    )
    right = dict(zip(work, fits, strict=True))  # (layer, folds held out) -> [N], NaN where trained on
    tested = np.stack(
        [np.nansum([right[layer, (f,)] == 1 for f in range(settings.folds)], axis=0) for layer in range(count)]
    )
    chosen = []
    for f in range(settings.folds):
        others = [g for g in range(settings.folds) if g != f]
        inner = [
            np.mean([right[layer, (min(f, g), max(f, g))][fold == g].mean() for g in others]) for layer in range(count)
        ]
        chosen.append(int(np.argmax(inner)))
    nested = np.concatenate([tested[chosen[f], fold == f] for f in range(settings.folds)])
    return tested.mean(axis=1), float(nested.mean()), chosen


def assign_folds(labels: np.ndarray, groups: np.ndarray | None, folds: int, seed: int) -> np.ndarray:
    """The fold of each row."""
    from sklearn.model_selection import GroupKFold, StratifiedKFold

    kind = StratifiedKFold if groups is None else GroupKFold
    fold = np.empty(len(labels), dtype=int)
    for number, (_, test) in enumerate(kind(folds, shuffle=True, random_state=seed).split(labels, labels, groups)):
        fold[test] = number
    return fold


def _right(features: np.ndarray, labels: np.ndarray, out: np.ndarray, settings: Settings) -> np.ndarray:
    """Fit on the rows not held out; 1 or 0 for each row that is, NaN for the others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=settings.C, max_iter=settings.max_iterations))
    model.fit(features[~out], labels[~out])
    right = np.full(len(labels), np.nan)
    right[out] = model.predict(features[out]) == labels[out]
    return right
