"""Helpers of tests: cards of imaginary codecs, and speech-like waves."""

import numpy as np
import torch

from codecssl.tokenize.backends import encodec, tiny_16khz
from codecssl.tokenize.codec import Backend, CodecCard
from codecssl.tokenize.integrity.verify import examine

HASHCODEC = Backend(module="hashcodec", summary="", weights="")
"""hashcodec.py in this folder. Tests register it under the name hash_16khz."""


def card(sizes, per_frame=None, **more):
    """The card of a codec at 16 kHz and 50 frames per second, with codebooks of these sizes."""
    return CodecCard(
        name="made",
        weights="made",
        weights_sha256="0" * 64,
        sample_rate=16_000,
        hop_length=320,
        codebook_sizes=tuple(sizes),
        codes_per_frame=tuple(per_frame or (1,) * len(sizes)),
        latent_dim=4,
        **more,
    )


def wave(samples, seed=0, *, rate, levels=(0.0, 0.5), noise=0.3):
    """Float32 [samples]: a gliding tone and noise, at changing levels."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / rate
    level = np.interp(t, np.linspace(0, max(samples, 1) / rate, 12), rng.uniform(*levels, 12))
    tone = np.sin(2 * np.pi * np.cumsum(120 + 60 * np.sin(t)) / rate)
    return torch.from_numpy((level * (tone + noise * rng.standard_normal(samples))).astype(np.float32))


def codes_of(codec, waves):
    """The codes [R, T] of each wave."""
    return [encoded.codes for encoded in codec.encode(waves)]


def random_codec(seed=0, num_codebooks=8):
    """The network of tiny_16khz with untrained weights, as a codec."""
    net = encodec.from_encodec(random_network(seed))
    card = encodec.make_card("tiny_random", f"seed {seed}", f"{seed:064x}", net, num_codebooks, "cpu")
    return encodec.EncodecCodec(net, card)


def random_network(seed=0):
    """The network of tiny_16khz with untrained weights, and codebooks fitted to its own latents of noise bursts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_16khz.build_network(weight_norm=False)
        level = torch.rand(4, 1, 200).repeat_interleave(320 * 2, dim=2) ** 4
        with torch.no_grad():
            latents = model.encoder(level * torch.randn(4, 1, 200 * 640) * 0.3)
        tiny_16khz.fit_codebooks(model, latents.transpose(1, 2).reshape(-1, tiny_16khz.LATENT_DIM), iterations=3)
    return model.eval()


def verify(root, on_progress=lambda done, total: None):
    """Damages of a dataset, one line each."""
    return [str(damage) for damage in examine(root, on_progress=on_progress).damages]


def check_any_batch_and_any_cut(codec, lengths, rate=16_000):
    """The codes of waves in one batch are those of each alone and of its pieces; return those of the last, [R, T]."""
    codec.whole_seconds, codec.segment_seconds = 3, 2
    waves = [wave(n, n, rate=rate, levels=(0.1, 0.9)) for n in lengths]
    for one, codes in zip(waves, codes_of(codec, waves)):
        assert codes.shape == (codec.card.num_rows, codec.card.frames_of(len(one)))
        assert torch.equal(codec.encode([one])[0].codes, codes)
        stream = codec.stream()
        parts = [stream.push(part) for part in one.split(7_001)]
        assert torch.equal(torch.cat([*parts, stream.finish()], 1), codes)
    assert len(codes.unique()) > 5
    return codes
