"""SUPERB's score and its published figures, from the leaderboard of April 2022.

The score of a metric is 1000 / (best - FBANK) * (value - FBANK), with `ANCHORS`. It is averaged within each task, then
over the ten tasks. Recognition with a language model is excluded. A missing task means no score.
"""

from collections.abc import Mapping

Key = tuple[str, str]  # task, metric (codecssl.superb.tasks)

ANCHORS: dict[Key, tuple[float, float]] = {
    ("pr", "per"): (82.01, 3.53),
    ("asr", "wer"): (23.18, 3.62),
    ("ks", "accuracy"): (41.3826674, 96.66),
    ("qbe", "mtwv"): (0.58, 7.36),
    ("sid", "accuracy"): (20.058174, 90.3),
    ("asv", "eer"): (9.56, 5.11),
    ("sd", "der"): (10.05, 5.62),
    ("ic", "accuracy"): (9.649354219, 98.76),
    ("sf", "slot_type_f1"): (69.64, 89.81),
    ("sf", "slot_value_cer"): (52.94, 21.76),
    ("er", "accuracy"): (48.23672168, 67.62),
}
"""(FBANK, the best when the score was defined), in tables' units: percent, and MTWV x100."""

_COLUMNS: tuple[Key, ...] = (
    ("pr", "per"), ("ks", "accuracy"), ("ic", "accuracy"), ("sid", "accuracy"), ("er", "accuracy"), ("asr", "wer"),
    ("asr", "wer_lm"), ("qbe", "mtwv"), ("sf", "slot_type_f1"), ("sf", "slot_value_cer"), ("asv", "eer"), ("sd", "der"),
)  # fmt: skip
_ROWS = {
    "FBANK": (82.01, 41.38, 9.65, 20.06, 48.24, 23.18, 15.21, 0.58, 69.64, 52.94, 9.56, 10.05),
    "wav2vec 2.0 Base": (5.74, 96.23, 92.35, 75.18, 63.43, 6.43, 4.79, 2.33, 88.30, 24.77, 6.02, 6.08),
    "HuBERT Base": (5.41, 96.30, 98.34, 81.42, 64.92, 6.42, 4.79, 7.36, 88.53, 25.20, 5.11, 5.88),
    "WavLM Base+": (3.92, 97.37, 99.00, 89.42, 68.65, 5.59, 4.02, 9.88, 90.58, 21.20, 4.07, 3.50),
    "WavLM Large": (3.06, 97.86, 99.31, 95.49, 70.62, 3.44, 2.95, 8.86, 92.21, 18.36, 3.77, 3.24),
    "DistilHuBERT": (16.27, 95.98, 94.99, 73.54, 63.02, 13.37, 9.22, 5.11, 82.57, 35.59, 8.55, 6.19),
}
_C2V_ITERATIVE = {("pr", "per"): 5.5, ("asr", "wer"): 7.2, ("ic", "accuracy"): 97.1, ("sd", "der"): 5.5,
                  ("er", "accuracy"): 65.4}  # fmt: skip
_C2V_ONLINE = {("pr", "per"): 4.2, ("asr", "wer"): 6.2, ("ks", "accuracy"): 96.7, ("ic", "accuracy"): 98.4,
               ("asv", "eer"): 6.0}  # fmt: skip
PUBLISHED: dict[str, dict[Key, float]] = {
    **{f"{name} (published)": dict(zip(_COLUMNS, values, strict=True)) for name, values in _ROWS.items()},
    "Codec2Vec iterative (reported, via a secondary digest)": _C2V_ITERATIVE,
    "Codec2Vec online (reported, via a secondary digest)": _C2V_ONLINE,
}


def score(values: Mapping[Key, float]) -> float | None:
    """SUPERB's score of a row in tables' units, or None if a figure is missing."""
    if missing(values):
        return None
    gains: dict[str, list[float]] = {}
    for (task, metric), (low, high) in ANCHORS.items():
        gains.setdefault(task, []).append(1000 / (high - low) * (values[task, metric] - low))
    return sum(sum(gain) / len(gain) for gain in gains.values()) / len(gains)


def missing(values: Mapping[Key, float]) -> list[str]:
    """Tasks missing for a score."""
    return sorted({task for task, metric in ANCHORS if (task, metric) not in values})
