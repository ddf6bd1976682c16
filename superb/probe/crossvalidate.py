"""Accuracy of a linear classifier of features per layer, by nested cross-validation.

Features are standardised on the training folds and classified by logistic regression. The training folds alone choose
the strength of its penalty and the layer. With a group column, no two folds share its values (unseen speakers).
Otherwise folds are stratified.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from codecssl.superb.probe.logistic import fit_predict
from codecssl.superb.rows import ResultRow
from codecssl.tokenize.common.errors import UserError

GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a probe.

    C: inverse strengths of the L2 penalty on standardised features, of which the training folds choose one.
    pool: statistics of each feature over time, either its mean and standard deviation or its mean.
    """

    folds: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    C: tuple[float, ...] = GRID
    pool: Literal["meanstd", "mean"] = "meanstd"
    device: str = "cpu"
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.folds < 3:
            raise UserError(f"folds {self.folds}: must be at least 3, because the remaining folds select the layer")
        if not self.C or min(self.C) <= 0:
            raise UserError(f"C {self.C}: give at least one value, each above 0")


def evaluate(features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, settings: Settings) -> ResultRow:
    """Accuracies of pooled features [N, L, D].

    "layers": mean over seeds per layer, with C chosen by the training folds. "best_layer": accuracy with the layer and
    C that the training folds chose, fold by fold. "optimistic_layer": accuracy of the best layer in "layers", a choice
    that uses the test folds. "right": per seed a string of N digits, 1 for a right answer of "best_layer".
    """
    features = np.asarray(features, dtype=np.float64)
    by_seed = [_one_seed(features, labels, groups, settings, seed) for seed in settings.seeds]
    layers = np.mean([seed.layers for seed in by_seed], axis=0)
    nested = [float(seed.right.mean()) for seed in by_seed]
    return {
        "layers": [round(float(value), 5) for value in layers],
        "best_layer": round(float(np.mean(nested)), 5),
        "best_layer_deviation": round(float(np.std(nested)), 5),
        "chosen_layers": [seed.chosen_layers for seed in by_seed],
        "chosen_C": [seed.chosen_strengths for seed in by_seed],
        "optimistic_layer": round(float(layers.max()), 5),
        "right": ["".join("1" if right else "0" for right in seed.right) for seed in by_seed],
    }


@dataclass(frozen=True, kw_only=True)
class _Seed:
    layers: np.ndarray
    """Accuracy of each layer [L]."""
    right: np.ndarray
    """Right answers of the chosen layers, bool [N]."""
    chosen_layers: list[int]
    chosen_strengths: list[float]


def _one_seed(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray | None, settings: Settings, seed: int
) -> _Seed:
    """Test accuracies with layer and C chosen in each fold's training part.

    The models that choose for test fold f by validation fold g are trained on all other folds. The choice for g by f
    uses the same models. Each pair of folds is therefore fitted once.
    """
    from joblib import Parallel, delayed

    fold, layers = assign_folds(labels, groups, settings.folds, seed), range(features.shape[1])
    run = Parallel(n_jobs=settings.jobs)
    pairs = [(layer, out) for layer in layers for out in combinations(range(settings.folds), 2)]
    fits = run(delayed(_right)(features[:, la], labels, np.isin(fold, out), settings.C) for la, out in pairs)
    inner = dict(zip(pairs, fits, strict=True))  # (layer, folds held out) -> [C, N], NaN where trained on
    scores = np.zeros((settings.folds, len(layers), len(settings.C)))
    for f in range(settings.folds):
        for layer in layers:
            others = [g for g in range(settings.folds) if g != f]
            found = [inner[layer, (min(f, g), max(f, g))][:, fold == g].mean(axis=1) for g in others]
            scores[f, layer] = np.mean(found, axis=0)
    strength = scores.argmax(axis=2)  # [F, L]
    work = [(layer, f) for layer in layers for f in range(settings.folds)]
    fits = run(
        delayed(_right)(features[:, layer], labels, fold == f, (settings.C[strength[f, layer]],)) for layer, f in work
    )
    tested = np.zeros((len(layers), len(labels)), dtype=bool)
    for (layer, f), right in zip(work, fits, strict=True):
        tested[layer, fold == f] = right[0, fold == f] == 1
    chosen = [int(scores[f].max(axis=1).argmax()) for f in range(settings.folds)]
    right = np.array([tested[chosen[f], i] for i, f in enumerate(fold)])
    strengths = [settings.C[strength[f, layer]] for f, layer in enumerate(chosen)]
    return _Seed(layers=tested.mean(axis=1), right=right, chosen_layers=chosen, chosen_strengths=strengths)


def assign_folds(labels: np.ndarray, groups: np.ndarray | None, folds: int, seed: int) -> np.ndarray:
    """Fold of each row."""
    from sklearn.model_selection import GroupKFold, StratifiedKFold

    kind = StratifiedKFold if groups is None else GroupKFold
    fold = np.empty(len(labels), dtype=int)
    for number, (_, test) in enumerate(kind(folds, shuffle=True, random_state=seed).split(labels, labels, groups)):
        fold[test] = number
    return fold


def _right(features: np.ndarray, labels: np.ndarray, out: np.ndarray, grid: tuple[float, ...]) -> NDArray[np.float64]:
    """Fit on the rows not held out. Return [C, N]: 1 (right) or 0 for each held-out row, NaN for the others."""
    classes, known = np.unique(labels[~out], return_inverse=True)
    found = np.full((len(grid), len(labels)), np.nan)
    predicted = fit_predict(features[~out], known, features[out], grid)
    found[:, out] = classes[predicted] == labels[out]
    return found
