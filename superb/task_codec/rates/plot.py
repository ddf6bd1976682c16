"""Plot of task metrics against bit rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codecssl.tokenize.common.errors import UserError

STYLE = {"model": ("k", "*"), "compress": ("C0", "o"), "codebooks": ("C1", "s"), "tables": ("C3", "v"),
         "k-means": ("C2", "^")}  # fmt: skip


def draw(path: Path, points: Sequence[dict[str, Any]]) -> None:
    """Write a PNG of `table.summary` with one panel per task.

    Filled markers are at the nominal rate, hollow ones at held-out cross-entropy. The dashed line is 99 % of the
    model's accuracy.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(point["task"] for point in points))
    columns = min(2, max(1, len(tasks)))
    lines = -(-max(1, len(tasks)) // columns)
    figure = Figure(figsize=(7 * columns, 4.5 * lines), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for number, task in enumerate(tasks, 1):
        _panel(figure.add_subplot(lines, columns, number), [p for p in points if p["task"] == task], task)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def _panel(axes: Any, points: Sequence[dict[str, Any]], task: str) -> None:
    layers = sorted({point["layer"] for point in points})
    for layer, line in zip(layers, ("-", "--", ":", "-.", *["-"] * len(layers))):
        for method, (colour, marker) in STYLE.items():
            if chosen := [p for p in points if p["method"] == method and p["layer"] == layer]:
                _line(axes, chosen, colour, marker, line, f"{method}, layer {layer}")
    whole = [p["mean"] for p in points if p["method"] == "model" and p["metric"] == "accuracy"]
    if whole:
        axes.axhline(99 * max(whole), color="k", lw=0.8, ls="--")
    axes.set(xscale="log", xlabel="bit/s (filled: nominal, hollow: held-out cross-entropy)", title=f"task {task}")
    axes.set_ylabel(f"{points[0]['metric']} % (mean and deviation over seeds)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _line(axes: Any, points: Sequence[dict[str, Any]], colour: str, marker: str, line: str, label: str) -> None:
    values, spread = [100 * p["mean"] for p in points], [100 * p["deviation"] for p in points]
    nominal = [p["nominal_bps"] for p in points]
    axes.errorbar(nominal, values, spread, color=colour, marker=marker, ls=line, label=label, capsize=3)
    axes.plot([p["cross_entropy_bps"] for p in points], values, color=colour, marker=marker, mfc="none", ls="none")
