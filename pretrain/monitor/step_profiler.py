"""Torch profile of a few steps of one rank, as a trace and a table."""

from pathlib import Path
from typing import Any

import torch

_SKIPPED, _WARMED, _TRACED = 3, 2, 4


class Tracer:
    """Context manager that traces _TRACED steps after the first few. Call `step` after each step.

    Writes FOLDER/trace.json (for ui.perfetto.dev or chrome://tracing) and FOLDER/table.txt.
    """

    STEPS = _SKIPPED + _WARMED + _TRACED
    """Number of steps after which the trace is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(skip_first=_SKIPPED, wait=0, warmup=_WARMED, active=_TRACED, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> "Tracer":
        self._profile.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.stop()

    def step(self) -> None:
        self._profile.step()

    def _write(self, profile: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self.folder / "trace.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (self.folder / "table.txt").write_text(profile.key_averages().table(sort_by=order, row_limit=40))
