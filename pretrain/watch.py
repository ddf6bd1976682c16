"""The stop signal and the watchdog of a run: those of every stage."""

from codecssl.slurm.watch import PREEMPTED, SIGNALS, STUCK, StopSignal, Watchdog

__all__ = ["PREEMPTED", "SIGNALS", "STUCK", "StopSignal", "Watchdog"]
