"""Contrastive prediction of masked frames: the right frame of the log-mel plane among all frames of its item.

The loss is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4) at masked frames, as in wav2vec 2.0 (arXiv
2006.11477, equation 3). All negatives are frames of the same item, so the voice and the channel do not help to find the
right one. The targets are normalised log-mels, not a quantized latent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.fairseq2_parts import Linear
from codecssl.pretrain.model.model import MelProjection
from codecssl.pretrain.model.packing import packed_layout, to_grid

_OFFSETS = (-2, 0, 2)
"""Frames of the plane, relative to the predicted one, that make up a target."""
_LEAST_DEVIATION = 0.05
"""Smallest divisor of a scaled band, so that silence is not scaled up to noise."""


class Contrast(nn.Module):
    """InfoNCE between a projection of hidden states and a projection of normalised log-mels.

    dim: width of the hidden states. bands: bands of the plane. width: width of both projections. temperature: divisor
    of their cosines.
    """

    def __init__(self, dim: int, bands: int, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.query = Linear(dim, width, bias=True)
        self.key = Linear(len(_OFFSETS) * bands, width, bias=True)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the sum over the masked frames of a packed batch. hidden: [N, D]."""
        assert batch.mel is not None, "the loader reads it for model.input mel and both"
        layout = packed_layout(batch.frames, hidden.device)
        real = to_grid(torch.ones_like(hidden[:, 0], dtype=torch.bool), layout)  # [B, T]
        masked = to_grid(torch.zeros_like(hidden[:, 0], dtype=torch.bool).index_fill(0, batch.masked, True), layout)
        plane = contrast_features(to_grid(MelProjection.scaled(batch.mel), layout), real)
        keys = F.normalize(self.key(plane.to(hidden.dtype)).float(), dim=-1)
        queries = F.normalize(self.query(to_grid(hidden, layout)).float(), dim=-1)
        logits = queries @ keys.transpose(1, 2) / self.temperature  # [B, T, T]
        logits = logits.masked_fill(~real[:, None, :], -torch.inf)
        losses = torch.logsumexp(logits, dim=2) - logits.diagonal(dim1=1, dim2=2)
        return torch.where(masked, losses, 0.0).sum()


def contrast_features(plane: Tensor, real: Tensor) -> Tensor:
    """Return the targets [B, T, 3 bands] of planes [B, T, bands], given their frames without padding, bool [B, T].

    Each band has mean 0 and deviation 1 over the frames of its item, and less than 1 in silence. Frames before the
    first and after the last repeat those.
    """
    weight, count = real[:, :, None].to(plane.dtype), real.sum(1)[:, None, None]
    mean = (plane * weight).sum(1, keepdim=True) / count
    deviation = (((plane - mean) * weight).square().sum(1, keepdim=True) / count).sqrt()
    plane = (plane - mean) / deviation.clamp(min=_LEAST_DEVIATION)
    last = (real.sum(1) - 1)[:, None]
    places = torch.arange(plane.shape[1], device=plane.device)
    moved = [torch.minimum((places + offset).clamp(min=0).expand_as(real), last) for offset in _OFFSETS]
    return torch.cat([plane.take_along_dim(at[:, :, None], 1) for at in moved], dim=2)
