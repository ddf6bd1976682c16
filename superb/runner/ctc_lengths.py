"""Utterances with more labels than frames, which CTC cannot learn.

CTC emits at most one label per frame, with a blank between two equal ones. s3prl sets the infinite loss of a longer
transcript to zero (`zero_infinity`): such an utterance has no effect, without a warning. Codecs of low frame rates
have many such utterances.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from codecssl.superb.corpora.corpus import Example, Selection
from codecssl.tokenize.common.errors import UserError

SAMPLE_RATE = 16_000
REASON = "more labels than frames, no CTC loss"
EOS = "<eos>"


@dataclass(frozen=True)
class Shortfall:
    """Numbers of utterances by split: all, and those with more labels than frames."""

    utterances: dict[str, int]
    short: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.short.values())

    def warning(self) -> str | None:
        """Return one line with the proportion in each split, or None."""
        if not self.total:
            return None
        shares = [
            f"{n} of {self.utterances[split]} {split} ({100 * n / self.utterances[split]:.1f} %)"
            for split, n in self.short.items()
            if n
        ]
        return f"{', '.join(shares)} utterances have more labels than frames: CTC learns nothing from them"


def shortfall(task: str, selection: Selection, stride: int, upstream: str) -> Shortfall | None:
    """Compare labels and frames of each utterance; None for tasks without CTC.

    stride: samples at 16 kHz per frame of the upstream. Raises UserError if no training utterance can be learnt.
    """
    if task not in ("pr", "asr", "sf"):
        return None
    utterances = {split: len(examples) for split, examples in selection.splits.items()}
    short = {split: sum(_is_short(task, e, stride) for e in examples) for split, examples in selection.splits.items()}
    if short["train"] == utterances["train"]:
        raise UserError(
            f"task {task}: all {short['train']} training utterances have more labels than frames, at"
            f" {SAMPLE_RATE / stride:g} frames per second of {upstream}: CTC cannot learn; take other tasks, or an"
            " upstream of a higher frame rate"
        )
    return Shortfall(utterances, short)


def frames_needed(labels: Sequence[str]) -> int:
    """Minimum number of frames from which CTC can emit these labels."""
    return len(labels) + sum(one == other for one, other in pairwise(labels))


def labels_of(task: str, columns: dict[str, Any]) -> list[str]:
    """Labels of an utterance as s3prl's tokenizers make them, with the final one for the end."""
    words = str(columns["transcription"]).split()
    if task == "pr":
        return [*words, EOS]
    if task == "asr":
        return [*str(columns["transcription"]).strip("\r\n "), EOS]
    tags, labels = str(columns["iob"]).split(), list[str]()
    for i, (word, tag) in enumerate(zip(words, tags, strict=True)):
        named, first, last = tag != "O", i == 0 or tags[i - 1] != tag, i + 1 == len(tags) or tags[i + 1] != tag
        labels += [*([f"B-{tag}"] if named and first else []), *word, *([f"E-{tag}"] if named and last else [])]
        labels.append(EOS if i + 1 == len(words) else " ")
    return labels


def _is_short(task: str, example: Example, stride: int) -> bool:
    import soundfile

    try:
        info = soundfile.info(example.path)
    except soundfile.LibsndfileError:  # s3prl's loader names it
        return False
    samples = info.frames * SAMPLE_RATE // info.samplerate
    return -(-samples // stride) < frames_needed(labels_of(task, example.columns))
