"""Number of CPU cores."""

import os


def available_cores() -> int:
    """Number of cores available to this process. In a job, these are the cores that the scheduler assigned."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
