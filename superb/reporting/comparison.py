"""Finished runs grouped into what may stand in one table: per upstream and task the runs that won their sweeps.

Of a learning-rate sweep the run with the best validation metric counts, per seed (and fold); the test metric chooses
nothing, except where SUPERB has no validation set (asv).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from codecssl.superb import results
from codecssl.superb.tasks import TASKS, Budget, Metric
from codecssl.tokenize.common.errors import UserError

BASELINES = ("fbank", "logmel", "mfcc", "codes", "random")
SAMPLE = "sample corpus (synthetic speech)"
Column = tuple[str, Metric]
"""A task's name and one of its metrics."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One upstream on one task, over seeds; each seed's figure is the mean over its folds."""

    task: str
    runs: tuple[results.Row, ...]
    """The winners, one per seed and fold."""
    rates: tuple[float | None, ...]
    """All learning rates tried."""

    @property
    def utterances(self) -> int:
        """Tested, over the folds of one seed."""
        seed = self.runs[0]["seed"]
        return sum(int(run["utterances"]["test"]) for run in self.runs if run["seed"] == seed)

    @property
    def seeds(self) -> list[int]:
        return sorted({run["seed"] for run in self.runs})

    def by_seed(self, metric: str) -> list[float]:
        """Empty where a run lacks the metric."""
        if not all(metric in values_of(run) for run in self.runs):
            return []
        return [fmean(values_of(run)[metric] for run in self.runs if run["seed"] == seed) for seed in self.seeds]

    def value(self, metric: str) -> float | None:
        values = self.by_seed(metric)
        return fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Over seeds (n - 1); None for one."""
        values = self.by_seed(metric)
        return stdev(values) if len(values) > 1 else None

    @property
    def untested_folds(self) -> list[int]:
        """Of emotion recognition taken in turns: those that some seed lacks."""
        from codecssl.superb.corpora.corpus import FOLDS

        tested = {(run["seed"], run["fold"]) for run in self.runs if run.get("fold")}
        return [fold for fold in FOLDS if tested and any((seed, fold) not in tested for seed in self.seeds)]

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval for a share of so many test utterances (the sampling of the test set)."""
        n, z, value = self.utterances, 1.96, self.value("accuracy") or 0.0
        centre = (value + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
        return centre - half, centre + half


def values_of(run: results.Row) -> dict[str, float]:
    """Every metric of a row; older rows have the first one only."""
    return dict(run.get("values") or {run["metric"]: run["value"]})


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What may stand in one table: upstreams on the same data under the same budget."""

    data: str
    official: bool
    """Whether the data are SUPERB's own corpora."""
    budget: Budget
    tasks: tuple[str, ...]
    upstreams: tuple[str, ...]
    """Baselines first."""
    kinds: dict[str, str]
    cells: dict[tuple[str, str], Cell]
    """By (upstream, task)."""

    @property
    def is_superb(self) -> bool:
        return self.official and self.budget.divisor == 1

    @property
    def claim(self) -> str:
        """What the table is, said so that nobody takes it for more."""
        budget = self.budget
        if self.is_superb:
            return f"SUPERB's official corpora, heads, batch sizes and number of steps; data: {self.data}"
        steps = "all" if budget.divisor == 1 else f"1/{budget.divisor} (at least {budget.least})"
        fewer = ", fewer for heavy heads" if budget.lighten else ""
        return f"Not SUPERB: {budget.name} budget, {steps} of the official steps{fewer}; data: {self.data}"

    @property
    def columns(self) -> list[Column]:
        """Those that some run has."""
        pairs = [(task, metric) for task in self.tasks for metric in TASKS[task].metrics]
        return [(t, m) for t, m in pairs if any(c.by_seed(m.key) for (_, task), c in self.cells.items() if task == t)]

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.upstreams if self.kinds[name] in BASELINES]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(upstream, baseline) for every upstream that is not one."""
        others = [name for name in self.upstreams if name not in self.baselines]
        return [(name, base) for name in others for base in self.baselines]

    def value(self, upstream: str, column: Column) -> float | None:
        cell = self.cells.get((upstream, column[0]))
        return cell.value(column[1].key) if cell else None


def compare(rows: Iterable[results.Row]) -> list[Comparison]:
    """Group rows by data and budget, pick each sweep's winner."""
    groups: dict[tuple[str, str, str], list[results.Row]] = {}
    for row in rows:
        key = (row["data"], str(row["manifest_sha256"]), str(sorted(row["budget"].items())))
        groups.setdefault(key, []).append(row)
    return [_compare(group) for _, group in sorted(groups.items())]


def _compare(rows: list[results.Row]) -> Comparison:
    grouped: dict[tuple[str, str], list[results.Row]] = {}
    labels = _labels([row["upstream"] for row in rows])
    for row in rows:
        grouped.setdefault((labels[_identity(row["upstream"])], row["task"]), []).append(row)
    kinds = {labels[_identity(row["upstream"])]: row["upstream"]["kind"] for row in rows}
    known = {field.name for field in fields(Budget)}
    return Comparison(
        data=rows[0]["data"],
        official=rows[0]["manifest_sha256"] is None,
        budget=Budget(**{key: value for key, value in rows[0]["budget"].items() if key in known}),
        tasks=tuple(task for task in TASKS if any(task == t for _, t in grouped)),
        upstreams=tuple(sorted(kinds, key=lambda name: (_order(kinds[name]), name))),
        kinds=kinds,
        cells={key: _cell(key[1], group) for key, group in grouped.items()},
    )


def _identity(upstream: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(upstream[key]) for key in ("name", "argument", "sha256"))


def _labels(upstreams: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], str]:
    """A name for each upstream: as typed, a folder by its last part; where two would share one, its sha256 too."""
    labels: dict[tuple[str, ...], str] = {}
    for upstream in upstreams:
        is_folder = upstream["kind"] == "model"
        labels[_identity(upstream)] = Path(upstream["name"]).name if is_folder else upstream["name"]
    return {key: f"{v} [{key[2][:6]}]" if list(labels.values()).count(v) > 1 else v for key, v in labels.items()}


def _order(kind: str) -> int:
    return BASELINES.index(kind) if kind in BASELINES else len(BASELINES)


def _cell(task: str, rows: list[results.Row]) -> Cell:
    sign = 1 if TASKS[task].higher_better else -1
    winners = {}
    for row in sorted(rows, key=lambda row: _merit(row, sign)):
        winners[row["seed"], row.get("fold") or 0] = row
    rates = {row["learning_rate"] for row in rows}
    return Cell(
        task=task,
        runs=tuple(winners[key] for key in sorted(winners)),
        rates=tuple(sorted(rates, key=lambda rate: rate or 0.0)),
    )


def _merit(row: results.Row, sign: int) -> float:
    """Of a learning rate: the validation figure, or the test's where there is none; what is no number never wins."""
    value = sign * float(row["value"] if row["valid"] is None else row["valid"])
    return -math.inf if math.isnan(value) else value


def load(folders: Sequence[Path]) -> list[Comparison]:
    """The finished runs of several output folders; UserError where there are none."""
    rows: list[results.Row] = [row for folder in folders for row in results.read_rows(folder, "runs")]
    if not rows:
        raise UserError(
            f"report {' '.join(map(str, folders))}: no finished run; give an --output of codecssl-superb run"
        )
    return compare(rows)
