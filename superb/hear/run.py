"""Upstreams on HEAR task folders: one result file for each pair, kept, and a table."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from codecssl.superb import results
from codecssl.superb.hear.evaluate import evaluate
from codecssl.superb.hear.predictor import PredictorSettings
from codecssl.superb.hear.task_folder import TaskFolder
from codecssl.superb.suites.hear_2021 import HearModel
from codecssl.superb.upstreams.names import parse_all


def run(
    names: Sequence[str],
    folders: Sequence[Path],
    output: Path,
    settings: PredictorSettings,
    *,
    layer: int | None = None,
    device: str = "cpu",
    on_progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Evaluate every upstream on every task. Results that are in `output` are not computed again.

    layer: hidden state, or None for the mean of all. Raises UserError for folders that are not tasks, before anything
    is computed.
    """
    tasks, rows = [TaskFolder(path) for path in folders], []
    for upstream in parse_all(names):
        model: HearModel | None = None
        for task in tasks:
            identity = {
                "upstream": upstream.identity(),
                "layer": layer,
                "task": task.name,
                "fingerprint": task.fingerprint,
                "settings": asdict(settings),
            }
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
            path = output / "hear" / task.name / digest / "result.json"
            if not path.is_file():
                model = model or HearModel(upstream, layer).to(device)
                results.write_json(path, {**identity, "metrics": task.metrics, **evaluate(task, model, settings)})
                write_table(output)
            rows.append(results.read_json(path))
            on_progress(f"{upstream.name}  {task.name}  {_cell(rows[-1], rows[-1]['metrics'][0])}")
    return rows


def write_table(output: Path) -> Path:
    """Write hear.md from all results in `output`: a row for each task and metric, a column for each upstream."""
    rows = [results.read_json(path) for path in sorted(output.glob("hear/*/*/result.json"))]
    columns = list(dict.fromkeys(map(_column, rows)))
    lines = ["| task | metric | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    for task, found in by_task.items():
        for name in found[0]["metrics"]:
            cells = {_column(row): _cell(row, name) for row in found}
            lines.append(f"| {task} | {name} | " + " | ".join(cells.get(column, "") for column in columns) + " |")
    note = (
        "HEAR's predictor on frozen embeddings: mean over folds, with the deviation over folds where there are several."
        " Higher is better, but for segment_1s_er."
    )
    results.write_text(output / "hear.md", "# HEAR tasks\n\n" + "\n".join(lines) + f"\n\n{note}\n")
    return output / "hear.md"


def _column(row: dict[str, Any]) -> str:
    layer = "" if row["layer"] is None else f" layer {row['layer']}"
    return f"{Path(row['upstream']['name']).name}{layer}"


def _cell(row: dict[str, Any], name: str) -> str:
    """Format a score: in percent if it lies between 0 and 1, else as it is."""
    scale = 1.0 if name in ("d_prime", "segment_1s_er") else 100.0
    value = f"{scale * row['scores'][name]:.{1 if scale > 1 else 2}f}"
    return value if len(row["folds"]) < 2 else f"{value} ± {scale * row['deviations'][name]:.{1 if scale > 1 else 2}f}"
