"""Apply a codec to waves at 16 kHz, s3prl's sample rate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from codecssl.tokenize.codec import Codec, CodecCard, Encoded

SAMPLE_RATE = 16_000  # of all waves from s3prl
SHORTEST = 800  # samples; s3prl pads shorter waves to this length


def encode(codec: Codec, wavs: Sequence[Tensor], device: str = "cpu") -> list[Tensor]:
    """1-D float waves at 16 kHz -> codes [R, T] each.

    On a CPU this uses one thread, whatever torch's setting. The bits of a convolution may depend on the number of
    threads, and codes must not.
    """
    waves = [at_codec_rate(wav, codec.card).to(device) for wav in wavs]
    return [encoded.codes for encoded in encode_at_codec_rate(codec, waves, device)]


def encode_at_codec_rate(codec: Codec, waves: Sequence[Tensor], device: str) -> list[Encoded]:
    """Encode waves as `at_codec_rate` returns them."""
    if not len(waves):
        return []
    with one_thread(device):
        return codec.encode(waves)


def at_codec_rate(wav: Tensor, card: CodecCard) -> Tensor:
    """Convert a 1-D wave at 16 kHz to the codec's input: resampled as in codecssl-tokenize, on all its channels."""
    wave = wav.detach().float()
    if card.sample_rate != SAMPLE_RATE:
        import soxr

        wave = torch.from_numpy(soxr.resample(wave.cpu().numpy(), SAMPLE_RATE, card.sample_rate, quality="HQ"))
    return wave if card.channels == 1 else wave.expand(card.channels, -1).contiguous()


@contextmanager
def one_thread(device: str) -> Iterator[None]:
    """Limit torch to one thread on a CPU. No effect for a GPU."""
    threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
