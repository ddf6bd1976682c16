"""SemantiCodec's encoder (Liu et al. 2024, arXiv 2405.00233, section III): a semantic and an acoustic token per cell.

The semantic token is the k-means centroid next to AudioMAE's features of the cell. A bidirectional LSTM reads features
and centroids side by side. Its output, projected to the width of a centroid, is quantized to the acoustic token.

Cells after the last audible mel frame of a window are -1 in the LSTM's input. A frame is silent if its bands are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from codecssl.tokenize.backends.parts.residual_vq import ResidualQuantizer
from codecssl.tokenize.backends.semanticodec.audiomae import MEL_FRAMES, AudioMAE
from codecssl.tokenize.backends.semanticodec.grid import GRIDS, Grid

SILENT = 1e-7
"""Greatest standard deviation over the bands of a silent mel frame."""
PADDING = -1.0
AUDIOMAE, ACOUSTIC = "audiomae.model.", "quantizer._codebook.embed"
"""Prefix and key in a checkpoint. AudioMAE's decoder and the quantizer's statistics are ignored."""


class SemanticEncoder(nn.Module):
    """Spectrograms [B, MEL_FRAMES, MEL_BANDS] to tokens [B, N, 2]: encoder.ckpt and a table of centroids."""

    centroids: Tensor
    acoustic: Tensor

    def __init__(self, state: dict[str, Tensor], centroids: Tensor) -> None:
        """Take the sizes from a checkpoint, and its codebooks. The layers' weights are not loaded.

        state: tensors of encoder.ckpt. centroids: [V, D]. Raises KeyError if a tensor is missing and ValueError if the
        sizes do not fit together.
        """
        super().__init__()
        width = len(state[AUDIOMAE + "patch_embed.proj.bias"])
        joined, rest = divmod(centroids.shape[1], width)
        acoustic = state[ACOUSTIC].float().flatten(0, -2)
        if rest or joined not in GRIDS or acoustic.shape[1] != centroids.shape[1]:
            raise ValueError(
                f"centroids of {centroids.shape[1]} numbers and acoustic entries of {acoustic.shape[1]}; both must "
                f"have 1, 2 or 4 times AudioMAE's width, {width}"
            )
        blocks = {key.split(".")[3] for key in state if key.startswith(AUDIOMAE + "blocks.")}
        layers = sum(key.startswith("encoder.bias_ih_l") and not key.endswith("_reverse") for key in state)
        size = centroids.shape[1]
        self.grid: Grid = GRIDS[joined]
        self.audiomae = AudioMAE(width, len(blocks))
        self.encoder = nn.LSTM(2 * size, 2 * size, layers, batch_first=True, bidirectional=True)
        self.encoder_output_linear = nn.Linear(4 * size, size, bias=False)
        self.register_buffer("centroids", centroids.float(), persistent=False)
        self.register_buffer("acoustic", acoustic, persistent=False)

    def forward(self, mels: Tensor) -> Tensor:
        features = self.grid.join(self.audiomae(mels))  # [B, N, D]
        semantic, centroids = _nearest(features, self.centroids)
        both = torch.cat([features, centroids], dim=2)
        starts = torch.arange(both.shape[1], device=mels.device)
        padded = starts >= _active_cells(mels, both.shape[1])[:, None]
        residual, _ = self.encoder(both.masked_fill(padded[:, :, None], PADDING))
        acoustic, _ = _nearest(self.encoder_output_linear(residual), self.acoustic)
        return torch.stack([semantic, acoustic], dim=2)

    def vectors(self, tokens: Tensor) -> Tensor:
        """Look up tokens [N, 2] or semantic tokens [N, 1]: [N, C * D], the acoustic vector before the semantic one."""
        found = [nn.functional.embedding(column, table) for column, table in zip(tokens.t(), self._tables())]
        return torch.cat(found[::-1], dim=1)

    def _tables(self) -> tuple[Tensor, Tensor]:
        return self.centroids, self.acoustic


def _nearest(vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices [B, N] and values [B, N, D] of the entries of a table [V, D] nearest to vectors [B, N, D]."""
    codes = ResidualQuantizer(table[None]).quantize(vectors.flatten(0, 1).t())[0].view(vectors.shape[:2])
    return codes, nn.functional.embedding(codes, table)


def _active_cells(mels: Tensor, cells: int) -> Tensor:
    """Return the number of cells [B] of each window up to its last audible mel frame.

    The published code also counts none if only a single frame is audible.
    """
    audible = mels.std(dim=2) > SILENT
    frames = (audible * torch.arange(1, MEL_FRAMES + 1, device=mels.device)).amax(dim=1)
    frames = frames.masked_fill(audible.sum(dim=1) == 1, 0)
    return -(-cells * frames // MEL_FRAMES)
