"""The `Codec` protocol, the card that identifies a codec, and `Backend`, the description of a registered codec.

`registry.load_codec` finds a codec by name or path. To add a built-in codec, write a module in `backends/` with a
`load` function and list it in `backends/table.py`. Other packages register theirs through the entry-point group
`codecssl.codecs` (see `registry`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from codecssl.tokenize.common.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Lengths = TypeVar("Lengths", int, "NDArray[np.int64]")


@dataclass(frozen=True, kw_only=True)
class CodecCard:
    """Everything that determines a codec's codes. Every dataset and every exported model contains its codec's card."""

    name: str
    weights: str
    """The name or path from which the weights were loaded."""
    weights_sha256: str
    sample_rate: int
    """Hz."""
    hop_length: int
    """Samples per frame."""
    codebook_sizes: tuple[int, ...]
    """Entries of each codebook that is kept, coarsest first."""
    codes_per_frame: tuple[int, ...]
    """Codes of each codebook in one frame: 1, or more where codebooks run at different rates."""
    latent_dim: int
    channels: int = 1
    """Channels of the input wave."""
    segment_samples: int = 0
    """Length in samples of the independently encoded segments, each with its own scale; 0 if the wave is not cut."""
    segment_stride: int = 0
    """Samples from the start of one segment to the start of the next."""
    policies: dict[str, str] = field(default_factory=dict)
    """Conversion of audio to the codec's input: channels, resampling, padding, chunks, precision, device."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that computed the codes."""

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second, exactly."""
        return Fraction(self.sample_rate, self.hop_length)

    @property
    def code_bits(self) -> tuple[int, ...]:
        """Bits of a stored code of each codebook: ceil(log2 size)."""
        return tuple(max(1, (size - 1).bit_length()) for size in self.codebook_sizes)

    @property
    def num_rows(self) -> int:
        """R, the number of rows of the codes [R, T]: K, or more if codebooks run at different frame rates."""
        return sum(self.codes_per_frame)

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Size of the codebook of each row, [R]."""
        return tuple(size for size, count in zip(self.codebook_sizes, self.codes_per_frame) for _ in range(count))

    @property
    def fsq_levels(self) -> int | None:
        """Levels of each channel of a finite scalar quantizer (`backends/parts/fsq.py`), None for any other codec.

        Its latent has one channel for each digit of the code: a single codebook of levels ** latent_dim codes.
        """
        if self.num_rows != 1:
            return None
        levels = round(self.codebook_sizes[0] ** (1.0 / self.latent_dim))
        return levels if levels > 1 and levels**self.latent_dim == self.codebook_sizes[0] else None

    @property
    def bits_per_second(self) -> float:
        """Nominal bit rate of the stored codes."""
        per_frame = sum(b * n for b, n in zip(self.code_bits, self.codes_per_frame))
        frame_rate = self.frame_rate
        if self.segment_samples:  # segments overlap a little
            frame_rate = Fraction(self.frames_of(self.segment_samples) * self.sample_rate, self.segment_stride)
        return float(per_frame * frame_rate)

    def frames_of(self, samples: Lengths) -> Lengths:
        """Number of frames T of waves with `samples` samples (an int or an integer array), the last one padded."""
        if not self.segment_samples:
            return -(-samples // self.hop_length)
        # whole segments first, then the shorter ones at the end of the wave
        segment, stride = self.segment_samples, self.segment_stride
        whole = (samples - segment + stride) // stride * (samples >= segment)
        frames = whole * -(-segment // self.hop_length)
        for cut in range(-(-segment // stride)):
            rest = samples - (whole + cut) * stride
            frames = frames + (rest > 0) * -(-rest // self.hop_length)
        return frames

    def segments_of(self, samples: Lengths) -> Lengths:
        """Number of segments, each with a scale, of waves with `samples` samples; 0 for a codec without segments."""
        return -(-samples // self.segment_stride) if self.segment_samples else 0 * samples

    @property
    def fingerprint(self) -> str:
        """sha256 of all fields that determine the codes: not the weights' path, nor library versions."""
        parts = {k: v for k, v in self.to_dict().items() if k not in ("weights", "versions")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "codebook_sizes": list(self.codebook_sizes),
            "codes_per_frame": list(self.codes_per_frame),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodecCard:
        if not isinstance(values, dict):
            raise UserError("codec card: not a table of fields")
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"codec card: unknown field {unknown[0]!r}; it was written by a newer codecssl")
        check_card_fields(values)
        sizes, per_frame = tuple(values["codebook_sizes"]), tuple(values["codes_per_frame"])
        return cls(**values | {"codebook_sizes": sizes, "codes_per_frame": per_frame})

    def difference(self, other: CodecCard) -> str:
        """Describe the first field in which the cards of two codecs differ, for error messages."""
        mine, theirs = self.to_dict(), other.to_dict()
        for key in mine:
            if key not in ("weights", "versions") and mine[key] != theirs[key]:
                return f"{key} {_short(mine[key])} against {_short(theirs[key])}"
        return "no difference"


CARD_BOUNDS = {
    "sample_rate": (1, 1 << 24),
    "hop_length": (1, 1 << 24),
    "latent_dim": (1, 1 << 16),
    "channels": (1, 64),
    "segment_samples": (0, 1 << 31),
    "segment_stride": (0, 1 << 31),
}
"""Minimum and maximum of each number of a card, since a card in a file may be untrusted."""


def check_card_fields(values: dict[str, Any]) -> None:
    """Raise UserError unless the fields of a card have the right types and bounded values."""

    def whole(value: Any, least: int, most: int) -> bool:
        return type(value) is int and least <= value <= most

    for key in ("name", "weights", "weights_sha256"):
        if not isinstance(values.get(key), str) or len(values[key]) > 4096:
            raise UserError(f"codec card: {key} is {_short(repr(values.get(key)))}; must be a text")
    for key, (least, most) in CARD_BOUNDS.items():
        needed = key in values or key in ("sample_rate", "hop_length", "latent_dim")
        if needed and not whole(values.get(key), least, most):
            raise UserError(f"codec card: {key} is not a whole number from {least} to {most}")
    sizes, rates = values.get("codebook_sizes"), values.get("codes_per_frame")
    for key, column, most in (("codebook_sizes", sizes, 1 << 16), ("codes_per_frame", rates, 1024)):
        if not isinstance(column, (list, tuple)) or not 1 <= len(column) <= 1024:
            raise UserError(f"codec card: {key} is not a list of 1 to 1024 numbers")
        if not all(whole(value, 1, most) for value in column):
            raise UserError(f"codec card: {key} has a value that is not from 1 to {most}")
    if len(sizes or ()) != len(rates or ()) or sum(rates or ()) > 4096:
        raise UserError("codec card: codebook_sizes and codes_per_frame do not fit together")
    segment, stride = values.get("segment_samples", 0), values.get("segment_stride", 0)
    if segment and not stride <= segment <= 64 * stride:
        raise UserError("codec card: segment_samples and segment_stride do not fit together")
    for key in ("policies", "versions"):
        table = values.get(key, {})
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise UserError(f"codec card: {key} is not a table of texts")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 70 else text[:67] + "..."


@dataclass(frozen=True)
class Encoded:
    """The codes of one wave."""

    codes: Tensor
    """int64 [R, T]."""
    scales: Tensor | None = None
    """float32 [segments], for codecs that normalize the volume of each segment (`card.segment_samples` > 0)."""


class StreamEncoder(Protocol):
    """Encode one utterance piece by piece in bounded memory. The codes do not depend on how the wave is cut.

    `backends.parts.chunked_stream.ChunkedStream` is a base class for implementations.
    """

    @property
    def scales(self) -> Tensor | None:
        """float32 [segments] after `finish`, or None for a codec without scales."""

    def push(self, wave: Tensor) -> Tensor:
        """Take float32 samples [n] ([C, n] if `card.channels` > 1) and return the codes [R, t] that they complete."""

    def finish(self) -> Tensor:
        """Return the remaining codes [R, t]. The last frame is padded with zeros."""


class Codec(Protocol):
    """A neural codec with its weights on a device.

    Codes are int64 [R, T], with one row per codebook, coarsest first. A codebook with n > 1 codes per frame
    (`card.codes_per_frame`) has n rows: row j holds its codes j, n + j, 2n + j, ... in time order (or column j of a
    time-frequency grid).
    """

    card: CodecCard

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        """Encode float32 waves at `card.sample_rate`, of any lengths >= 1, to codes [R, card.frames_of(n)] each.

        The codes of a wave depend on that wave alone. They are the same in a batch, alone or in a stream.
        """

    def stream(self) -> StreamEncoder:
        """Return a new encoder for one utterance."""

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        """Decode codes [R, T] to a float32 wave of T * hop samples; scales [segments] only if the codec has them."""

    def embeddings(self) -> list[Tensor]:
        """Return R tables [V_k, latent_dim] such that the sum of the looked-up rows equals `latents(codes)`."""

    def latents(self, codes: Tensor) -> Tensor:
        """Dequantize codes [R, T] to the codec's own latent [latent_dim, T]."""


@runtime_checkable
class FactorizedCodebooks(Protocol):
    """Optional protocol for codecs whose codebooks are narrower than the latent, with a projection behind each."""

    def entries(self) -> list[Tensor]:
        """Return R tables [V_k, width] as the codec stores them, before their projections."""
        ...


def stored_tables(codec: Codec) -> list[Tensor]:
    """Return the codebook entries as the codec stores them. Without projections these are `embeddings`."""
    return codec.entries() if isinstance(codec, FactorizedCodebooks) else codec.embeddings()


def encode_each(codec: Codec, waves: Sequence[Tensor]) -> list[Encoded]:
    """Implement `Codec.encode` by streaming each wave separately. The codes of a wave do not depend on its batch."""
    import torch

    found = []
    for wave in waves:
        stream = codec.stream()
        codes = torch.cat([stream.push(wave), stream.finish()], dim=1)
        found.append(Encoded(codes, stream.scales))
    return found


@runtime_checkable
class Reference(Protocol):
    """Optional protocol for codecs that can run their reference package, to which `check-codec` compares them."""

    def encode_reference(self, wave: Tensor) -> Tensor:
        """Encode one whole wave with the reference implementation, to codes [R, T]."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Description of a registered codec. The module is imported when the codec is loaded."""

    module: str
    """Module with `load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> Codec`."""
    summary: str
    """One line for `codecssl-tokenize codecs`."""
    weights: str
    """Instructions to get the weights, also part of the error for missing weights."""
    model_type: str = ""
    """`model_type` in the config.json of a weights folder from which `registry.identify` recognizes the codec."""
    sample_rates: tuple[int, ...] = ()
    """Sampling rates in config.json that belong to this codec; empty: any."""
    file: str = ""
    """Glob pattern for the name of a weights file."""
    contains: str = ""
    """Glob pattern for a file at any depth of a weights folder."""


def keep_codebooks(name: str, wanted: int | None, default: int, available: int) -> int:
    """Return the number of codebooks to keep. Raises UserError outside 1..available."""
    count = default if wanted is None else wanted
    if not 1 <= count <= available:
        raise UserError(f"num_codebooks {count}: {name} has 1 to {available}; give --num-codebooks a number of these")
    return count
