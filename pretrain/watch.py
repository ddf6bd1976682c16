"""The stop signal and the watchdog of a run: those of every stage."""

from codecssl.tokenize.common.process import PREEMPTED, SIGNALS, STUCK, StopSignal, Watchdog

__all__ = ["PREEMPTED", "SIGNALS", "STUCK", "StopSignal", "Watchdog"]
