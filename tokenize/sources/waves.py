"""Waves in memory as a codec takes them, and the times of its frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from codecssl.tokenize.codec import CodecCard

if TYPE_CHECKING:
    from torch import Tensor


def at_codec_rate(wave: Tensor, sample_rate: int, card: CodecCard) -> Tensor:
    """Convert a float wave [n] at `sample_rate` Hz to the codec's input, float32 [n'], or [C, n'] for C channels.

    The wave is resampled by soxr (HQ), as files are in `codecssl-tokenize run`, and repeated for each channel.
    """
    import torch

    wave = wave.detach().float()
    if card.sample_rate != sample_rate:
        import soxr

        wave = torch.from_numpy(soxr.resample(wave.cpu().numpy(), sample_rate, card.sample_rate, quality="HQ"))
    return wave if card.channels == 1 else wave.expand(card.channels, -1).contiguous()


def frame_times(card: CodecCard, samples: int) -> NDArray[np.float64]:
    """Return the centre of each frame in seconds, float64 [T], of a wave with `samples` samples at the codec's rate.

    Frames of a codec with segments are in order of segments, which overlap: their times are not monotonic.
    """
    hop = card.hop_length
    if card.segment_samples:
        lengths = [
            (begin, min(card.segment_samples, samples - begin)) for begin in range(0, samples, card.segment_stride)
        ]
    else:
        lengths = [(0, samples)]
    starts = np.concatenate([begin + hop * np.arange(-(-length // hop)) for begin, length in lengths])
    return (starts + hop / 2) / card.sample_rate


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Limit torch to one thread on a CPU. No effect for a GPU.

    The bits of a convolution may depend on the number of threads, and codes must not.
    """
    import torch

    threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
