"""Distances between a wave and its reconstruction by a codec."""

from __future__ import annotations

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

RATE = 16_000
"""Sample rate in Hz at which waves are compared."""
MAX_LAG = 800
"""Maximum delay in samples of a decoder's output that is undone before a comparison."""


def mel_distance(target: NDArray[np.float32], output: NDArray[np.float32]) -> float:
    """Mean |difference| of natural-log mel magnitudes of two waves of the same length at 16 kHz.

    80 bands, windows of 1024 samples every 256, magnitudes of at least 1e-5.
    """
    transform = torchaudio.transforms.MelSpectrogram(RATE, n_fft=1024, hop_length=256, n_mels=80, power=1)
    logs = [torch.log(transform(torch.from_numpy(np.ascontiguousarray(w))).clamp(min=1e-5)) for w in (target, output)]
    return float((logs[0] - logs[1]).abs().mean())


def si_sdr(target: NDArray[np.float32], output: NDArray[np.float32]) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019, equation 5)."""
    x, y = target.astype(np.float64), output.astype(np.float64)
    scaled = x * (x @ y) / (x @ x + 1e-12)
    return float(10 * np.log10((scaled @ scaled + 1e-12) / ((y - scaled) @ (y - scaled) + 1e-12)))


def align(target: NDArray[np.float32], output: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Undo the delay of a decoder's output, 0 to MAX_LAG samples, and cut both waves to where they overlap."""
    n = min(len(target), len(output))
    size = 1 << (2 * n - 1).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(output[:n], size) * np.conj(np.fft.rfft(target[:n], size)), size)
    lag = int(np.argmax(correlation[: min(MAX_LAG, n // 2) + 1]))
    return target[: n - lag], output[lag:n]
