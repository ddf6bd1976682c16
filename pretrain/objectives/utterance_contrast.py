"""Contrast between utterances: the two halves of an item find each other among the halves of all items.

The loss is InfoNCE with both halves as queries (NT-Xent, Chen et al. 2020, arXiv 2002.05709, equation 1), on hidden
states averaged over time. Positives are segments of the same recording, as in COLA (Saeed et al. 2021, arXiv
2010.10915, section 2) and in the utterance-wise contrastive loss of UniSpeech-SAT (arXiv 2110.05752, section 3.1). It
teaches what stays the same in a recording: the voice, its state, and the place.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.pretrain.model.fairseq2_parts import Linear


class UtteranceContrast(nn.Module):
    """InfoNCE between projections of the mean hidden states of both halves of each item.

    dim: width of the hidden states. width: width of the projection. temperature: divisor of the cosines.
    """

    def __init__(self, dim: int, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.projection = Linear(dim, width, bias=True)

    def forward(self, hidden: Tensor, frames: Sequence[int]) -> Tensor:
        """Return the mean loss over the halves of a packed batch.

        hidden: [N, D]. frames: frames of each item, N in all. Half of an item of one frame is empty: its mean is 0.
        """
        sizes = torch.tensor([size for total in frames for size in (total - total // 2, total // 2)])
        which = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(hidden.device)
        counts = sizes.clamp(min=1).to(hidden.device)
        sums = hidden.new_zeros(len(sizes), hidden.shape[1], dtype=torch.float32).index_add(0, which, hidden.float())
        means = (sums / counts[:, None]).to(hidden.dtype)
        halves = F.normalize(self.projection(means).float(), dim=-1)
        logits = halves @ halves.t() / self.temperature
        itself = torch.eye(len(sizes), dtype=torch.bool, device=hidden.device)
        other = torch.arange(len(sizes), device=hidden.device) ^ 1
        return F.cross_entropy(logits.masked_fill(itself, -torch.inf), other)
