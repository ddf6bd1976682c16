"""The sox effects that SUPERB's tasks ask for, without sox: channels 1, rate, gain and silence.

They follow sox 14.4.2 step by step, on samples as sox holds them: 32-bit integers, rounded after every effect.
Without resampling, the result is bit-exact with sox (tests/superb/test_effects.py).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError

FULL_SCALE = 2.0**31
LARGEST = 2**31 - 1
KNOWN = "channels 1, rate R, gain DB, silence 1 SECONDS PERCENT% -1 SECONDS PERCENT%"

Samples = NDArray[np.float64]
"""[C, n], whole numbers in the range of sox's 32-bit samples."""


def apply_effects(wav: Any, sample_rate: int, effects: Sequence[Sequence[str]]) -> tuple[Any, int]:
    """Apply sox effects to a float tensor [C, samples]. Returns a float32 tensor [C', samples'] and Hz.

    Raises UserError for an effect not in `KNOWN`, since skipping it silently would change the benchmark.
    """
    import torch

    samples = _rounded(wav.detach().cpu().double().numpy() * FULL_SCALE)
    samples, sample_rate = _apply(samples, sample_rate, effects)
    return torch.from_numpy((samples / FULL_SCALE).astype(np.float32)), sample_rate


def apply_effects_file(path: str | Path, effects: Sequence[Sequence[str]]) -> tuple[Any, int]:
    """Apply sox effects to an audio file, starting with its own rate and channels."""
    import soundfile
    import torch

    try:
        wave, sample_rate = soundfile.read(str(path), dtype="float64", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return apply_effects(torch.from_numpy(wave.T.copy()), sample_rate, effects)


def _apply(samples: Samples, sample_rate: int, effects: Sequence[Sequence[str]]) -> tuple[Samples, int]:
    for name, *arguments in effects:
        if name == "channels" and arguments == ["1"]:
            samples = samples if len(samples) == 1 else _rounded(samples.mean(axis=0, keepdims=True))
        elif name == "rate" and len(arguments) == 1:
            samples, sample_rate = resample(samples, sample_rate, int(arguments[0])), int(arguments[0])
        elif name == "gain" and len(arguments) == 1:
            samples = _rounded(samples * 10 ** (float(arguments[0]) / 20))
        elif name == "silence" and len(samples) == 1 and (duration := _silence_duration(arguments, sample_rate)):
            samples = drop_silence(samples[0], sample_rate, duration, float(arguments[2].rstrip("%")))[None]
        else:
            raise UserError(f"sox effect {name} {' '.join(arguments)}: not one of {KNOWN} (of one channel)")
    return samples, sample_rate


def _rounded(samples: Samples) -> Samples:
    """Round and clip to 32-bit samples as sox does, halves away from zero."""
    return np.clip(np.trunc(samples + np.copysign(0.5, samples)), -FULL_SCALE, LARGEST)


def resample(samples: Samples, source_rate: int, rate: int) -> Samples:
    """Resample with soxr's HQ, which has the same design and author as sox's `rate` at its default quality."""
    import soxr

    if source_rate == rate or not samples.size:
        return samples
    return _rounded(soxr.resample(samples.T, source_rate, rate, quality="HQ").T)


# ---------------------------------------------------------------- silence


def _silence_duration(arguments: Sequence[str], sample_rate: int) -> int | None:
    """Return the samples of D in `1 D T% -1 D T%` with equal halves; None for other forms of the effect."""
    if len(arguments) != 6 or arguments[0] != "1" or arguments[3] != "-1":
        return None
    if list(arguments[1:3]) != list(arguments[4:6]) or not arguments[2].endswith("%"):
        return None
    return int(float(arguments[1]) * sample_rate + 0.5) or None


def drop_silence(samples: Samples, sample_rate: int, duration: int, percent: float) -> Samples:
    """sox's `silence 1 D T% -1 D T%` on one channel, after its documented algorithm.

    A sample is loud if its RMS over the last 20 ms (zeros before the beginning) is above T percent of full scale.
    Samples up to the first `duration` consecutive loud samples are dropped. Samples up to the first `duration`
    consecutive quiet samples are then copied, and the quiet ones dropped. The algorithm repeats from there with an
    empty RMS window. A shorter quiet end is kept.
    """
    kept, at = [samples[:0]], 0
    while at < len(samples):
        begin, end, after = _next_stretch(samples[at:], sample_rate, duration, percent)
        kept.append(samples[at + begin : at + end])
        at += after
    return np.concatenate(kept)


def _next_stretch(samples: Samples, sample_rate: int, duration: int, percent: float) -> tuple[int, int, int]:
    """Return begin and end of the first segment to keep, and the position to continue from. Reads only as needed."""
    span = 8 * sample_rate
    while True:
        loud = _loud(samples[:span], sample_rate // 50, percent)
        begin = _first_run(loud, duration, 0)
        end = None if begin is None else _first_run(~loud, duration, begin + duration)
        if begin is not None and end is not None:
            return begin, end, end + duration
        if span >= len(samples):
            return (0, 0, len(samples)) if begin is None else (begin, len(samples), len(samples))
        span *= 4


def _loud(samples: Samples, window: int, percent: float) -> NDArray[np.bool_]:
    """Mark samples whose RMS over the last `window` samples is above `percent` of full scale.

    The running sum removes and adds one square at a time to round as sox does. The RMS is truncated to an integer.
    """
    squares = samples**2
    changes = np.zeros(2 * len(squares))
    changes[1::2] = squares
    changes[2 * window :: 2] = -squares[: max(0, len(squares) - window)]
    means = np.cumsum(changes)[1::2] / window
    return np.trunc(np.sqrt(np.maximum(means, 0))) / LARGEST * 100 > percent


def _first_run(flags: NDArray[np.bool_], length: int, start: int) -> int | None:
    """Return the index of the first run of `length` true flags at `start` or later; None if there is none."""
    false = np.concatenate([[0], np.cumsum(~flags[start:])])
    whole = false[length:] == false[:-length] if length < len(false) else np.zeros(0, bool)
    return start + int(np.argmax(whole)) if whole.any() else None
