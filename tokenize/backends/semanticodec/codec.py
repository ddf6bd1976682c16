"""SemantiCodec (Liu et al. 2024, arXiv 2405.00233): a semantic and an acoustic code in each cell of a grid.

Files of any length are encoded as by the authors: consecutive windows of 10.24 s, each encoded independently, the last
one zero-padded. Columns that begin after the wave's end are dropped. The decoder, a latent diffusion model, is not
implemented. Sizes are those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.parts.weights import fill_part, hub_file, missing, read_tensors
from codecssl.tokenize.backends.semanticodec.audiomae import SAMPLE_RATE, log_mel
from codecssl.tokenize.backends.semanticodec.encoder import AUDIOMAE, SemanticEncoder
from codecssl.tokenize.backends.semanticodec.grid import LOOKAHEAD, WINDOW, InputWindow, to_rows, to_tokens, windows
from codecssl.tokenize.codec import CodecCard, Encoded, keep_codebooks
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256

REPOSITORY = "haoheliu/SemantiCodec"
DEFAULT_FILES = (
    "semanticodec_tokenrate_50/encoder.ckpt",
    "codebook_idx/combine_256_audioset_dominate/codebook_8192_0.npy",
)
"""Files on the hub of the network that is loaded by default: 50 tokens/s, 16,384 centroids."""
CUDA_LANES = 16
"""Windows per GPU batch, padded with empty ones, so a wave's codes do not depend on its batch."""


class SemantiCodec:
    """SemantiCodec's encoder as a `Codec`."""

    def __init__(self, encoder: SemanticEncoder, card: CodecCard, device: str = "cpu", lanes: int = 1) -> None:
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.card, self.device, self.lanes = card, torch.device(device), lanes

    def stream(self) -> SemanticStream:
        return SemanticStream(self)

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        groups = [windows(wave) for wave in waves]
        codes = iter(self.encode_windows([window for group in groups for window in group]))
        return [Encoded(torch.cat([next(codes) for _ in group], dim=1)) for group in groups]

    @full_precision()
    def encode_windows(self, found: Sequence[InputWindow]) -> list[Tensor]:
        """Encode windows. Return the codes [R, T] of each."""
        codes = []
        for at in range(0, len(found), self.lanes):
            group = found[at : at + self.lanes]
            mels = torch.stack([log_mel(window.audio) for window in group])
            tokens = self.encoder(F.pad(mels, (0, 0, 0, 0, 0, self.lanes - len(group))).to(self.device))
            for lane, window in zip(tokens, group):
                rows = to_rows(lane[:, : self.card.num_codebooks], self.encoder.grid.cells)
                codes.append(rows[:, : self.card.frames_of(window.samples)])
        return codes

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Raises UserError: the decoder is not implemented."""
        raise UserError(
            f"codec {self.card.name}: encodes only; its decoder is a latent diffusion model. The authors' "
            "SemantiCodec.decode takes codecssl.tokenize.backends.semanticodec.grid.to_tokens(codes, "
            f"{self.encoder.grid.cells})[None]"
        )

    def embeddings(self) -> list[Tensor]:
        """Raises UserError: the latent is not a sum of embeddings, see `latents`."""
        card = self.card
        size = sum(v * n for v, n in zip(card.codebook_sizes, card.codes_per_frame)) * card.latent_dim * 4 / 1e9
        raise UserError(
            f"codec {card.name}: its latent has the vectors of a frame's {card.num_rows} codes side by side, "
            f"{card.latent_dim} numbers; tables that sum to it would take {size:.1f} GB. Pretrain with "
            "model.embedding_init: random and a model.embedding_dim"
        )

    def latents(self, codes: Tensor) -> Tensor:
        """Convert codes [R, T] to latents [bands * width, T]: per band the acoustic vector, then the semantic one."""
        bands = self.encoder.grid.cells
        vectors = self.encoder.vectors(to_tokens(codes.to(self.device), bands))
        return vectors.unflatten(0, (-1, bands)).flatten(1).t()


class SemanticStream(ChunkedStream):
    """Streaming encoder of one wave, a window at a time."""

    codec: SemantiCodec

    def __init__(self, codec: SemantiCodec) -> None:
        super().__init__(codec, chunk=WINDOW, size=WINDOW + LOOKAHEAD)

    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        found = windows(audio) if last else [InputWindow(audio, WINDOW)]
        return torch.cat(self.codec.encode_windows(found), dim=1)


# ---------------------------------------------------------------- loading


@dataclass(frozen=True)
class SemanticWeights:
    """The files of one network."""

    encoder: Path
    codebook: Path

    @classmethod
    def find(cls, name: str, weights: str | None) -> SemanticWeights:
        """Find the single checkpoint at any depth of a folder, by default the hub's.

        Raises UserError if there is none or more than one.
        """
        if weights is None:
            return cls(*(hub_file(name, REPOSITORY, file) for file in DEFAULT_FILES))
        if not (folder := Path(weights)).is_dir():
            raise missing(name, weights)
        found = {file: sorted(folder.rglob(file)) for file in ("encoder.ckpt", "codebook_*.npy")}
        for file, paths in found.items():
            if len(paths) != 1:
                raise UserError(
                    f"codec {name}: {folder} holds {len(paths)} of {file}, must be 1; give a folder with one "
                    f"semanticodec_tokenrate_*/encoder.ckpt and one codebook_*.npy of {REPOSITORY}"
                )
        return cls(*(paths[0].resolve() for paths in found.values()))

    def centroids(self, name: str) -> Tensor:
        """Read the table [V, D] of k-means centroids. Raises UserError if the file has anything else."""
        try:
            table = torch.from_numpy(np.load(self.codebook)).float()
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise UserError(f"{self.codebook}: not a semantic codebook of {name} ({error})") from error
        if table.dim() != 2 or not 1 <= len(table) <= 1 << 16:
            raise UserError(
                f"{self.codebook}: not a semantic codebook of {name} (an array {list(table.shape)}; must be "
                "centroids x numbers, 1 to 65536 centroids)"
            )
        return table


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> SemantiCodec:
    """Load `semanticodec` from a folder with one checkpoint or from the hub's cache (`Codec` loader)."""
    files = SemanticWeights.find(name, weights)
    state, centroids = read_tensors(files.encoder, name), files.centroids(name)
    try:
        encoder = SemanticEncoder(state, centroids)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{files.encoder}: not a checkpoint of {name} ({type(error).__name__}: {error})") from error
    for part, prefix in (
        (encoder.audiomae, AUDIOMAE),
        (encoder.encoder, "encoder."),
        (encoder.encoder_output_linear, "encoder_output_linear."),
    ):
        fill_part(part, state, prefix, files.encoder, name)
    kept = keep_codebooks(name, num_codebooks, 2, 2)
    card = make_card(name, weights or name, files, encoder, kept, device)
    lanes = CUDA_LANES if torch.device(device).type == "cuda" else 1
    return SemantiCodec(encoder, card, device, lanes)


def make_card(
    name: str, weights: str, files: SemanticWeights, encoder: SemanticEncoder, num_codebooks: int, device: str
) -> CodecCard:
    """Build the card of a checkpoint. Its sha256 covers both files."""
    grid = encoder.grid
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=file_sha256(files.encoder, files.codebook),
        sample_rate=SAMPLE_RATE,
        hop_length=grid.hop_length,
        codebook_sizes=(len(encoder.centroids), len(encoder.acoustic))[:num_codebooks],
        codes_per_frame=(grid.cells,) * num_codebooks,
        latent_dim=grid.cells * encoder.centroids.shape[1] * num_codebooks,
        policies=policies(
            f"windows of {WINDOW / SAMPLE_RATE} s, each for itself",
            device,
            padding="zeros to a whole window",
            loudness="none",
        ),
        versions=versions("torch", "torchaudio", "soxr"),
    )
