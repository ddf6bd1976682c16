"""Lyra v2, a trained codec, through the same protocol. Skipped where its weights are missing."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

SHARED = Path(__file__).parents[4] / "shared"
WEIGHTS = SHARED / "weights" / "lyra_v2"


def test_without_weights_the_error_names_their_source():
    with pytest.raises(UserError, match="lyra_v2: weights are not shipped; give the folder"):
        load_codec("lyra_v2")


@pytest.fixture(scope="module")
def lyra():
    pytest.importorskip("ai_edge_litert")
    if not WEIGHTS.exists():
        pytest.skip("the lyra_v2 weights beside the project are absent")
    return load_codec(str(WEIGHTS), num_codebooks=16)


@pytest.fixture(scope="module")
def speech():
    path = WEIGHTS / "lyra" / "testdata" / "sample1_16kHz.wav"
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0][:32_100])


def test_any_cut_gives_the_same_codes(lyra, speech):
    whole = lyra.encode([speech])[0].codes
    assert whole.shape == (16, 101)
    stream = lyra.stream()
    pieces = [stream.push(piece) for piece in speech.split([1, 319, 5000, 26_780])] + [stream.finish()]
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_embeddings_sum_to_its_own_dequantiser(lyra, speech):
    codes = lyra.encode([speech])[0].codes
    summed = sum(table[c] for table, c in zip(lyra.embeddings(), codes)).t()
    torch.testing.assert_close(summed, lyra.latents(codes), rtol=0, atol=1e-5)


def test_decoded_speech_follows_the_original(lyra, speech):
    """The level over time correlates with that of the original, unlike that of codes in another order."""
    codes = lyra.encode([speech])[0].codes
    output = lyra.decode(codes)
    assert output.shape == (101 * 320,)
    levels = [w[:32_000].reshape(-1, 640).pow(2).mean(1).add(1e-6).log().numpy() for w in (speech, output)]
    assert np.corrcoef(*levels)[0, 1] > 0.9
