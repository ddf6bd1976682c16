"""SemantiCodec (Liu et al. 2024): a semantic and an acoustic code in each cell of a time-frequency grid.

AudioMAE sees 10.24 s at once: 1024 mel frames x 128 bins in patches of 16 x 16, that is 64 columns in time x 8 bands.
The networks with 50 or 25 tokens per second instead of 100 join 2 neighboring bands, or 2 bands of 2 columns, into a
cell. Tokens are ordered band by band within a column, column by column, window by window. A frame here is one column.
Row f of the codes is band f, lowest first; semantic bands come before acoustic ones.

Files of any length are encoded as in the package: consecutive windows of 10.24 s, each encoded independently, the last
one zero-padded. Columns that begin after the wave's end are dropped.

The package is not in a registry. Only its `SemantiCodec` class and its mel spectrogram are used.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.parts.precision import full_precision
from codecssl.tokenize.backends.table import BACKENDS
from codecssl.tokenize.codec import CodecCard, Encoded, keep_codebooks
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256

SAMPLE_RATE, WINDOW, MEL_FRAMES = 16_000, 163_840, 1024
LOOKAHEAD = 240
"""Lookahead in samples. The last two mel frames of a window, of 400 samples each, extend into the next window."""
CUDA_LANES = 16
"""Windows per GPU batch, padded with empty ones, so a wave's codes do not depend on its batch."""
NOISE_SEED = 0
"""Seed of the decoder, which samples by diffusion: `torch.manual_seed` before each utterance."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The layout of one of the three networks."""

    token_rate: int
    """Semantic and acoustic tokens per second, as the package counts them."""
    bands: int
    hop_length: int
    """Samples per column."""
    folder: str
    """Sizes of its semantic codebooks in the published checkpoints."""


GRIDS = {
    768: Grid(token_rate=100, bands=8, hop_length=2560, folder="combine_512_audioset_dominate"),
    1536: Grid(token_rate=50, bands=4, hop_length=2560, folder="combine_256_audioset_dominate"),
    3072: Grid(token_rate=25, bands=4, hop_length=5120, folder="combine_128_audioset_dominate"),
}
"""Keyed by the width of a semantic codebook's entries: 768 (AudioMAE's width) for each patch in a cell."""


class PackageEncoder(Protocol):
    """Protocol of the package's encoder, as far as it is used here."""

    centroid_npy: Tensor
    """The semantic codebook [V, D]."""
    codebook_size: int
    """Number of entries of the acoustic codebook."""

    def __call__(self, batch: Tensor) -> Tensor:
        """Encode mel spectrograms [B, 1024 w, 128] to int64 tokens [B, N, 2], semantic and acoustic."""

    def unquant(self, tokens: Tensor) -> Tensor:
        """Look up semantic tokens [B, N] as vectors [B, N, D]."""

    def token_to_quantized_feature(self, tokens: Tensor) -> Tensor:
        """Convert tokens [1, N, 2] to features [1, N, 2 D], the acoustic half first."""


class Package(Protocol):
    """Protocol of `semanticodec.SemantiCodec`, as far as it is used here."""

    encoder: PackageEncoder

    def decode(self, tokens: Tensor) -> NDArray[np.float32]:
        """Decode tokens [1, N, 2] to a wave [1, 1, n]."""


class Mel(Protocol):
    """Protocol of `semanticodec.utils.extract_kaldi_fbank_feature`."""

    def __call__(self, waveform: Tensor, sampling_rate: int, target_length: int) -> dict[str, Tensor]:
        """Compute {"ta_kaldi_fbank": [target_length, 128]} of a wave [1, n]. Frames are cut off or zero-padded."""


# ---------------------------------------------------------------- the grid


def to_rows(tokens: Tensor, bands: int) -> Tensor:
    """Convert tokens [columns * bands, C] in the package's order to codes [C * bands, columns]."""
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


# ---------------------------------------------------------------- the codec


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the package, which prints its progress, and a traceback where only a single mel frame is not silent."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


class SemanticCodec:
    """A `semanticodec.SemantiCodec` as a `Codec`."""

    def __init__(
        self, package: Package, mel: Mel, grid: Grid, card: CodecCard, device: str = "cpu", lanes: int = 1
    ) -> None:
        self.package, self.mel, self.grid = package, mel, grid
        self.card, self.device, self.lanes = card, torch.device(device), lanes

    def stream(self) -> SemanticStream:
        return SemanticStream(self)

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        groups = [windows(wave) for wave in waves]
        codes = iter(self.encode_windows([window for group in groups for window in group]))
        return [Encoded(torch.cat([next(codes) for _ in group], dim=1)) for group in groups]

    def encode_windows(self, found: Sequence[InputWindow]) -> list[Tensor]:
        """Encode windows. Return the codes [R, T] of each."""
        codes = []
        for at in range(0, len(found), self.lanes):
            group = found[at : at + self.lanes]
            mels = torch.stack([self._mel(window.audio, 1) for window in group])
            lanes = self._rows(F.pad(mels, (0, 0, 0, 0, 0, self.lanes - len(group))))
            codes += [lane[:, : self.card.frames_of(window.samples)] for lane, window in zip(lanes, group)]
        return codes

    def encode_reference(self, wave: Tensor) -> Tensor:
        """Encode the whole wave as `SemantiCodec.encode` does: one spectrogram, then cut into windows.

        If the wave fills its windows exactly, the package adds an empty one.
        Its own token count may end within a column.
        """
        count = len(wave) // WINDOW + 1
        mel = self._mel(F.pad(wave, (0, count * WINDOW - len(wave))), count)
        return self._rows(mel[None])[0][:, : self.card.frames_of(len(wave))]

    def _mel(self, wave: Tensor, count: int) -> Tensor:
        """Compute the spectrogram [1024 * count, 128] of `count` windows of a wave [n]."""
        return self.mel(wave[None].float().cpu(), SAMPLE_RATE, target_length=count * MEL_FRAMES)["ta_kaldi_fbank"]

    def _rows(self, mels: Tensor) -> list[Tensor]:
        with full_precision(), _silence():
            tokens = self.package.encoder(mels.to(self.device))
        return [to_rows(lane[:, : self.card.num_codebooks], self.grid.bands) for lane in tokens]

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Decode by diffusion, 50 steps per 10.24 s. Raises UserError without the acoustic codes."""
        if self.card.num_codebooks < 2:
            raise UserError(f"codec {self.card.name}: decodes from 2 codebooks, 1 is kept; tokenize with both")
        samples = codes.shape[1] * self.card.hop_length
        if not samples:
            return torch.zeros(0)
        tokens = to_tokens(codes.to(self.device), self.grid.bands)[None]
        devices = [self.device] if self.device.type == "cuda" else []
        with full_precision(), _silence(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(NOISE_SEED)
            wave = torch.as_tensor(self.package.decode(tokens), dtype=torch.float32).flatten()[:samples]
        return F.pad(wave, (0, samples - len(wave)))

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
        tokens = to_tokens(codes.to(self.device), self.grid.bands)[None]
        encoder = self.package.encoder
        with full_precision():
            both = self.card.num_codebooks == 2
            found = encoder.token_to_quantized_feature(tokens) if both else encoder.unquant(tokens[..., 0])
        return found[0].unflatten(0, (-1, self.grid.bands)).flatten(1).t()


class SemanticStream(ChunkedStream):
    """Streaming encoder of one wave, a window at a time."""

    codec: SemanticCodec

    def __init__(self, codec: SemanticCodec) -> None:
        super().__init__(codec, chunk=WINDOW, size=WINDOW + LOOKAHEAD)

    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        found = windows(audio) if last else [InputWindow(audio, WINDOW)]
        return torch.cat(self.codec.encode_windows(found), dim=1)


# ---------------------------------------------------------------- loading


@dataclass(frozen=True, kw_only=True)
class SemanticWeights:
    """The files of one network."""

    encoder: Path
    decoder: Path
    codebook: Path
    grid: Grid
    semantic_size: int

    def link(self, folder: Path) -> None:
        """Link the files in the layout that the package expects."""
        codebook = folder / "codebook_idx" / self.grid.folder / f"codebook_{self.semantic_size // 2}_0.npy"
        codebook.parent.mkdir(parents=True)
        codebook.symlink_to(self.codebook)
        (folder / "encoder.ckpt").symlink_to(self.encoder)
        (folder / "decoder.ckpt").symlink_to(self.decoder)


def find_checkpoint(name: str, folder: Path) -> SemanticWeights:
    """Find the single checkpoint at any depth of a folder. Raises UserError if there is none or more than one."""
    found = {file: sorted(folder.rglob(file)) for file in ("encoder.ckpt", "decoder.ckpt", "codebook_*.npy")}
    for file, paths in found.items():
        if len(paths) != 1:
            raise UserError(
                f"codec {name}: {folder} holds {len(paths)} of {file}, must be 1; give a folder with one "
                "semanticodec_tokenrate_*/{encoder,decoder}.ckpt and one codebook_*.npy of haoheliu/SemantiCodec"
            )
    encoder, decoder, codebook = (paths[0].resolve() for paths in found.values())
    try:
        size, width = np.load(codebook, mmap_mode="r").shape
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{codebook}: not a semantic codebook of {name} ({error})") from error
    if width not in GRIDS:
        raise UserError(f"{codebook}: entries of {width} numbers, {name} has {', '.join(map(str, GRIDS))}")
    return SemanticWeights(encoder=encoder, decoder=decoder, codebook=codebook, grid=GRIDS[width], semantic_size=size)


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> SemanticCodec:
    """Load `semanticodec` from a folder with one checkpoint (`Codec` loader; see `load_codec`)."""
    how = BACKENDS[name].weights
    if weights is None:
        raise UserError(f"codec {name}: weights are not shipped; {how}")
    try:
        from semanticodec import SemantiCodec
        from semanticodec.utils import extract_kaldi_fbank_feature
    except ImportError as error:
        raise UserError(f"codec {name}: needs the semanticodec package ({error}); {how}") from error
    checkpoint = find_checkpoint(name, Path(weights))
    kept = keep_codebooks(name, num_codebooks, 2, 2)
    package = _build(name, SemantiCodec, checkpoint, device)
    card = make_card(name, weights, checkpoint, package, kept, device)
    lanes = CUDA_LANES if torch.device(device).type == "cuda" else 1
    return SemanticCodec(package, extract_kaldi_fbank_feature, checkpoint.grid, card, device, lanes)


def _build(name: str, kind: Any, checkpoint: SemanticWeights, device: str) -> Any:
    with TemporaryDirectory() as folder, _silence():
        checkpoint.link(Path(folder))
        try:
            package = kind(
                token_rate=checkpoint.grid.token_rate,
                semantic_vocab_size=checkpoint.semantic_size,
                checkpoint_path=folder,
                cache_path=folder,
            )
        except (AssertionError, RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            what = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise UserError(f"{checkpoint.encoder.parent}: not a checkpoint of {name} ({what})") from error
    # the package uses a GPU if there is one, and keeps the semantic codebook outside its parameters
    package = package.to(device).eval()
    package.device = package.decoder.device = package.encoder.device = torch.device(device)
    package.encoder.centroid_npy = package.encoder.centroid_npy.to(device)
    return package


def make_card(
    name: str, weights: str, checkpoint: SemanticWeights, package: Package, num_codebooks: int, device: str
) -> CodecCard:
    """Build the card of a checkpoint. Its sha256 covers the files that determine codes, not those of the decoder."""
    grid, encoder = checkpoint.grid, package.encoder
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=file_sha256(checkpoint.encoder, checkpoint.codebook),
        sample_rate=SAMPLE_RATE,
        hop_length=grid.hop_length,
        codebook_sizes=(len(encoder.centroid_npy), encoder.codebook_size)[:num_codebooks],
        codes_per_frame=(grid.bands,) * num_codebooks,
        latent_dim=grid.bands * encoder.centroid_npy.shape[1] * num_codebooks,
        policies=policies(
            f"windows of {WINDOW / SAMPLE_RATE} s, each for itself",
            device,
            padding="zeros to a whole window",
            loudness="none",
        ),
        versions=versions("torch", "torchaudio", "semanticodec", "timm", "vector-quantize-pytorch", "soxr"),
    )
