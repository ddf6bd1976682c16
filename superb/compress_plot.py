"""The plot of a task's metric against rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codecssl.tokenize.errors import UserError

STYLE = {"model": ("k", "*"), "compress": ("C0", "o"), "codebooks": ("C1", "s"), "tables": ("C3", "v"),
         "k-means": ("C2", "^")}  # fmt: skip


def draw(path: Path, points: Sequence[dict[str, Any]], task: str) -> None:
    """Write a PNG of `compress_report.summary`: filled at nominal rates, hollow at held-out cross-entropy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for layer in sorted({point["layer"] for point in points}):
        for method, (colour, marker) in STYLE.items():
            chosen = [p for p in points if p["method"] == method and p["layer"] == layer]
            if chosen:
                _line(axes, chosen, colour, marker, f"{method}, layer {layer}")
    axes.set(xscale="log", xlabel="bit/s (filled: nominal, hollow: held-out cross-entropy)", title=f"task {task}")
    axes.set_ylabel(f"{points[0]['metric']} % (mean and deviation over seeds)" if points else "")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def _line(axes: Any, points: Sequence[dict[str, Any]], colour: str, marker: str, label: str) -> None:
    values, spread = [100 * p["mean"] for p in points], [100 * p["deviation"] for p in points]
    axes.errorbar(
        [p["nominal_bps"] for p in points], values, spread, color=colour, marker=marker, label=label, capsize=3
    )
    hollow = [p["cross_entropy_bps"] for p in points]
    axes.plot(hollow, values, color=colour, marker=marker, mfc="none", ls="none")
