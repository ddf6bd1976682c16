"""Output of a run: console lines, metrics.jsonl, TensorBoard and curves.png, from the same rows."""

import json
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from codecssl.tokenize.common.command_line import console
from codecssl.tokenize.common.files import atomic_file, write_atomic
from codecssl.tokenize.common.process import drop_stdout
from codecssl.tokenize.common.retry import patiently

MetricsRow = dict[str, Any]

# Dense bf16 peak from the datasheets, FLOP/s. On other devices the utilisation is not reported.
_PEAK_BF16 = {
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


class Telemetry:
    """Logger of rows ({"split", "step", metrics}). A list in a row has one number per codebook.

    On a resume, rows of steps after `step` are removed first. No step is therefore recorded twice. retry_seconds: time
    for which the write of a row is retried while the disk is unavailable.
    """

    def __init__(self, run: Path, *, step: int, retry_seconds: float = 0.0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path, self._curves, self._retry_seconds = run / "metrics.jsonl", run / "curves.png", retry_seconds
        self._console = console(soft_wrap=True)
        self.unheard = False
        """True if the reader of the standard output has exited (`| head`). The run then saves and stops."""
        damaged: list[int] = []
        self.rows = [row for row in read_rows(self._path, damaged) if row["step"] <= step]
        if damaged:
            self.warn(f"{self._path}: line(s) {', '.join(map(str, damaged))} damaged and left out; the rest is kept")
        _rewrite(self._path, self.rows)
        self.expected: Mapping[str, Sequence[Sequence[float]]] = {}
        """Reference losses of an equal run, by split: [[step, loss], ...]. Drawn next to its own."""
        self._board: Any = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def say(self, text: str) -> None:
        """Print a line."""
        self._print(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._print(f"warning: {text}", style="bold yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        try:
            self._console.print(text, markup=False, style=style)
        except BrokenPipeError:
            self.unheard = True
            drop_stdout()

    def log(self, row: MetricsRow) -> None:
        """Write a row to all outputs except curves.png."""
        self.rows.append(row)
        patiently(lambda: self._append(row), self._path, seconds=self._retry_seconds)
        self._chart(row)
        self.say(console_line(row))

    def _append(self, row: MetricsRow) -> None:
        with self._path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            begun = file.read(1) not in (b"", b"\n")  # a line truncated by an error
            file.write((("\n" if begun else "") + json.dumps(row) + "\n").encode())

    def draw(self) -> None:
        """Update curves.png."""
        draw_curves(self.rows, self._curves, self.expected)
        with suppress(OSError):
            self._board.flush()

    def close(self) -> None:
        with suppress(OSError):
            self._board.close()

    def _chart(self, row: MetricsRow) -> None:
        """Pass a row to TensorBoard. Its writer does not recover from an error and is then replaced by a new one."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            for key, value in row.items():
                for name, number in _scalars(f"{row['split']}/{key}", value):
                    self._board.add_scalar(name, number, row["step"])
        except OSError:
            if self._path.exists():
                self._board = SummaryWriter(str(self._path.with_name("tensorboard")))


def read_rows(path: Path, damaged: list[int] | None = None) -> list[MetricsRow]:
    """Read the rows of a metrics.jsonl. Invalid lines are skipped; later rows are kept.

    damaged: receives the numbers of the invalid lines (from 1), except a last line truncated by a crash.
    """
    rows, bad = list[MetricsRow](), list[int]()
    content = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = content.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else None
        except (ValueError, RecursionError):
            row = {}
        if isinstance(row, dict) and row.keys() >= {"split", "step", "loss"} and isinstance(row["step"], int):
            rows.append(row)
        elif row is not None and number < len(lines):
            bad.append(number)
    if damaged is not None:
        damaged += bad
    return rows


def draw_curves(
    rows: Sequence[MetricsRow], path: Path, expected: Mapping[str, Sequence[Sequence[float]]] | None = None
) -> None:
    """Plot loss, accuracy and perplexity of the predictions over the steps. Codebooks go from dark to light."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for split, style in (("train", "-"), ("valid", "o--")):
        chosen = [row for row in rows if row["split"] == split]
        steps = [row["step"] for row in chosen]
        axes[0].plot(steps, [row["loss"] for row in chosen], style, label=split, markersize=3)
        for key, axis in (("accuracy", axes[1]), ("predicted_perplexity", axes[2])):
            books = len(chosen[0][key]) if chosen else 0
            for book in range(books):
                color = pyplot.get_cmap("viridis")(book / max(books - 1, 1))
                label = f"codebook {book}, {split}" if book in (0, books - 1) else None
                axis.plot(steps, [row[key][book] for row in chosen], style, color=color, label=label, markersize=3)
    for split, points in (expected or {}).items():
        axes[0].plot(
            *zip(*points, strict=True), ":" if split == "train" else "x", color="grey", label=f"expected {split}"
        )
    titles = ("loss, nats", "accuracy at masked frames", "perplexity of the predicted codes")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        if axis.lines:
            axis.legend(fontsize="x-small")
    with atomic_file(path) as file:
        figure.savefig(file, dpi=100, format="png")
    pyplot.close(figure)


def machine_row(flops_per_second: float, precision: str) -> MetricsRow:
    """Return memory usage, and utilisation of the device if its peak is known."""
    row: MetricsRow = {"memory_gib": _memory_gib(), "tflops": flops_per_second / 1e12}
    if torch.cuda.is_available() and precision == "bf16":
        name = torch.cuda.get_device_name()
        peaks = [peak for part, peak in _PEAK_BF16.items() if part in name]
        if peaks:
            row["mfu_percent"] = 100.0 * flops_per_second / peaks[0]
    return row


def _memory_gib() -> float:
    """Return peak memory usage in GiB: of the device, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, list):
        return [(f"{name}/{i}", float(item)) for i, item in enumerate(value)]
    return [(name, float(value))] if isinstance(value, int | float) else []


def console_line(row: Mapping[str, Any]) -> str:
    """Format a row: step 100/400 | train | loss 5.123 | accuracy 12.3 % (first 20.1) | ..."""
    parts = [f"step {row['step']:>6}", f"{row['split']:<5}", f"loss {row['loss']:.4f}"]
    mean = math.fsum(row["accuracy"]) / len(row["accuracy"])
    parts.append(f"accuracy {100 * mean:.2f} % (codebook 0: {100 * row['accuracy'][0]:.2f} %)")
    if row["split"] == "train":
        parts += [
            f"lr {row['lr']:.2e}",
            f"norm {row['grad_norm']:.2f}",
            f"{row['frames_per_second']:.0f} frames/s",
            f"{row['audio_hours_per_hour']:.0f} h/h",
            f"wait {row['data_wait_percent']:.0f} %",
            f"left {clock(row['seconds_left'])}",
        ]
    return " | ".join(parts)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _rewrite(path: Path, rows: Sequence[MetricsRow]) -> None:
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
