"""The effects against the sox program itself, and silence against a sample-by-sample state machine."""

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from codecssl.superb.patches import sox_effects
from codecssl.superb.patches.sox_effects import apply_effects, apply_effects_file, drop_silence
from codecssl.tokenize.common.errors import UserError

ASV = [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"], ["silence", "1", "0.1", "0.1%", "-1", "0.1", "0.1%"]]
needs_sox = pytest.mark.skipif(shutil.which("sox") is None, reason="compares with the sox program; apt install sox")


def bursts(seconds: float, rate: int, seed: int) -> Any:
    """int16 speech-like bursts between pauses at about the threshold of the silence effect."""
    rng = np.random.default_rng(seed)
    count, wave = int(seconds * rate), np.zeros(0)
    while len(wave) < count:
        length, level = int(rng.uniform(0.02, 0.4) * rate), 10 ** rng.uniform(-4.0, -0.5)
        wave = np.append(wave, level * rng.standard_normal(length).cumsum() / 8 * np.hanning(length + 2)[1:-1] ** 0.1)
    return np.clip(np.round(wave[:count] * 32768), -32768, 32767).astype(np.int16)


def by_sox(path: Path, chain: list[list[str]]) -> Any:
    """int32 samples [n] of what sox makes of a file."""
    words = [word for effect in chain for word in effect]
    command = ["sox", "-D", str(path), "-t", "s32", "-", *words]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<i4")


def by_hand(samples: list[int], rate: int, duration: int, percent: float) -> list[int]:
    """The state machine of sox's manual, one sample at a time."""
    kept: list[int] = []
    held: list[int] = []
    copying, window, place, total = False, [0.0] * (rate // 50), 0, 0.0
    for sample in samples:
        total -= window[place]
        window[place] = float(sample) ** 2
        total += window[place]
        place = (place + 1) % len(window)
        loud = math.floor(math.sqrt(max(total, 0) / len(window))) / (2**31 - 1) * 100 > percent
        if not copying:
            held = [*held, sample] if loud else []
            if len(held) == duration:
                kept, held, copying = kept + held, [], True
        elif loud:
            kept, held = [*kept, *held, sample], []
        else:
            held.append(sample)
            if len(held) == duration:
                held, copying, window, place, total = [], False, [0.0] * (rate // 50), 0, 0.0
    return kept + held if copying else kept


@needs_sox
@pytest.mark.parametrize("seed", range(6))
def test_the_chain_of_speaker_verification_equals_sox_bit_for_bit(seed: int, tmp_path: Path) -> None:
    """16 kHz, mono, 16 bit, as VoxCeleb is: nothing to resample."""
    wave = bursts((0.05, 0.3, 2, 4, 11, 25)[seed], 16_000, seed)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="PCM_16")
    ours, rate = apply_effects_file(tmp_path / "a.wav", ASV)
    expected = by_sox(tmp_path / "a.wav", ASV)
    assert rate == 16_000
    assert len(expected) < len(wave)
    assert np.array_equal(ours[0].numpy(), (expected / 2**31).astype(np.float32))


@needs_sox
@pytest.mark.parametrize(("source", "channels"), [(8_000, 1), (44_100, 1), (16_000, 2), (48_000, 2)])
def test_rate_gain_and_channels_equal_those_of_sox(source: int, channels: int, tmp_path: Path) -> None:
    """The output equals sox's to 1e-6 of full scale, with resampling to 2e-4 (speech-like noise of RMS 0.1)."""
    rng = np.random.default_rng(source)
    wave = np.clip(rng.standard_normal((source * 2, channels)) * 3277, -32768, 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", wave, source, subtype="PCM_16")
    ours, rate = apply_effects_file(tmp_path / "a.wav", ASV[:3])
    expected = by_sox(tmp_path / "a.wav", ASV[:3]) / 2**31
    assert rate == 16_000
    assert ours.shape == (1, len(expected))
    assert np.abs(ours[0].numpy() - expected).max() < (1e-6 if source == 16_000 else 2e-4)


def test_silence_equals_the_state_machine_of_the_manual() -> None:
    """Runs without sox."""
    for seed in range(6):
        samples = bursts(3, 2_000, seed).astype(np.float64) * 65536
        ours = drop_silence(samples, 2_000, 200, 0.1)
        assert ours.tolist() == by_hand([int(s) for s in samples], 2_000, 200, 0.1)
        assert 0 < len(ours) < len(samples)


def test_a_long_wave_is_searched_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stretch longer than the first step is found whole; no more is squared than a few times the wave."""
    seen: list[int] = []
    genuine = sox_effects._loud
    monkeypatch.setattr(sox_effects, "_loud", lambda x, *rest: seen.append(len(x)) or genuine(x, *rest))
    wave = np.concatenate([np.full(n, v) for n, v in [(5_000, 0.0), (80_000, 1e9), (5_000, 0.0), (30_000, 1e9)]])
    assert len(drop_silence(wave, 1_000, 100, 0.1)) == pytest.approx(110_000, abs=60)
    assert sum(seen) < 4 * len(wave)


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros(5_000), np.full(50, 1e9)])
def test_an_empty_wave_stays_empty(samples: Any) -> None:
    assert len(drop_silence(samples, 16_000, 1600, 0.1)) == 0


@pytest.mark.parametrize(
    "effect",
    [
        ["silence", "1", "0.1", "0.1%"],
        ["silence", "1", "0.1", "-60d", "-1", "0.1", "-60d"],
        ["silence", "1", "0.1", "0.1%", "-1", "0.2", "0.1%"],
        ["channels", "2"],
        ["reverb"],
    ],
)
def test_an_unknown_effect_is_refused(effect: list[str]) -> None:
    import torch

    with pytest.raises(UserError, match=f"sox effect {effect[0]}.*: not one of channels 1, rate R"):
        apply_effects(torch.zeros(1, 10), 16_000, [effect])


def test_an_invalid_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("a letter")
    with pytest.raises(UserError, match=r"a\.wav: cannot be read"):
        apply_effects_file(tmp_path / "a.wav", ASV)
