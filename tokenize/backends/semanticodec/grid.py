"""The time-frequency grid of SemantiCodec's tokens, and the windows in which a wave is encoded.

AudioMAE sees 10.24 s at once: 64 columns in time x 8 bands of patches. The networks with 50 or 25 tokens per second
instead of 100 join 2 neighboring bands, or 2 bands of 2 columns, into a cell. Tokens are ordered band by band within a
column, column by column, window by window. A frame here is one column. Row f of the codes is band f, lowest first;
semantic bands come before acoustic ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from codecssl.tokenize.backends.semanticodec.audiomae import BANDS, COLUMNS, FRAME, HOP, MEL_FRAMES, PATCH

WINDOW = MEL_FRAMES * HOP
"""Samples of a window, 10.24 s."""
LOOKAHEAD = FRAME - HOP
"""Lookahead in samples. The last two mel frames of a window, of 400 samples each, extend into the next window."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The layout of one of the three networks."""

    token_rate: int
    """Semantic and acoustic tokens per second, as the published code counts them."""
    columns: int
    bands: int
    """Columns and bands of patches that are joined into a cell."""

    @property
    def cells(self) -> int:
        """Cells in a column of the grid, one for each band of tokens."""
        return BANDS // self.bands

    @property
    def hop_length(self) -> int:
        """Samples per column of the grid."""
        return self.columns * PATCH * HOP

    def join(self, patches: Tensor) -> Tensor:
        """Join the patches [B, COLUMNS, BANDS, W] of each cell: [B, cells of the window, columns * bands * W]."""
        parts = patches.unflatten(2, (self.cells, self.bands)).unflatten(1, (COLUMNS // self.columns, self.columns))
        return parts.transpose(2, 3).flatten(3).flatten(1, 2)


GRIDS = {
    1: Grid(token_rate=100, columns=1, bands=1),
    2: Grid(token_rate=50, columns=1, bands=2),
    4: Grid(token_rate=25, columns=2, bands=2),
}
"""Keyed by the number of patches in a cell."""


def to_rows(tokens: Tensor, bands: int) -> Tensor:
    """Convert tokens [columns * bands, C] in the published order to codes [C * bands, columns]."""
    return tokens.unflatten(0, (-1, bands)).permute(2, 1, 0).flatten(0, 1)


def to_tokens(codes: Tensor, bands: int) -> Tensor:
    """Convert codes [C * bands, columns] to tokens [columns * bands, C]. Inverse of `to_rows`."""
    return codes.unflatten(0, (-1, bands)).permute(2, 1, 0).flatten(0, 1)


@dataclass(frozen=True)
class InputWindow:
    """One input window of the encoder."""

    audio: Tensor
    samples: int
    """Samples of the wave, without lookahead and padding."""


def windows(wave: Tensor) -> list[InputWindow]:
    """Cut a whole wave [n], or its end, into windows. A window includes LOOKAHEAD more samples if the wave has them."""
    found = []
    while len(wave) >= WINDOW:
        audio = wave[: WINDOW + LOOKAHEAD]
        found.append(InputWindow(F.pad(audio, (0, WINDOW + LOOKAHEAD - len(audio))), WINDOW))
        wave = wave[WINDOW:]
    if len(wave):
        found.append(InputWindow(F.pad(wave, (0, WINDOW - len(wave))), len(wave)))
    return found
