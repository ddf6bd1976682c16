"""Decoding with a language model changes words whose letters alone are uncertain."""

import gzip
from pathlib import Path

import pytest
import torch

from codecssl.superb.patches import import_patches
from codecssl.superb.runner.lm_decoding import make_decoder, unigrams
from codecssl.tokenize.common.errors import UserError

ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-2.0\t<unk>\t0
-0.5\t<s>\t-0.3
-1.0\t</s>\t0
-0.6\tcat\t-0.2
-3.0\tcab\t-0.2

\\2-grams:
-0.3\t<s> cat
-0.3\tcat </s>

\\end\\
"""
VOCABULARY = ["<pad>", "<eos>", "<unk>", " ", "a", "b", "c", "t"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "lm.arpa"
    path.write_text(ARPA)
    return path


def test_words_of_an_arpa_file(model: Path, tmp_path: Path) -> None:
    assert list(unigrams(model)) == ["cat", "cab"]
    with gzip.open(tmp_path / "lm.arpa.gz", "wt") as file:
        file.write(ARPA)
    assert list(unigrams(tmp_path / "lm.arpa.gz")) == ["cat", "cab"]
    (tmp_path / "bad.arpa").write_bytes(b"\\1-grams:\n-1.0\n")
    with pytest.raises(UserError, match="no ARPA language model"):
        list(unigrams(tmp_path / "bad.arpa"))


def test_the_language_model_decides(model: Path, tmp_path: Path) -> None:
    """The last letter is b by a little; the model knows that cat is the word."""
    pytest.importorskip("flashlight.lib.text", reason="flashlight-text is not installed")
    pytest.importorskip("kenlm", reason="kenlm is not installed")
    import_patches.install()
    decoder = make_decoder(VOCABULARY, model, tmp_path)
    emissions = torch.full((1, 8, len(VOCABULARY)), -10.0)
    for frame, letter in enumerate(["c", "<pad>", "a", "<pad>", "b", "<pad>", " ", "<pad>"]):
        emissions[0, frame, VOCABULARY.index(letter)] = 0.0
    emissions[0, 4, VOCABULARY.index("t")] = -0.5
    assert decoder.decode(emissions.log_softmax(-1))[0][0]["words"] == ["cat"]
    emissions[0, 4, VOCABULARY.index("t")] = -10.0
    assert decoder.decode(emissions.log_softmax(-1))[0][0]["words"] == ["cab"]


def test_a_model_in_other_letters_is_refused(model: Path, tmp_path: Path) -> None:
    import_patches.install()
    with pytest.raises(UserError, match="none of its words is spelled in the letters of the transcripts"):
        make_decoder(["<pad>", "<eos>", "<unk>", " ", "C", "A", "T"], model, tmp_path)
    with pytest.raises(UserError, match="the transcripts need spaces"):
        make_decoder(["<pad>", "<eos>", "<unk>", "c"], model, tmp_path)
