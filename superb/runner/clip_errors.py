"""Errors of each test utterance, for paired comparisons of upstreams."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codecssl.superb import results
from codecssl.superb.corpora.corpus import Example
from codecssl.superb.reporting.predictions import ANSWERS

ACCURACY_TASKS, TOKEN_TASKS = ("ks", "sid", "ic", "er", "env", "inst", "pitch"), ("pr", "asr")


def clip_errors(folder: Path, task: str, tested: Sequence[Example], values: dict[str, float]) -> list[int] | None:
    """Return per test utterance 0, or 1 for a wrong class, or the edit distance in phones or words.

    `values` are s3prl's figures of the run. None for other tasks, or if the errors do not add up to s3prl's figure.
    """
    answers = results.read_json(folder / "evaluate" / "valid_best" / "test" / ANSWERS)
    if task not in (*ACCURACY_TASKS, *TOKEN_TASKS) or not answers:
        return None
    examples = [example for example in tested if example.id in answers]
    if len(examples) != len(answers):
        return None
    if task in ACCURACY_TASKS:
        errors = [
            int(_class(answers[e.id]) != _class(e.columns.get("labels", e.columns.get("label")))) for e in examples
        ]
        figure, expected = sum(errors) / len(errors), 1 - values["accuracy"]
    else:
        from torchaudio.functional import edit_distance

        references = [str(e.columns["transcription"]).split() for e in examples]
        errors = [
            edit_distance(str(answers[e.id]).split(), words) for e, words in zip(examples, references, strict=True)
        ]
        figure, expected = sum(errors) / max(1, sum(map(len, references))), values["per" if task == "pr" else "wer"]
    return errors if abs(figure - expected) < 1e-6 else None


def _class(label: Any) -> str:
    """Normalize a class label. An intent is a list of three slots in s3prl's answers and "a ; b ; c" in its CSV."""
    parts = label if isinstance(label, (list, tuple)) else str(label).split(";")
    return ";".join(str(part).strip() for part in parts)
