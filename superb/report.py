"""Tables of finished runs: on the console, as report.md and as one self-contained report.html.

Of a learning-rate sweep the run with the best validation metric counts; the test metric chooses nothing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codecssl.superb import results
from codecssl.superb.tasks import TASKS, Budget
from codecssl.tokenize.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

BASELINES = ("fbank", "codes", "random")
SAMPLE = "sample corpus (synthetic speech)"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One upstream on one task: the mean over seeds of the runs that won their sweeps."""

    value: float
    utterances: int  # tested
    runs: tuple[results.Row, ...]  # the winners, one per seed
    rates: tuple[float, ...]  # all learning rates tried

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval for a share of so many test utterances (the sampling of the test set)."""
        n, z = self.utterances, 1.96
        centre = (self.value + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.value * (1 - self.value) / n + z * z / (4 * n * n))
        return centre - half, centre + half


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What may stand in one table: upstreams on the same data under the same budget."""

    data: str
    budget: Budget
    tasks: tuple[str, ...]
    upstreams: tuple[str, ...]  # baselines first
    kinds: dict[str, str]
    cells: dict[tuple[str, str], Cell]  # by (upstream, task)

    @property
    def claim(self) -> str:
        """What the table is, said so that nobody takes it for more."""
        budget = self.budget
        if budget.name == "full" and self.data != SAMPLE:
            return f"SUPERB's official heads, batch sizes and number of steps, on {self.data}"
        steps = "all" if budget.divisor == 1 else f"1/{budget.divisor} (at least {budget.least})"
        return f"Not SUPERB: {budget.name} budget, {steps} of the official steps; data: {self.data}"

    @property
    def baselines(self) -> list[str]:
        return [name for name in self.upstreams if self.kinds[name] in BASELINES]

    def deltas(self) -> list[tuple[str, str, list[str]]]:
        """(upstream, baseline, difference per task) for every upstream that is not a baseline."""
        others = [name for name in self.upstreams if name not in self.baselines]
        pairs = [(name, base) for name in others for base in self.baselines]
        return [(name, base, [self._delta(name, base, task) for task in self.tasks]) for name, base in pairs]

    def _delta(self, upstream: str, baseline: str, task: str) -> str:
        one, other = self.cells.get((upstream, task)), self.cells.get((baseline, task))
        return difference(one, other) if one and other else ""


def difference(one: Cell, other: Cell) -> str:
    """In points, with a * where two test sets of these sizes would differ by less in 95 % of draws
    (unpaired).
    """
    variance = sum(cell.value * (1 - cell.value) / cell.utterances for cell in (one, other))
    delta = one.value - other.value
    return f"{100 * delta:+.1f}{'*' if abs(delta) > 1.96 * math.sqrt(variance) else ''}"


def compare(rows: Iterable[results.Row]) -> list[Comparison]:
    """Group rows by data and budget, pick each sweep's winner, average over seeds."""
    groups: dict[tuple[str, str, str], list[results.Row]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["manifest_sha256"], str(sorted(row["budget"].items()))), []).append(row)
    return [_compare(group[0]["data"], Budget(**group[0]["budget"]), group) for _, group in sorted(groups.items())]


def _compare(data: str, budget: Budget, rows: list[results.Row]) -> Comparison:
    cells: dict[tuple[str, str], list[results.Row]] = {}
    labels = _labels([row["upstream"] for row in rows])
    for row in rows:
        cells.setdefault((labels[_identity(row["upstream"])], row["task"]), []).append(row)
    kinds = {labels[_identity(row["upstream"])]: row["upstream"]["kind"] for row in rows}
    return Comparison(
        data=data,
        budget=budget,
        tasks=tuple(task for task in TASKS if any(task == t for _, t in cells)),
        upstreams=tuple(sorted(kinds, key=lambda name: (_order(kinds[name]), name))),
        kinds=kinds,
        cells={key: _cell(TASKS[key[1]].higher_better, group) for key, group in cells.items()},
    )


def _identity(upstream: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(upstream[key]) for key in ("name", "argument", "sha256"))


def _labels(upstreams: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], str]:
    """A name for each upstream: as typed, a folder by its last part; where two would share one, its sha256
    too.
    """
    labels: dict[tuple[str, ...], str] = {}
    for upstream in upstreams:
        is_folder = upstream["kind"] == "model"
        labels[_identity(upstream)] = Path(upstream["name"]).name if is_folder else upstream["name"]
    return {key: f"{v} [{key[2][:6]}]" if list(labels.values()).count(v) > 1 else v for key, v in labels.items()}


def _order(kind: str) -> int:
    return BASELINES.index(kind) if kind in BASELINES else len(BASELINES)


def _cell(higher_better: bool, rows: list[results.Row]) -> Cell:
    sign = 1 if higher_better else -1
    winners = {}
    for row in sorted(rows, key=lambda row: sign * row["valid"]):
        winners[row["seed"]] = row
    values = [row["value"] for row in winners.values()]
    return Cell(
        value=sum(values) / len(values),
        utterances=rows[0]["utterances"]["test"],
        runs=tuple(winners[seed] for seed in sorted(winners)),
        rates=tuple(sorted({row["learning_rate"] for row in rows})),
    )


def load(folders: Sequence[Path]) -> list[Comparison]:
    """The finished runs of several output folders; UserError where there are none."""
    rows: list[results.Row] = [row for folder in folders for row in results.read_rows(folder, "runs")]
    if not rows:
        raise UserError(
            f"report {' '.join(map(str, folders))}: no finished run; give an --output of codecssl-superb run"
        )
    return compare(rows)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def cell_text(cell: Cell | None) -> str:
    """Accuracy in percent with its 95 % interval."""
    if cell is None:
        return ""
    low, high = cell.interval
    return f"{percent(cell.value)} ({100 * low:.0f}-{100 * high:.0f})"


def lines(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the main table: chance, every upstream, then differences to the baselines."""
    c = comparison
    header = ["upstream", *(f"{t} acc %" for t in c.tasks), "learning rate"]
    chance = {t: next(cell.runs[0]["chance"] for (_, task), cell in c.cells.items() if task == t) for t in c.tasks}
    body = [["chance (most frequent class)", *(percent(chance[t]) for t in c.tasks), ""]]
    for name in c.upstreams:
        cells = [c.cells.get((name, t)) for t in c.tasks]
        body.append([name, *(cell_text(cell) for cell in cells), rates_text(cells)])
    for name, base, deltas in c.deltas():
        body.append([f"{name} − {base}", *deltas, ""])
    return header, body


def rates_text(cells: Sequence[Cell | None]) -> str:
    """The learning rates that won, in the order of the tasks, once where they agree."""
    rates = [f"{run['learning_rate']:g}" for cell in cells if cell for run in cell.runs[:1]]
    return rates[0] if len(set(rates)) == 1 else " ".join(rates)


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know beside the numbers."""
    c = comparison
    runs = [run for cell in c.cells.values() for run in cell.runs]
    by_task = {t: next(run for run in runs if run["task"] == t) for t in c.tasks}
    steps = "; ".join(f"{t} {run['steps']:,} of {run['official_steps']:,}" for t, run in by_task.items())
    tested = ", ".join(f"{t} {run['utterances']['test']}" for t, run in by_task.items())
    rates = sorted({rate for cell in c.cells.values() for rate in cell.rates})
    swept = "the best on the validation set of " if len(rates) > 1 else ""
    seeds, versions = sorted({run["seed"] for run in runs}), runs[0]["versions"]
    raised = " (official: 1e-4; a short run needs more)" if c.budget.divisor > 1 else ""
    return [
        f"Steps: {steps}. Heads, batch sizes, optimisers: s3prl's own. The upstream is frozen.",
        f"Learning rate: {swept}{', '.join(f'{rate:g}' for rate in rates)}{raised}.",
        f"Tested utterances: {tested}; in brackets the 95 % interval that so few allow (Wilson).",
        "A difference with a * is larger than test sets of this size explain (95 %, unpaired).",
        f"Seeds: {', '.join(map(str, seeds))}. With s3prl {versions['s3prl']}, torch {versions['torch']}.",
    ]


def console_table(comparison: Comparison) -> "Table":
    from rich.table import Table

    header, body = lines(comparison)
    table = Table(title=comparison.claim, caption="\n".join(notes(comparison)), caption_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for i, line in enumerate(body):
        table.add_row(*line, end_section=i in (0, len(comparison.upstreams)))
    return table


def markdown(comparisons: Sequence[Comparison]) -> str:
    parts = ["# Results"]
    for comparison in comparisons:
        header, body = lines(comparison)
        table = [header, ["---"] * len(header), *body]
        parts += [f"## {comparison.claim}", "\n".join(f"| {' | '.join(line)} |" for line in table)]
        parts.append("\n".join(f"- {note}" for note in notes(comparison)))
    return "\n\n".join(parts) + "\n"


def write(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """report.md and report.html in `folder`."""
    from codecssl.superb.page import html

    texts: dict[str, Any] = {"report.md": markdown(comparisons), "report.html": html(comparisons)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]
