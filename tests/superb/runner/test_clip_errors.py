"""Errors of each test utterance, against s3prl's own figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from codecssl.superb.corpora.corpus import Example
from codecssl.superb.patches import import_patches
from codecssl.superb.runner.clip_errors import clip_errors


def example(name: str, **columns: Any) -> Example:
    return Example(id=name, path=Path(f"{name}.wav"), columns=columns)


def answered(folder: Path, answers: dict[str, Any]) -> Path:
    path = folder / "evaluate" / "valid_best" / "test" / "answers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(answers))
    return folder


def test_phone_errors_add_up_to_s3prls_rate(tmp_path: Path) -> None:
    import_patches.install()
    from s3prl.metric import per

    printed = {"a": "AH B K", "b": "K AH", "c": "D", "d": "AH AH K"}
    heard = {"a": "AH K K", "b": "", "c": "D D AH", "d": "AH AH K"}
    figure = float(per([heard[name] for name in printed], list(printed.values())))
    examples = [example(name, transcription=text) for name, text in printed.items()]
    folder = answered(tmp_path, heard)
    assert clip_errors(folder, "pr", examples, {"per": figure}) == [1, 2, 2, 0]
    assert clip_errors(folder, "pr", examples, {"per": figure + 0.01}) is None  # not what s3prl counted


@pytest.mark.parametrize(
    ("task", "column", "labels", "answers"),
    [
        ("ks", "label", ["yes", "no", "up"], ["yes", "up", "up"]),
        ("ic", "labels", ["on ; lamp ; hall", "off ; lamp ; none", "a ; b ; c"],
         [["on", "lamp", "hall"], ["off", "tv", "none"], ["a", "b", "c"]]),
    ],
)  # fmt: skip
def test_a_wrong_class_is_one_error(
    task: str, column: str, labels: list[str], answers: list[Any], tmp_path: Path
) -> None:
    examples = [example(str(i), **{column: label}) for i, label in enumerate(labels)]
    folder = answered(tmp_path, {str(i): answer for i, answer in enumerate(answers)})
    assert clip_errors(folder, task, examples, {"accuracy": 2 / 3}) == [0, 1, 0]
    assert clip_errors(folder, "sf", examples, {}) is None
