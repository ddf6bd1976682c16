"""The table of the suites' results: a row for each suite, task and metric, a column for each upstream."""

from pathlib import Path
from typing import Any

from codecssl.superb import results
from codecssl.superb.rows import BASELINES

ACCURACIES = ("top1_acc", "pitch_acc", "chroma_acc", "accuracy", "mlp", "knn")
"""Metrics that are proportions of clips."""
NOTE = (
    "Frozen embeddings. hear: HEAR's predictor. x-ares: a linear layer (mlp) and a"
    " kNN. maeb: logistic regression on 8 clips of each class, mean of 3 draws in each fold. Mean over folds,"
    " with the deviation over folds where it is known. Higher is better, but for segment_1s_er. Bold: accuracies above"
    " every other in the row by more than 1.96 binomial standard errors of the difference."
)


def write_table(output: Path) -> Path:
    """Write hear.md from all results in `output`."""
    rows = [results.read_json(path) for suite in ("hear", "x-ares", "maeb")
            for path in sorted(output.glob(f"{suite}/*/*/result.json"))]  # fmt: skip
    columns = list(dict.fromkeys(map(_column, sorted(rows, key=_order))))
    lines = ["| suite | task | metric | " + " | ".join(columns) + " |", "|---" * (len(columns) + 3) + "|"]
    by_task: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault((row.get("suite", "hear"), row["task"]), []).append(row)
    for (suite, task), found in by_task.items():
        for name in found[0]["metrics"]:
            best = _clear_best(found, name)
            cells = {_column(row): f"**{cell(row, name)}**" if row is best else cell(row, name) for row in found}
            texts = " | ".join(cells.get(column, "") for column in columns)
            lines.append(f"| {suite} | {task} | {name} | {texts} |")
    results.write_text(output / "hear.md", "# HEAR tasks\n\n" + "\n".join(lines) + f"\n\n{NOTE}\n")
    return output / "hear.md"


def _clear_best(rows: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """Return the row whose accuracy is above all others beyond noise, or None."""
    if name not in ACCURACIES or len(rows) < 2 or not all(row.get("clips") for row in rows):
        return None
    best, second = sorted(rows, key=lambda row: -row["scores"][name])[:2]
    p, q = best["scores"][name], second["scores"][name]
    error = (p * (1 - p) / best["clips"] + q * (1 - q) / second["clips"]) ** 0.5
    return best if p - q > 1.96 * error else None


def _order(row: dict[str, Any]) -> tuple[int, str]:
    """Models first, then the baselines in their usual order."""
    kind = row["upstream"]["kind"]
    return (BASELINES.index(kind) if kind in BASELINES else -1), _column(row)


def _column(row: dict[str, Any]) -> str:
    layer = "" if row["layer"] is None else f" layer {row['layer']}"
    return f"{Path(row['upstream']['name']).name}{layer}"


def cell(row: dict[str, Any], name: str) -> str:
    """Format a score: in percent if it lies between 0 and 1, else as it is."""
    scale = 1.0 if name in ("d_prime", "segment_1s_er") else 100.0
    digits = 1 if scale > 1 else 2
    value = f"{scale * row['scores'][name]:.{digits}f}"
    deviation = row["deviations"].get(name)
    return value if len(row["folds"]) < 2 or deviation is None else f"{value} ± {scale * deviation:.{digits}f}"
