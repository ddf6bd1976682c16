"""The module for HEAR 2021: `load_model`, `get_scene_embeddings`, `get_timestamp_embeddings` (its common API).

    hear-validator codecssl.superb.suites.hear_2021 --model model

Waves are float [B, n] at 16 kHz, from -1 to 1. Embeddings are float32. Times are the centres of frames in milliseconds,
evenly spaced and at most 50 ms apart: frames of slower codecs are repeated.
"""

import torch
from torch import Tensor, nn

from codecssl.superb.suites.wave_features import WaveFeatures
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.superb.upstreams.names import Upstream

LARGEST_STEP_MS = 50.0


class HearModel(nn.Module):
    """An upstream with the attributes that HEAR requires."""

    def __init__(self, upstream: str | Upstream | None = None, layer: int | None = None) -> None:
        super().__init__()
        self.features = WaveFeatures(upstream, layer)
        self.sample_rate = SAMPLE_RATE
        self.scene_embedding_size = self.timestamp_embedding_size = self.features.dim
        hop_ms = 1000 * self.features.hop / SAMPLE_RATE
        self.repeats = max(1, -int(-hop_ms // LARGEST_STEP_MS))
        """Embeddings per frame."""
        self.step_ms = hop_ms / self.repeats


def load_model(model_file_path: str = "") -> HearModel:
    """Load an upstream by name or path; without one, from the environment (see `wave_features`)."""
    return HearModel(model_file_path or None)


@torch.no_grad()
def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Waves [B, n] -> the mean over frames, [B, D]."""
    return torch.stack([frames.double().mean(0).float() for frames in model.features(list(audio))])


@torch.no_grad()
def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Waves [B, n] -> embeddings [B, T, D] and their times in milliseconds [B, T]."""
    frames = torch.stack(model.features(list(audio))).repeat_interleave(model.repeats, dim=1)
    times = (torch.arange(frames.shape[1], dtype=torch.float64) + 0.5) * model.step_ms
    return frames, times.float().to(frames.device).expand(len(audio), -1)
