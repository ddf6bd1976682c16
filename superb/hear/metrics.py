"""HEAR's metrics: of scenes (one prediction a clip) and of events (labels with a start and an end in a clip).

Sources: heareval 2021.1 for names and settings; for events Mesaros et al., Metrics for Polyphonic Sound Event Detection
(Applied Sciences 6(6), 2016, sections 3.1 and 3.2), as sed_eval computes them, with optimal matching.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Event:
    """A labelled span of a clip, in milliseconds."""

    label: str
    start: float
    end: float


Events = Mapping[str, Sequence[Event]]
"""The events of each clip."""


def top1_accuracy(scores: Array, targets: Array) -> float:
    """Share of rows of `scores` [N, C] whose largest value is at the target's class; targets are one-hot [N, C]."""
    return float((scores.argmax(1) == targets.argmax(1)).mean())


def chroma_accuracy(scores: Array, targets: Array) -> float:
    """Accuracy of pitch classes: classes are consecutive semitones, and octaves are ignored."""
    return float((scores.argmax(1) % 12 == targets.argmax(1) % 12).mean())


def mean_average_precision(scores: Array, targets: Array) -> float:
    """Average precision of each class, averaged over the classes."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(targets, scores, average="macro"))


def roc_area(scores: Array, targets: Array) -> float:
    """Area under the ROC curve of each class, averaged; NaN if a class is in no clip, or in all."""
    from sklearn.metrics import roc_auc_score

    if any(len(np.unique(column)) < 2 for column in targets.T):
        return float("nan")
    return float(roc_auc_score(targets, scores, average="macro"))


def d_prime(scores: Array, targets: Array) -> float:
    """sqrt(2) times the normal quantile of each class's ROC area, averaged over the classes."""
    from scipy.stats import norm
    from sklearn.metrics import roc_auc_score

    if any(len(np.unique(column)) < 2 for column in targets.T):
        return float("nan")
    return float(np.mean(norm.ppf(roc_auc_score(targets, scores, average=None)) * np.sqrt(2)))


def event_f1(found: Events, expected: Events, *, onset_ms: float, offset_share: float | None = None) -> float:
    """F1 of events over all clips. An event is right if one of its label begins within `onset_ms` of it.

    offset_share: if given, it must also end within `onset_ms`, or this share of its length if that is more. Each event
    is matched at most once, by a matching of maximum size.
    """
    right = 0
    for clip, events in expected.items():
        guesses = found.get(clip, ())
        near = np.zeros((len(events), len(guesses)), bool)
        for i, event in enumerate(events):
            for j, guess in enumerate(guesses):
                near[i, j] = event.label == guess.label and _near(event, guess, onset_ms, offset_share)
        right += _matched(near)
    total = sum(map(len, expected.values())) + sum(len(found.get(clip, ())) for clip in expected)
    return 2 * right / total if total else 0.0


def _near(event: Event, guess: Event, onset_ms: float, offset_share: float | None) -> bool:
    if abs(event.start - guess.start) > onset_ms:
        return False
    return offset_share is None or abs(event.end - guess.end) <= max(onset_ms, offset_share * (event.end - event.start))


def _matched(near: NDArray[np.bool_]) -> int:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_bipartite_matching

    return int((maximum_bipartite_matching(csr_array(near), perm_type="column") >= 0).sum()) if near.size else 0


def segment_error_rate(found: Events, expected: Events, *, segment_ms: float = 1000.0) -> float:
    """Substitutions, deletions and insertions of active labels per segment, over the number of active labels."""
    wrong = active = 0
    for clip, events in expected.items():
        guesses = found.get(clip, ())
        last = max((event.end for event in (*events, *guesses)), default=0.0)
        rolls = [_roll(some, int(np.ceil(last / segment_ms)), segment_ms) for some in (events, guesses)]
        for labels, others in zip(*rolls, strict=True):
            wrong += max(len(labels - others), len(others - labels))
            active += len(labels)
    return wrong / active if active else float("nan")


def _roll(events: Sequence[Event], segments: int, segment_ms: float) -> list[set[str]]:
    """Labels that are active in each segment."""
    roll: list[set[str]] = [set() for _ in range(segments)]
    for event in events:
        for segment in range(int(event.start // segment_ms), int(np.ceil(event.end / segment_ms))):
            roll[segment].add(event.label)
    return roll


@dataclass(frozen=True)
class HearMetric:
    """A metric by HEAR's name. `of_events`: it compares events of clips, not a score for each class."""

    compute: Callable[..., float]
    options: Mapping[str, Any] | None = None
    of_events: bool = False
    higher_is_better: bool = True

    def __call__(self, found: Any, expected: Any) -> float:
        return self.compute(found, expected, **(self.options or {}))


METRICS = {
    "top1_acc": HearMetric(top1_accuracy),
    "pitch_acc": HearMetric(top1_accuracy),
    "chroma_acc": HearMetric(chroma_accuracy),
    "mAP": HearMetric(mean_average_precision),
    "d_prime": HearMetric(d_prime),
    "aucroc": HearMetric(roc_area),
    "event_onset_200ms_fms": HearMetric(event_f1, {"onset_ms": 200.0}, of_events=True),
    "event_onset_50ms_fms": HearMetric(event_f1, {"onset_ms": 50.0}, of_events=True),
    "event_onset_offset_50ms_20perc_fms": HearMetric(event_f1, {"onset_ms": 50.0, "offset_share": 0.2}, of_events=True),
    "segment_1s_er": HearMetric(segment_error_rate, of_events=True, higher_is_better=False),
}


def metric(name: str) -> HearMetric:
    """Return a metric by its name in task_metadata.json. Raises UserError for another."""
    if name not in METRICS:
        raise UserError(f"metric {name}: not one of HEAR's, {', '.join(METRICS)}")
    return METRICS[name]
