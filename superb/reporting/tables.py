"""The report's tables as text, on the console and as Markdown. `web_page.py` makes report.html of the same rows."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from codecssl.superb.paired import LEVEL
from codecssl.superb.reporting.comparison import SAMPLE, Cell, Column, Comparison, compare, load
from codecssl.superb.reporting.superb_score import PUBLISHED, missing, score
from codecssl.superb.reporting.verdicts import beyond_noise, paired_p, sentence
from codecssl.superb.rows import BASELINES, ResultRow
from codecssl.superb.tasks import TASKS

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BASELINES", "SAMPLE", "compare", "console_table", "load", "markdown", "notes", "table_rows"]

MOST_COLUMNS = 7
"""Largest number of columns on the console or in Markdown. Wider tables are transposed."""


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def cell_text(cell: Cell | None, metric: str) -> str:
    """Value times 100, with the deviation over seeds, or with the 95 % interval of one seed's accuracy."""
    value = cell.value(metric) if cell else None
    if cell is None or value is None:
        return ""
    if (deviation := cell.deviation(metric)) is not None:
        return f"{percent(value)} ± {percent(deviation)}"
    if metric != "accuracy":
        return percent(value)
    low, high = cell.interval
    return f"{percent(value)} ({100 * low:.0f}-{100 * high:.0f})"


def difference(one: Cell, other: Cell, metric: str) -> str:
    """Difference in points, with a * if it is significant (95 %).

    The test is paired over test utterances if both cells have their errors. Otherwise, for accuracies, it assumes two
    independent test sets of these sizes.
    """
    values = one.value(metric), other.value(metric)
    if values[0] is None or values[1] is None:
        return ""
    delta, p = values[0] - values[1], None
    if metric == TASKS[one.task].metric:
        p = paired_p(one, other)
    if p is not None:
        return f"{100 * delta:+.1f}{'*' if p < LEVEL else ''}"
    if metric != "accuracy":
        return f"{100 * delta:+.1f}"
    shares = ((values[0], one.utterances), (values[1], other.utterances))
    variance = sum(share * (1 - share) / count for share, count in shares)
    return f"{100 * delta:+.1f}{'*' if abs(delta) > 1.96 * math.sqrt(variance) else ''}"


def heading(column: Column) -> str:
    task, metric = column
    return f"{task} {metric.label} {'↑' if metric.higher_better else '↓'}"


def table_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table: chance, every upstream, then differences to the baselines.

    A SUPERB result also has the score and the published rows. A new column is a heading in `header` and a cell at the
    end of the rows that have one (`upstreams` here, `_published`). Shorter rows are padded with empty cells.
    """
    c = comparison
    header = ["upstream", *(heading(column) for column in c.columns), *(["score"] if c.is_superb else [])]
    upstreams = [
        [name, *(_marked(c, name, column) for column in c.columns), *([_score(c, name)] if c.is_superb else [])]
        for name in c.upstreams
    ]
    differences = [
        [f"{name} − {base}", *(_delta(c, name, base, column) for column in c.columns)] for name, base in c.pairs
    ]
    rows = [_chance(c), *upstreams, *differences, *(_published(c) if c.is_superb else [])]
    return header, [row + [""] * (len(header) - len(row)) for row in rows]


def _marked(c: Comparison, name: str, column: Column) -> str:
    """Text of a cell, in ** if the upstream is significantly better than every other one."""
    task, metric = column
    text = cell_text(c.cells.get((name, task)), metric.key)
    leads = text and metric.key == TASKS[task].metric and beyond_noise(c, name, task)
    return f"**{text}**" if leads else text


def _chance(c: Comparison) -> list[str]:
    chances = {task: cell.runs[0]["chance"] for (_, task), cell in c.cells.items()}
    cells = [percent(chances[task]) if metric.key == "accuracy" else "" for task, metric in c.columns]
    return ["chance (most frequent class)", *cells]


def _delta(c: Comparison, name: str, base: str, column: Column) -> str:
    one, other = c.cells.get((name, column[0])), c.cells.get((base, column[0]))
    return difference(one, other, column[1].key) if one and other else ""


def _row_values(c: Comparison, name: str) -> dict[tuple[str, str], float]:
    """Values for the score in tables' units. Emotion recognition is included only with all its folds."""
    whole = [(task, metric) for task, metric in c.columns if not _untested_folds(c, name, task)]
    values = {(task, metric.key): c.value(name, (task, metric)) for task, metric in whole}
    return {key: 100 * value for key, value in values.items() if value is not None}


def _untested_folds(c: Comparison, name: str, task: str) -> list[int]:
    cell = c.cells.get((name, task))
    return cell.untested_folds if cell else []


def _score(c: Comparison, name: str) -> str:
    found = score(_row_values(c, name))
    return "" if found is None else f"{found:.0f}"


def _published(c: Comparison) -> list[list[str]]:
    found = []
    for name, row in PUBLISHED.items():
        cells = [f"{row[t, m.key]:.2f}" if (t, m.key) in row else "" for t, m in c.columns]
        total = score(row)
        found.append([name, *cells, "" if total is None else f"{total:.0f}"])
    return found


def rates_text(c: Comparison, name: str) -> str:
    """Selected learning rates of all seeds, with their tasks if these differ."""
    won: dict[str, list[str]] = {}
    for task in c.tasks:
        runs = c.cells[name, task].runs if (name, task) in c.cells else ()
        if lrs := sorted({run["learning_rate"] for run in runs if run["learning_rate"] is not None}):
            won.setdefault("/".join(f"{lr:g}" for lr in lrs), []).append(task)
    return next(iter(won), "") if len(won) < 2 else "; ".join(f"{' '.join(t)}: {lr}" for lr, t in won.items())


def notes(comparison: Comparison) -> list[str]:
    """Notes below the table: steps, learning rates, test sizes, significance, seeds and versions."""
    c = comparison
    runs = [run for cell in c.cells.values() for run in cell.runs]
    by_task = {t: next(run for run in runs if run["task"] == t) for t in c.tasks}
    trained = {t: run for t, run in by_task.items() if run["steps"]}
    steps = "; ".join(f"{t} {run['steps']:,} of {run['official_steps']:,}" for t, run in trained.items())
    tested = ", ".join(
        f"{t} {max(c.cells[name, t].utterances for name in c.upstreams if (name, t) in c.cells)}" for t in by_task
    )
    seeds, versions = sorted({run["seed"] for run in runs}), runs[0]["versions"]
    return [
        f"Steps: {steps}. Heads, batch sizes, optimisers: s3prl's own. The upstream is frozen.",
        f"Learning rates tried: {_tried(c)}; selected: {_won(c)}.",
        "; ".join([f"Tested utterances: {tested}", *_spread(c)]) + ".",
        "A difference with a * is significant (95 %; paired over test utterances where answers were kept).",
        *([verdict] if (verdict := sentence(c)) else []),
        *_brief(trained),
        *_choices(c, runs),
        *_skipped(runs),
        *dict.fromkeys(f"{run['task']}: {run['ctc_warning']}." for run in runs if "ctc_warning" in run),
        *_scoring(c),
        f"Seeds: {', '.join(map(str, seeds))}. With s3prl {versions['s3prl']}, torch {versions['torch']}.",
    ]


def _spread(c: Comparison) -> list[str]:
    """Explanations of the spread behind a figure."""
    several = {len(cell.seeds) > 1 for cell in c.cells.values()}
    alone = any(len(cell.seeds) == 1 and TASKS[task].classes for (_, task), cell in c.cells.items())
    return [
        *(["± is the deviation over seeds"] if True in several else []),
        *(["a figure without it is of one seed"] if len(several) > 1 else []),
        *(["in brackets: the 95 % Wilson interval"] if alone else []),
    ]


def _brief(trained: dict[str, ResultRow]) -> list[str]:
    """Warning about heads trained for less than one epoch."""
    seen = {t: (run["steps"] * run["batch"], run["utterances"]["train"]) for t, run in trained.items()}
    short = [f"{t} {count} of {whole}" for t, (count, whole) in seen.items() if count < whole]
    if not short:
        return []
    return [
        f"Trained on less than all training utterances once ({', '.join(short)}): figures of heads that have learned "
        "next to nothing; they do not compare upstreams."
    ]


def _won(c: Comparison) -> str:
    won = {name: rates_text(c, name) for name in c.upstreams}
    return " | ".join(f"{name} {text}" for name, text in won.items() if text) or "none"


def _tried(c: Comparison) -> str:
    tried: dict[str, list[str]] = {}
    for task in c.tasks:
        lrs = sorted({r for (_, t), cell in c.cells.items() if t == task for r in cell.lrs if r is not None})
        if lrs:
            tried.setdefault(", ".join(f"{lr:g}" for lr in lrs), []).append(task)
    return "; ".join(f"{lrs} ({' '.join(tasks)})" for lrs, tasks in tried.items()) or "none"


def _choices(c: Comparison, runs: list[ResultRow]) -> list[str]:
    """Selection criteria, where they are not the validation set alone."""
    found = []
    if "asv" in c.tasks:
        found.append("asv: SUPERB has no validation set; checkpoint and learning rate are the test set's best.")
    if "sd" in c.tasks:
        found.append(
            "sd: no collar, overlap counted; threshold and median filter are the test set's best, as in s3prl."
        )
    if "qbe" in c.tasks:
        layers = {c_name: cell for (c_name, task), cell in c.cells.items() if task == "qbe"}
        chosen = ", ".join(f"{name} {cell.runs[0]['chosen']['layer']}" for name, cell in layers.items())
        found.append(f"qbe: the layer with the best validation MTWV ({chosen}). A seed changes `random` only.")
    if any(run.get("fold") for run in runs):
        found.append("er: the mean over folds, each tested in turn.")
        for name in c.upstreams:
            if lacking := _untested_folds(c, name, "er"):
                found.append(f"er of {name}: without fold {', '.join(map(str, lacking))}.")
    return found


def _skipped(runs: list[ResultRow]) -> list[str]:
    reasons: dict[str, dict[str, int]] = {}
    for run in runs:
        for reason, count in (run.get("skipped") or {}).items():
            tasks = reasons.setdefault(reason, {})
            tasks[run["task"]] = max(count, tasks.get(run["task"], 0))
    texts = [f"{reason}: {', '.join(f'{t} {n}' for t, n in tasks.items())}" for reason, tasks in reasons.items()]
    return [f"Utterances left out or emptied: {'; '.join(texts)}."] if texts else []


def _scoring(c: Comparison) -> list[str]:
    lacking = {name: missing(_row_values(c, name)) for name in c.upstreams} if c.is_superb else {}
    return [f"{name} has no score: {', '.join(tasks)} missing." for name, tasks in lacking.items() if tasks]


def _narrow(comparison: Comparison) -> tuple[list[str], list[list[str]], bool]:
    """`table_rows`, transposed if too wide: one row per metric instead of one per upstream."""
    header, body = table_rows(comparison)
    if len(header) <= MOST_COLUMNS:
        return header, body, False
    header, *body = (list(line) for line in zip(header, *body, strict=True))
    return header, body, True


def console_table(comparison: Comparison) -> "Table":
    from rich.table import Table

    header, body, turned = _narrow(comparison)
    ends = set() if turned else {0, len(comparison.upstreams), len(comparison.upstreams) + len(comparison.pairs)}
    table = Table(title=comparison.claim, caption="\n".join(notes(comparison)), caption_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for i, line in enumerate(body):
        bold = (f"[bold]{cell.strip('*')}[/]" if cell.startswith("**") else cell for cell in line)
        table.add_row(*bold, end_section=i in ends)
    return table


def markdown(comparisons: Sequence[Comparison]) -> str:
    parts = ["# Results"]
    for comparison in comparisons:
        header, body, _ = _narrow(comparison)
        table = [header, ["---"] * len(header), *body]
        parts += [f"## {comparison.claim}", "\n".join(f"| {' | '.join(line)} |" for line in table)]
        parts.append("\n".join(f"- {note}" for note in notes(comparison)))
    return "\n\n".join(parts) + "\n"
