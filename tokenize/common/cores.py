"""Number of CPU cores."""

import os


def available_cores() -> int:
    """Cores on which this process may run: in a job, those that the scheduler gave it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
