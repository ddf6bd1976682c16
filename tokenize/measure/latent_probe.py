"""Linear probes of a codec's raw latents: the accuracy of predicting a clip's label from their mean and deviation.

A logistic regression of standardized features, as in the evaluation of SemantiCodec's tokens (Liu et al. 2024,
section IV-C). Cross-validated: no clip is in the training part and the test part of one fold.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError

COLUMNS = ("label", "emotion", "language", "speaker", "gender", "accent")
"""Label columns that are probed if the user names none."""
MAX_FOLDS = 5
FEWEST = 3
"""Clips that a class must have. Rarer classes are left out."""


@dataclass(frozen=True, kw_only=True)
class LatentProbe:
    """A column to predict and, optionally, a column whose values are never on both sides of a fold."""

    label: str
    group: str | None = None

    @classmethod
    def parse(cls, text: str) -> LatentProbe:
        """Parse LABEL or LABEL/GROUP."""
        label, _, group = text.partition("/")
        return cls(label=label, group=group or None)

    @property
    def name(self) -> str:
        return self.label if self.group is None else f"{self.label}/{self.group}"


def pool(latents: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return mean and standard deviation over time of latents [D, T], as [2 D]."""
    wide = latents.astype(np.float64)
    return np.concatenate([wide.mean(axis=1), wide.std(axis=1)])


def default_probes(rows: Sequence[dict[str, Any]]) -> list[LatentProbe]:
    """Return a probe for each column of COLUMNS that has at least 2 classes of FEWEST clips in the rows."""
    return [probe for probe in map(LatentProbe.parse, COLUMNS) if len(_usable(rows, probe.label)) > 1]


def _usable(rows: Sequence[dict[str, Any]], column: str) -> set[str]:
    counts = Counter(str(row[column]) for row in rows if row.get(column) is not None)
    return {value for value, count in counts.items() if count >= FEWEST}


def accuracy(features: NDArray[np.float64], rows: Sequence[dict[str, Any]], probe: LatentProbe) -> dict[str, Any]:
    """Return a probe's `accuracy`, `chance` (the share of the commonest class), `classes` and `clips`.

    features: [N, F], one row for each of `rows`. Raises UserError with fewer than 2 classes or groups.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = _usable(rows, probe.label)
    chosen = [
        i
        for i, row in enumerate(rows)
        if str(row.get(probe.label)) in classes and (probe.group is None or row.get(probe.group) is not None)
    ]
    labels = np.array([str(rows[i][probe.label]) for i in chosen])
    if len(classes) < 2 or len(set(labels)) < 2:
        raise UserError(f"--label {probe.name}: no two classes have {FEWEST} clips or more; give another column")
    x, right = features[chosen], 0
    for train, test in _folds(labels, [rows[i].get(probe.group) for i in chosen] if probe.group else None, probe):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not converged to the last digit
            right += int((model.fit(x[train], labels[train]).predict(x[test]) == labels[test]).sum())
    commonest = max(Counter(labels.tolist()).values())
    return {
        "accuracy": right / len(labels),
        "chance": commonest / len(labels),
        "classes": len(set(labels)),
        "clips": len(labels),
    }


def _folds(labels: NDArray[np.str_], groups: list[Any] | None, probe: LatentProbe) -> list[tuple[Any, Any]]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is None:
        count = min(MAX_FOLDS, min(Counter(labels.tolist()).values()))
        return list(StratifiedKFold(count, shuffle=True, random_state=0).split(labels, labels))
    names = np.array([str(group) for group in groups])
    if len(set(names)) < 2:
        raise UserError(f"--label {probe.name}: all clips have one {probe.group}; give another column after the slash")
    splitter = StratifiedGroupKFold(min(MAX_FOLDS, len(set(names))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class with fewer members than folds
        found = list(splitter.split(labels, labels, names))
    return [(train, test) for train, test in found if len(test) and len(set(labels[train])) > 1]
