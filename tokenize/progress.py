"""Progress of a tokenization run, reported to a callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.format.records import EncodedUtterance, Failure


@dataclass(frozen=True)
class Progress:
    """State of a run after an input."""

    inputs: int
    seconds: float
    """Seconds of audio encoded by this task in this run."""
    failed: int
    total: int | None
    """Number of inputs that this task has to encode; None if the sources cannot be counted."""


def reported(
    results: Iterator[EncodedUtterance | Failure],
    card: CodecCard,
    total: int | None,
    on_progress: Callable[[Progress], None],
) -> Iterator[EncodedUtterance | Failure]:
    """Yield `results`, calling `on_progress` before the first one and after each."""
    failed = samples = 0
    on_progress(Progress(0, 0.0, 0, total))
    for inputs, result in enumerate(results, 1):
        if isinstance(result, Failure):
            failed += 1
        else:
            samples += result.samples
        yield result
        on_progress(Progress(inputs, samples / card.sample_rate, failed, total))
