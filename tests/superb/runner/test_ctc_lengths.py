"""Labels that do not fit into frames, against s3prl's tokenizers and torch's CTC loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from codecssl.superb.corpora.corpus import Example, Selection
from codecssl.superb.patches import import_patches
from codecssl.superb.runner.ctc_lengths import frames_needed, labels_of, shortfall
from codecssl.tokenize.common.errors import UserError

TEXTS = ("A", "AA B", "THE  CAT", "BOOKKEEPER")


def test_labels_equal_those_of_s3prls_tokenizers() -> None:
    import_patches.install()
    from s3prl.dataio.encoder.tokenizer import CharacterSlotTokenizer, CharacterTokenizer, PhonemeTokenizer

    letters = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    for text in TEXTS:
        assert len(labels_of("asr", {"transcription": text})) == len(CharacterTokenizer(letters).encode(text))
    phones = "AH AH B K"
    tokens = PhonemeTokenizer(["AH", "B", "K"]).encode(phones)
    assert len(labels_of("pr", {"transcription": phones})) == len(tokens)
    slots = CharacterSlotTokenizer(letters, ["B-x", "E-x", "B-y", "E-y"])
    for text, iob in (("PLAY THE CAT", "O x x"), ("A B", "x y"), ("A", "O"), ("A B C", "x O x")):
        assert len(labels_of("sf", {"transcription": text, "iob": iob})) == len(slots.encode(text, iob))


@pytest.mark.parametrize("text", TEXTS)
def test_the_frames_needed_match_a_finite_ctc_loss(text: str) -> None:
    labels = labels_of("asr", {"transcription": text})
    number = {label: i + 1 for i, label in enumerate(sorted(set(labels)))}
    target = torch.tensor([[number[label] for label in labels]])
    for frames in (frames_needed(labels) - 1, frames_needed(labels)):
        scores = torch.randn(frames, 1, len(number) + 1).log_softmax(-1)
        loss = torch.nn.functional.ctc_loss(scores, target, torch.tensor([frames]), torch.tensor([len(labels)]))
        assert bool(torch.isfinite(loss)) == (frames >= frames_needed(labels))


def selection(folder: Path, seconds: list[float]) -> Selection:
    """Twenty phones in each utterance, of these lengths at 8 kHz in training, of 2 s in the others."""
    examples: dict[str, list[Example]] = {"train": [], "valid": [], "test": []}
    for split, lengths in (("train", seconds), ("valid", [2.0]), ("test", [2.0, 1.0])):
        for i, length in enumerate(lengths):
            path = folder / f"{split}{i}.wav"
            soundfile.write(path, np.zeros(int(8_000 * length)), 8_000)
            columns: dict[str, Any] = {"transcription": " ".join("ABCDEFGHIJ" * 2)}
            examples[split].append(Example(id=path.stem, path=path, columns=columns))
    return Selection(splits=examples)


def test_short_utterances_are_counted_and_an_empty_set_is_an_error(tmp_path: Path) -> None:
    found = shortfall("pr", selection(tmp_path, [1.0, 1.0, 2.0, 3.0]), 1_280, "mimi")  # 12.5 frames per second
    assert found is not None
    assert found.short == {"train": 2, "valid": 0, "test": 1}
    assert found.warning() == (
        "2 of 4 train (50.0 %), 1 of 2 test (50.0 %) utterances have more labels than frames: CTC learns nothing from"
        " them"
    )
    assert shortfall("ks", selection(tmp_path, [0.1]), 1_280, "mimi") is None
    with pytest.raises(
        UserError, match=r"task pr: all 2 training .* at 12.5 frames per second of mimi: CTC cannot learn"
    ):
        shortfall("pr", selection(tmp_path, [1.0, 1.0]), 1_280, "mimi")
    whole = shortfall("pr", selection(tmp_path, [1.0, 1.0]), 320, "tiny")
    assert whole is not None
    assert whole.warning() is None
