"""A codec that costs nothing, for tests of all that happens around one: a frame's codes are a hash of its samples."""

import torch

from codecssl.tokenize.codec import CodecCard, Encoded

VERSION = "1"
"""Version of the library that computes the codes; another version gives other codes."""


class HashCodec:
    def __init__(self):
        self.card = CodecCard(
            name="hash_16khz",
            weights="hash_16khz",
            weights_sha256="0" * 64,
            sample_rate=16_000,
            hop_length=320,
            codebook_sizes=(1000, 1024),
            codes_per_frame=(1, 1),
            latent_dim=1,
            versions={"hash": VERSION},
        )

    def encode(self, waves):
        return [Encoded(codes_of(wave)) for wave in waves]

    def stream(self):
        return _Stream()


class _Stream:
    scales = None

    def __init__(self):
        self.waves = []

    def push(self, wave):
        self.waves.append(wave)
        return torch.zeros(2, 0, dtype=torch.int64)

    def finish(self):
        return codes_of(torch.cat(self.waves))


def codes_of(wave):
    frames = torch.nn.functional.pad(wave, (0, -len(wave) % 320)).reshape(-1, 320)
    level = (frames * torch.arange(320)).sum(1).mul(1e4).long() + int(VERSION)
    return torch.stack([level % 1000, level % 1024])


def load(name, weights, num_codebooks, device):
    return HashCodec()
