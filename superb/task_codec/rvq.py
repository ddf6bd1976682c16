"""A factorised residual vector quantizer, as in DAC (Kumar et al. 2023, arXiv 2306.06546, section 3.1).

    x [B, T, D] -> for each codebook: down-projection -> nearest entry by cosine -> up-projection -> residual

Each codebook looks up in few dimensions and encodes the residual of the previous ones. Losses, usage counts and
initialization ignore padding.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.kmeans import lloyd


@dataclass(frozen=True, kw_only=True)
class RvqConfig:
    """Sizes of a residual quantizer."""

    num_codebooks: int = 1
    codebook_size: int = 256
    codebook_dim: int = 32
    """Width of the lookup; 8 to 64 is sufficient."""

    def __post_init__(self) -> None:
        for name, least in (("num_codebooks", 1), ("codebook_size", 2), ("codebook_dim", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True)
class Quantised:
    """Results of a forward pass."""

    features: Tensor
    """[B, T, D], the sum of the codebooks' up-projected entries. The lookup has straight-through gradients."""
    codes: Tensor
    """int64 [B, K, T]."""
    commitment: Tensor
    """Scalar: squared distance of projections to their entries. Its gradient moves the projections."""
    codebook: Tensor
    """Scalar: the same distance. Its gradient moves the entries."""


def masked_square(a: Tensor, b: Tensor, mask: Tensor, kept: Tensor | None = None) -> Tensor:
    """Mean of (a - b)^2 [B, T, W] over the frames of `mask` [B, T]; items that `kept` [B] drops count as zero."""
    squares = (a - b).square().mean(dim=-1) * mask
    if kept is not None:
        squares = squares * kept[:, None]
    return squares.sum() / mask.sum().clamp(min=1)


class VectorQuantizer(nn.Module):
    """One codebook [V, W] between two projections."""

    uses: Tensor

    def __init__(self, dim: int, size: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        self.entries = nn.Parameter(torch.randn(size, width))
        self.register_buffer("uses", torch.zeros(size))

    def lookup(self, projected: Tensor) -> Tensor:
        """[..., W] -> int64 [...], the entry with the largest cosine. The first one wins a tie."""
        return (F.normalize(projected, dim=-1) @ F.normalize(self.entries, dim=-1).T).argmax(dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[B, T, D] -> features [B, T, D], codes [B, T], projections and entries [B, T, W]."""
        projected = self.down(x)
        codes = self.lookup(projected.detach())
        entries = self.entries[codes]
        straight = projected + (entries - projected).detach()
        return self.up(straight), codes, projected, entries

    def dequantise(self, codes: Tensor) -> Tensor:
        """int64 [...] -> [..., D]."""
        found: Tensor = self.up(self.entries[codes])
        return found

    @torch.no_grad()
    def fit(self, frames: Tensor, iterations: int, generator: torch.Generator, wanted: Tensor | None = None) -> None:
        """Initialize from frames [N, D].

        The down-projection is their first principal directions. The entries are k-means of the projections, by cosine.
        The up-projection is the least-squares inverse. `wanted`: linear maps [C, D] whose values count as much as the
        frames themselves in the principal directions.
        """
        mean = frames.mean(dim=0)
        centred = (frames - mean).double()
        seen = torch.eye(frames.shape[1], dtype=torch.float64, device=frames.device)
        if wanted is not None:
            values = wanted.double() * (centred.std() / (centred @ wanted.double().T).std().clamp(min=1e-9))
            seen = torch.cat([seen, values])
        _, found = torch.linalg.eigh(seen @ (centred.T @ centred) @ seen.T)  # in order of increasing variance
        kept = found.T.flip(0)[: self.down.out_features] @ seen
        self.down.weight.zero_()[: len(kept)] = kept.to(frames.dtype)
        self.down.bias.copy_(-self.down.weight @ mean)
        projected = self.down(frames)
        weight, bias = least_squares(projected, frames)
        self.up.weight.copy_(weight.T)
        self.up.bias.copy_(bias)
        self.entries.copy_(kmeans(projected, len(self.entries), iterations, generator))


class Rvq(nn.Module):
    """K vector quantizers, each of the residual of the previous ones."""

    def __init__(self, dim: int, config: RvqConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.codebook_size, config.codebook_dim)
        self._books = nn.ModuleList(VectorQuantizer(dim, *sizes) for _ in range(config.num_codebooks))

    @property
    def books(self) -> list[VectorQuantizer]:
        return list(self._books)  # type: ignore[arg-type]

    def forward(self, x: Tensor, mask: Tensor, kept: Tensor | None = None) -> Quantised:
        """Quantize x [B, T, D]. mask: valid frames, bool [B, T]. kept: codebooks per item, int64 [B]; default all.

        Losses are sums over codebooks. Training counts the uses of entries.
        """
        residual, features, codes = x, torch.zeros_like(x), []
        commitment = codebook = x.new_zeros(())
        for k, book in enumerate(self.books):
            has = torch.ones_like(mask[:, 0]) if kept is None else kept > k
            found, index, projected, entries = book(residual)
            features = features + found * has[:, None, None]
            residual = residual - found
            commitment = commitment + masked_square(projected, entries.detach(), mask, has)
            codebook = codebook + masked_square(entries, projected.detach(), mask, has)
            codes.append(index)
            if self.training:
                used = index[mask & has[:, None]]
                book.uses += torch.bincount(used, minlength=len(book.uses))
        return Quantised(features, torch.stack(codes, dim=1), commitment, codebook)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """[B, T, D] -> codes int64 [B, K, T]."""
        residual, codes = x, []
        for book in self.books:
            found, index, _, _ = book(residual)
            residual = residual - found
            codes.append(index)
        return torch.stack(codes, dim=1)

    def dequantise(self, codes: Tensor) -> Tensor:
        """Codes [B, k, T] of the first k codebooks -> [B, T, D]."""
        return torch.stack([self.books[k].dequantise(codes[:, k]) for k in range(codes.shape[1])]).sum(dim=0)

    @torch.no_grad()
    def fit(
        self, frames: Tensor, generator: torch.Generator, wanted: Tensor | None = None, iterations: int = 20
    ) -> None:
        """Initialize all codebooks from frames [N, D], one after another."""
        residual = frames
        for book in self.books:
            book.fit(residual, iterations, generator, wanted)
            residual = residual - book(residual[None])[0][0]

    @torch.no_grad()
    def revive(self, x: Tensor, mask: Tensor, least: float, generator: torch.Generator) -> list[int]:
        """Move entries used less than `least` times since the last call to projections of valid frames of x.

        Returns the number of dead entries of each codebook, and resets the counts.
        """
        residual, dead = x[mask][None], []
        for book in self.books:
            found, _, projected, _ = book(residual)
            gone = torch.nonzero(book.uses < least)[:, 0]
            dead.append(len(gone))
            picks = torch.randint(projected.shape[1], (len(gone),), generator=generator)
            book.entries[gone] = projected[0, picks.to(x.device)]
            book.uses.zero_()
            residual = residual - found
        return dead


def quantizer_dropout(batch: int, num_codebooks: int, share: float, generator: torch.Generator) -> Tensor:
    """Number of codebooks per item [B]: K, or for a `share` of the items a random number from 1 to K."""
    drawn = torch.randint(1, num_codebooks + 1, (batch,), generator=generator)
    return torch.where(torch.rand(batch, generator=generator) < share, drawn, torch.tensor(num_codebooks))


def kmeans(frames: Tensor, size: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Fit entries [size, W] to frames [N, W], assigned by cosine. An entry without frames becomes a random frame."""

    def draw(count: int) -> Tensor:
        if len(frames) >= count:
            picks = torch.randperm(len(frames), generator=generator)[:count]
        else:
            picks = torch.randint(len(frames), (count,), generator=generator)
        return frames[picks.to(frames.device)]

    def nearest(frames: Tensor, entries: Tensor) -> Tensor:
        return (F.normalize(frames, dim=-1) @ F.normalize(entries, dim=-1).T).argmax(dim=-1)

    return lloyd(frames, draw(size).clone(), iterations, nearest, draw)[0]


def least_squares(x: Tensor, y: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """W [D, E] and b [E] that minimize (x W + b - y)^2 over rows. The ridge covers directions that x lacks."""
    x64, y64 = x.double(), y.double()
    centre_x, centre_y = x64.mean(dim=0), y64.mean(dim=0)
    gram = (x64 - centre_x).T @ (x64 - centre_x)
    gram.diagonal().add_(ridge * gram.diagonal().mean() + 1e-9)
    weight = torch.linalg.solve(gram, (x64 - centre_x).T @ (y64 - centre_y))
    return weight.to(x.dtype), (centre_y - centre_x @ weight).to(x.dtype)
