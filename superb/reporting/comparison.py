"""Group finished runs into comparable tables: per upstream and task, the best run of each learning-rate sweep.

The best run has the best validation metric, per seed (and fold). The test metric is not used for selection, except
where SUPERB has no validation set (asv).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from codecssl.superb import results
from codecssl.superb.rows import BASELINES, ResultRow
from codecssl.superb.tasks import TASKS, Budget, Metric
from codecssl.tokenize.common.errors import UserError

SAMPLE = "sample corpus (synthetic speech)"
MOST_DEVIATIONS = 6
"""Number of deviations from the official data that a claim lists."""
Column = tuple[str, Metric]
"""A task's name and one of its metrics."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One upstream on one task, over seeds; each seed's figure is the mean over its folds."""

    task: str
    runs: tuple[ResultRow, ...]
    """The winners, one per seed and fold."""
    lrs: tuple[float | None, ...]
    """All learning rates tried."""

    @property
    def utterances(self) -> int:
        """Number of test utterances, summed over the folds of one seed."""
        seed = self.runs[0]["seed"]
        return sum(int(run["utterances"]["test"]) for run in self.runs if run["seed"] == seed)

    @property
    def seeds(self) -> list[int]:
        return sorted({run["seed"] for run in self.runs})

    def by_seed(self, metric: str) -> list[float]:
        """Value of each seed. Empty if a run lacks the metric."""
        if not all(metric in values_of(run) for run in self.runs):
            return []
        return [fmean(values_of(run)[metric] for run in self.runs if run["seed"] == seed) for seed in self.seeds]

    def value(self, metric: str) -> float | None:
        values = self.by_seed(metric)
        return fmean(values) if values else None

    def deviation(self, metric: str) -> float | None:
        """Standard deviation over seeds (n - 1). None for one seed."""
        values = self.by_seed(metric)
        return stdev(values) if len(values) > 1 else None

    @property
    def untested_folds(self) -> list[int]:
        """Folds of emotion recognition that at least one seed has not tested, if runs are per fold."""
        from codecssl.superb.corpora.corpus import FOLDS

        tested = {(run["seed"], run["fold"]) for run in self.runs if run.get("fold")}
        return [fold for fold in FOLDS if tested and any((seed, fold) not in tested for seed in self.seeds)]

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, given the number of test utterances."""
        n, z, value = self.utterances, 1.96, self.value("accuracy") or 0.0
        centre = (value + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
        return centre - half, centre + half


def values_of(run: ResultRow) -> dict[str, float]:
    """Return all metrics of a row. Older rows have only the first one."""
    return dict(run.get("values") or {run["metric"]: run["value"]})


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Upstreams that are comparable in one table: same data, same budget."""

    data: str
    official: bool
    """True if the data are SUPERB's official corpora."""
    budget: Budget
    tasks: tuple[str, ...]
    upstreams: tuple[str, ...]
    """Names of the upstreams, baselines first."""
    kinds: dict[str, str]
    cells: dict[tuple[str, str], Cell]
    """Cells by (upstream, task)."""

    @property
    def is_full(self) -> bool:
        """True for all official steps on corpora in the official layout, complete or not."""
        return self.official and self.budget.divisor == 1

    @property
    def is_superb(self) -> bool:
        return self.is_full and not self.deviations

    @property
    def deviations(self) -> list[str]:
        """Counts of files, speakers, trials and labels that are not those of SUPERB's data, by task."""
        found: dict[str, None] = {}
        for (_, task), cell in self.cells.items():
            for run in cell.runs:
                for text in run.get("not_official", ["the counts were not checked (result of an earlier release)"]):
                    found[f"{task}: {text}"] = None
        return list(found)

    @property
    def claim(self) -> str:
        """Description of the table that states whether it is a SUPERB result."""
        budget = self.budget
        if self.is_superb:
            return f"SUPERB's official corpora, heads, batch sizes and number of steps; data: {self.data}"
        if self.is_full:
            texts = self.deviations
            more = f"; and {len(texts) - MOST_DEVIATIONS} more" if len(texts) > MOST_DEVIATIONS else ""
            return f"Not SUPERB: not the official data: {'; '.join(texts[:MOST_DEVIATIONS])}{more}; data: {self.data}"
        steps = "all" if budget.divisor == 1 else f"1/{budget.divisor} (at least {budget.least})"
        fewer = ", fewer for heavy heads" if budget.lighten else ""
        return f"Not SUPERB: {budget.name} budget, {steps} of the official steps{fewer}; data: {self.data}"

    @property
    def columns(self) -> list[Column]:
        """Columns for which at least one upstream has values."""
        pairs = [(task, metric) for task in self.tasks for metric in TASKS[task].metrics]
        return [(t, m) for t, m in pairs if any(c.by_seed(m.key) for (_, task), c in self.cells.items() if task == t)]

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.upstreams if self.kinds[name] in BASELINES]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs (upstream, baseline) for each upstream that is not a baseline."""
        others = [name for name in self.upstreams if name not in self.baselines]
        return [(name, base) for name in others for base in self.baselines]

    def value(self, upstream: str, column: Column) -> float | None:
        cell = self.cells.get((upstream, column[0]))
        return cell.value(column[1].key) if cell else None


def compare(rows: Iterable[ResultRow]) -> list[Comparison]:
    """Group rows by data and budget, and select the best run of each sweep."""
    groups: dict[tuple[str, str, str], list[ResultRow]] = {}
    for row in rows:
        key = (row["data"], str(row["manifest_sha256"]), str(sorted(row["budget"].items())))
        groups.setdefault(key, []).append(row)
    return [_compare(group) for _, group in sorted(groups.items())]


def _compare(rows: list[ResultRow]) -> Comparison:
    grouped: dict[tuple[str, str], list[ResultRow]] = {}
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
    """Name of each upstream: as typed, or the last part of a folder. Equal names also get the sha256."""
    labels: dict[tuple[str, ...], str] = {}
    for upstream in upstreams:
        is_folder = upstream["kind"] == "model"
        labels[_identity(upstream)] = Path(upstream["name"]).name if is_folder else upstream["name"]
    return {key: f"{v} [{key[2][:6]}]" if list(labels.values()).count(v) > 1 else v for key, v in labels.items()}


def _order(kind: str) -> int:
    return BASELINES.index(kind) if kind in BASELINES else len(BASELINES)


def _cell(task: str, rows: list[ResultRow]) -> Cell:
    sign = 1 if TASKS[task].higher_better else -1
    winners = {}
    for row in sorted(rows, key=lambda row: _merit(row, sign)):
        winners[row["seed"], row.get("fold") or 0] = row
    lrs = {row["learning_rate"] for row in rows}
    return Cell(
        task=task,
        runs=tuple(winners[key] for key in sorted(winners)),
        lrs=tuple(sorted(lrs, key=lambda lr: lr or 0.0)),
    )


def _merit(row: ResultRow, sign: int) -> float:
    """Selection score of a run: its validation metric, or the test metric without one. NaN scores lowest."""
    value = sign * float(row["value"] if row["valid"] is None else row["valid"])
    return -math.inf if math.isnan(value) else value


def load(folders: Sequence[Path]) -> list[Comparison]:
    """Load the finished runs of several output folders. Raises UserError if there are none."""
    rows: list[ResultRow] = [row for folder in folders for row in results.read_rows(folder, "runs")]
    if not rows:
        raise UserError(
            f"report {' '.join(map(str, folders))}: no finished run; give an --output of codecssl-superb run"
        )
    return compare(rows)
