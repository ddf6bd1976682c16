"""Apply a codec to waves at 16 kHz, s3prl's sample rate."""

from collections.abc import Sequence

from torch import Tensor

from codecssl.tokenize.codec import Codec, CodecCard, Encoded
from codecssl.tokenize.sources import waves

SAMPLE_RATE = 16_000  # of all waves from s3prl
SHORTEST = 800  # samples; s3prl pads shorter waves to this length


def encode(codec: Codec, wavs: Sequence[Tensor], device: str = "cpu") -> list[Tensor]:
    """1-D float waves at 16 kHz -> codes [R, T] each.

    On a CPU this uses one thread, whatever torch's setting. The bits of a convolution may depend on the number of
    threads, and codes must not.
    """
    inputs = [at_codec_rate(wav, codec.card).to(device) for wav in wavs]
    return [encoded.codes for encoded in encode_at_codec_rate(codec, inputs, device)]


def encode_at_codec_rate(codec: Codec, inputs: Sequence[Tensor], device: str) -> list[Encoded]:
    """Encode waves as `at_codec_rate` returns them."""
    if not len(inputs):
        return []
    with waves.one_thread(device):
        return codec.encode(inputs)


def at_codec_rate(wav: Tensor, card: CodecCard) -> Tensor:
    """Convert a 1-D wave at 16 kHz to the codec's input: resampled as in codecssl-tokenize, on all its channels."""
    return waves.at_codec_rate(wav, SAMPLE_RATE, card)
