"""Summarize points over folds and seeds, and format them as a table."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

Point = dict[str, Any]

RATES = ("filled", "cross_entropy", "streams", "stored")
KEPT = 0.99
"""Share of the model's accuracy that codes should keep."""
NOTE = """\
Mean and deviation over seeds; a seed draws folds, weights and batches, and each fold is tested once. Every head was \
trained alike. Nominal: bits of a second of codes. The other rates are of the test part's codes, over seconds of its \
audio: filled is the nominal one with what fills up last frames; cross-entropy is under counts of the training part; \
stored is by the entropy coder, its streams alone and with its tables. Of model and all layers, rates are those of all \
the base codec's codebooks. Kept: of model's accuracy, the mean over seeds of their ratios; of phone error rates, the \
difference in points."""


def summary(rows: Sequence[Point]) -> list[Point]:
    """Points of one task, layer, method and shape, over folds (sums) and seeds (means)."""
    groups: dict[tuple[Any, ...], list[Point]] = defaultdict(list)
    for row in rows:
        groups[row["task"], row["layer"], row["nominal_bps"], row["method"], row["shape"]].append(row)
    whole = {key[:2]: _errors(found) for key, found in groups.items() if key[3] == "model"}
    return [_group(found, whole.get(key[:2], {})) for key, found in sorted(groups.items(), key=lambda item: item[0])]


def _errors(rows: Sequence[Point]) -> dict[int, float]:
    """Error rate of each seed, pooled over folds."""
    seeds = sorted({row["seed"] for row in rows})
    sums = {s: [sum(r[name] for r in rows if r["seed"] == s) for name in ("wrong", "labels")] for s in seeds}
    return {seed: wrong / max(labels, 1) for seed, (wrong, labels) in sums.items()}


def _group(rows: list[Point], whole: dict[int, float]) -> Point:
    errors, first = _errors(rows), rows[0]
    spoken = first["metric"] == "per"
    values = [error if spoken else 1 - error for error in errors.values()]
    kept = None
    if set(errors) <= set(whole):
        pairs = [(error, whole[seed]) for seed, error in errors.items()]
        kept = [a - b if spoken else (1 - a) / max(1 - b, 1e-9) for a, b in pairs]
    seconds = sum(row["seconds"] for row in rows)
    return {
        **{name: first[name] for name in ("task", "layer", "method", "shape", "metric", "nominal_bps", "apart")},
        **{f"{name}_bps": sum(row[f"{name}_bits"] for row in rows) / seconds for name in RATES},
        "mean": float(np.mean(values)), "deviation": float(np.std(values)), "seeds": len(errors),
        "folds": len({row["fold"] for row in rows}), "labels": sum(row["labels"] for row in rows) // len(errors),
        "commonest": sum(row["commonest"] for row in rows) / max(sum(row["labels"] for row in rows), 1),
        "kept": None if kept is None else float(np.mean(kept)), "kept_by_seed": kept,
    }  # fmt: skip


def markdown(points: Sequence[Point]) -> str:
    """Markdown table, and for each task and layer the lowest rate that keeps 99 % of the accuracy."""
    header = ["task", "layer", "method", "codes", "nominal bit/s", "filled", "cross-entropy", "stored, streams alone",
              "stored, with tables", "metric %", "± seeds", "kept %", "seeds"]  # fmt: skip
    rows = [header, ["---"] * len(header)]
    for point in points:
        kept = "-" if point["kept"] is None else f"{100 * point['kept']:.1f}"
        row = [point["task"], str(point["layer"]), point["method"], point["shape"], f"{point['nominal_bps']:.1f}"]
        row += [f"{point[f'{name}_bps']:.1f}" for name in RATES]
        row += [f"{100 * point[name]:.1f}" for name in ("mean", "deviation")]
        rows.append([*row, kept, str(point["seeds"])])
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(["# Task metric against rate", "", *table, "", *reached(points), "", NOTE, ""])


def reached(points: Sequence[Point]) -> list[str]:
    """Write a line per task and layer: the lowest nominal rate at which codes keep 99 % of the model's accuracy."""
    lines = []
    for task, layer in sorted({(p["task"], p["layer"]) for p in points if p["metric"] == "accuracy"}):
        here = [p for p in points if (p["task"], p["layer"]) == (task, layer)]
        codes = [p for p in here if p["method"] == "compress" and p["kept"] is not None]
        good = [p for p in codes if p["kept"] >= KEPT]
        best = max((p["kept"] for p in codes), default=0.0)
        guess = [p for p in here if p["method"] == "model" and p["mean"] <= p["commonest"]]
        if guess:
            text = f"not meaningful: the most frequent answer alone has {100 * guess[0]['commonest']:.1f} %"
        elif good:
            text = f"at {good[0]['nominal_bps']:g} bit/s ({good[0]['shape']}), the lowest such rate here"
        else:
            text = f"at no rate here; most {100 * best:.1f} %"
        lines.append(f"* {task}, layer {layer}: 99 % of the model's accuracy {text}.")
    return lines
