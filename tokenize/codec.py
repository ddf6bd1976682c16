"""What a codec is here: the `Codec` protocol, its card, and how one is found by name or path.

A new codec is one file beside this one with a loader, and one line in `BACKENDS`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from codecssl.tokenize.common.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Lengths = TypeVar("Lengths", int, "NDArray[np.int64]")


@dataclass(frozen=True, kw_only=True)
class CodecCard:
    """All that determines a codec's codes; it is written into every dataset and every exported model."""

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
    """Of the wave that the codec takes."""
    segment_samples: int = 0
    """Length of the segments that are encoded each for itself, with one scale each; 0: the wave is encoded as one."""
    segment_stride: int = 0
    """From the start of a segment to that of the next, samples."""
    policies: dict[str, str] = field(default_factory=dict)
    """How audio becomes the codec's input: channels, resampling, padding, chunks, precision, device."""
    versions: dict[str, str] = field(default_factory=dict)
    """Libraries that computed the codes."""

    @property
    def num_codebooks(self) -> int:
        return len(self.codebook_sizes)

    @property
    def frame_rate(self) -> Fraction:
        """Frames per second, exactly."""
        return Fraction(self.sample_rate, self.hop_length)

    @property
    def code_bits(self) -> tuple[int, ...]:
        """Bits that a stored code of each codebook takes: ceil(log2 size)."""
        return tuple(max(1, (size - 1).bit_length()) for size in self.codebook_sizes)

    @property
    def num_rows(self) -> int:
        """R, the rows of the codes [R, T] of an utterance: K, or more where codebooks run at different rates."""
        return sum(self.codes_per_frame)

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Entries of the codebook of each row, [R]."""
        return tuple(size for size, rate in zip(self.codebook_sizes, self.codes_per_frame) for _ in range(rate))

    @property
    def bits_per_second(self) -> float:
        """Nominal rate of the stored codes."""
        per_frame = sum(b * n for b, n in zip(self.code_bits, self.codes_per_frame))
        rate = per_frame * self.frame_rate
        if self.segment_samples:  # segments overlap a little
            rate = per_frame * Fraction(self.frames_of(self.segment_samples) * self.sample_rate, self.segment_stride)
        return float(rate)

    def frames_of(self, samples: Lengths) -> Lengths:
        """Frames T that waves of so many samples (an int or an integer array) give: the last one is filled up."""
        if not self.segment_samples:
            return -(-samples // self.hop_length)
        # first the whole segments, then the shorter ones that the wave's end cuts
        segment, stride = self.segment_samples, self.segment_stride
        whole = (samples - segment + stride) // stride * (samples >= segment)
        frames = whole * -(-segment // self.hop_length)
        for cut in range(-(-segment // stride)):
            rest = samples - (whole + cut) * stride
            frames = frames + (rest > 0) * -(-rest // self.hop_length)
        return frames

    def segments_of(self, samples: Lengths) -> Lengths:
        """Segments, and so scales, of waves (an int or an integer array of samples); 0 for a codec without them."""
        return -(-samples // self.segment_stride) if self.segment_samples else 0 * samples

    @property
    def fingerprint(self) -> str:
        """sha256 over what determines the codes (not where the weights lay, nor library versions)."""
        parts = {k: v for k, v in self.to_dict().items() if k not in ("weights", "versions")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "codebook_sizes": list(self.codebook_sizes),
            "codes_per_frame": list(self.codes_per_frame),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodecCard:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"codec card: unknown field {unknown[0]!r}; it was written by a newer codecssl")
        sizes, per_frame = tuple(values["codebook_sizes"]), tuple(values["codes_per_frame"])
        return cls(**values | {"codebook_sizes": sizes, "codes_per_frame": per_frame})

    def difference(self, other: CodecCard) -> str:
        """The first field that makes two cards' codes different, for an error message."""
        mine, theirs = self.to_dict(), other.to_dict()
        for key in mine:
            if key not in ("weights", "versions") and mine[key] != theirs[key]:
                return f"{key} {_short(mine[key])} against {_short(theirs[key])}"
        return "no difference"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 70 else text[:67] + "..."


class StreamEncoder(Protocol):
    """Encodes one utterance piece by piece in bounded memory; any cut gives the same codes."""

    def push(self, wave: Tensor) -> Tensor:
        """Float32 samples in ([n], or [C, n] where `card.channels` is above 1), codes [R, t] that are certain out."""

    def finish(self) -> Tensor:
        """The remaining codes [R, t]; the last frame is filled up with zeros."""


class Codec(Protocol):
    """A neural codec with its weights on a device.

    Codes are int64 [R, T]: a row per codebook, coarsest first. Where a codebook has n > 1 codes a frame
    (`card.codes_per_frame`) it has n rows: row j holds its codes j, n + j, 2n + j, ... in time order (or column j of a
    time-frequency grid).
    """

    card: CodecCard

    def encode(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """Float32 waves at `card.sample_rate`, any lengths >= 1, to codes [R, card.frames_of(n)] each.

        A wave's codes depend on that wave alone: batched equals single equals chunked.
        """

    def stream(self) -> StreamEncoder:
        """A fresh encoder for one utterance."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [R, T] to a float32 wave of T * hop samples."""

    def embeddings(self) -> list[Tensor]:
        """R latent-exact tables [V_k, latent_dim]: the sum of the looked-up rows is `latents(codes)`."""

    def latents(self, codes: Tensor) -> Tensor:
        """Codes [R, T] to the codec's own dequantised latent [latent_dim, T]."""


@runtime_checkable
class Narrow(Protocol):
    """What a codec offers beside whose codebooks are narrower than its latent, with a projection behind each."""

    def entries(self) -> list[Tensor]:
        """R tables [V_k, width] as the codec stores them, before their projections."""
        ...


def stored_tables(codec: Codec) -> list[Tensor]:
    """The codebooks' entries as the codec stores them; where nothing stands behind them, they are `embeddings`."""
    return codec.entries() if isinstance(codec, Narrow) else codec.embeddings()


def encode_each(codec: Codec, waves: Sequence[Tensor]) -> list[Tensor]:
    """`Codec.encode`, one wave after another: alone, a wave's bits cannot depend on its batch."""
    import torch

    streams = ((codec.stream(), wave) for wave in waves)
    return [torch.cat([stream.push(wave), stream.finish()], dim=1) for stream, wave in streams]


@runtime_checkable
class Reference(Protocol):
    """What a codec may offer beside: the plain way, as users of the reference package encode a file."""

    def encode_plainly(self, wave: Tensor) -> Tensor:
        """One whole wave through the reference implementation, to codes [R, T]. `bench` and `check-codec` use it."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One registered codec: where its loader is, and what `codecssl-tokenize codecs` says of it."""

    module: str
    summary: str
    weights: str
    """How to get the weights, as the error says it when they are missing."""


def _hub(repository: str, also: str = "") -> str:
    return f"`huggingface-cli download {repository}`, or give the folder{also} as --codec PATH"


BACKENDS = {
    "tiny_16khz": Backend(
        module="codecssl.tokenize.backends.encodec",
        summary="16 kHz, 50 Hz, 8 x 1024, 4 kbps; embedded, runs anywhere",
        weights="shipped with codecssl",
    ),
    "encodec_24khz": Backend(
        module="codecssl.tokenize.backends.encodec",
        summary="24 kHz, 75 Hz, up to 32 x 1024, 0.75 kbps a codebook (Defossez et al. 2022)",
        weights=_hub("facebook/encodec_24khz", " or the .th file"),
    ),
    "encodec_48khz": Backend(
        module="codecssl.tokenize.backends.encodec_48khz",
        summary="48 kHz stereo, 150 Hz in segments of 1 s, up to 16 x 1024, 1.5 kbps a codebook (Defossez et al. 2022)",
        weights=_hub("facebook/encodec_48khz", " or the .th file"),
    ),
    "dac_16khz": Backend(
        module="codecssl.tokenize.backends.dac",
        summary="16 kHz, 50 Hz, up to 12 x 1024, 0.5 kbps a codebook (Kumar et al. 2023)",
        weights=_hub("descript/dac_16khz"),
    ),
    "dac_24khz": Backend(
        module="codecssl.tokenize.backends.dac",
        summary="24 kHz, 75 Hz, up to 32 x 1024, 0.75 kbps a codebook (Kumar et al. 2023)",
        weights=_hub("descript/dac_24khz"),
    ),
    "dac_44khz": Backend(
        module="codecssl.tokenize.backends.dac",
        summary="44.1 kHz, 86.1 Hz, up to 9 x 1024, 0.86 kbps a codebook (Kumar et al. 2023)",
        weights=_hub("descript/dac_44khz"),
    ),
    "mimi": Backend(
        module="codecssl.tokenize.backends.mimi",
        summary="24 kHz, 12.5 Hz, up to 32 x 2048, 0.14 kbps a codebook, the first one semantic (Defossez et al. 2024)",
        weights=_hub("kyutai/mimi"),
    ),
    "xcodec": Backend(
        module="codecssl.tokenize.backends.xcodec",
        summary="16 kHz, 50 Hz, up to 8 x 1024, 0.5 kbps a codebook, HuBERT inside (Ye et al. 2024)",
        weights=_hub("hf-audio/xcodec-hubert-librispeech"),
    ),
    "snac_24khz": Backend(
        module="codecssl.tokenize.backends.snac",
        summary="24 kHz, 3 x 4096 at 11.7, 23.4 and 46.9 Hz, 0.98 kbps (Siuzdak et al. 2024; needs pip install snac)",
        weights=_hub("hubertsiuzdak/snac_24khz"),
    ),
    "semanticodec": Backend(
        module="codecssl.tokenize.backends.semanticodec",
        summary="16 kHz, a semantic and an acoustic code in each cell of a time-frequency grid (Liu et al. 2024)",
        weights="install the semanticodec package from its repository (haoheliu/SemantiCodec-inference); give a folder "
        "with one encoder.ckpt, its decoder.ckpt and one codebook_*.npy as --codec semanticodec@PATH",
    ),
    "lyra_v2": Backend(
        module="codecssl.tokenize.backends.lyra",
        summary="16 kHz, 50 Hz, up to 46 x 16, 0.2 kbps a codebook (SoundStream as in Lyra v2)",
        weights="give the folder with Lyra's model_coeffs/*.tflite as --codec PATH (needs pip install ai-edge-litert)",
    ),
    "machine": Backend(
        module="codecssl.superb.task_codec.codec",
        summary="below 200 bit/s for a task: a layer of a pretrained model, quantised (Kuznetsova et al. 2025)",
        weights="codecssl-superb compress, and give the folder that it wrote as --codec PATH",
    ),
}


MODEL_TYPES = {
    ("encodec", 24_000): "encodec_24khz",
    ("encodec", 48_000): "encodec_48khz",
    ("dac", 16_000): "dac_16khz",
    ("dac", 24_000): "dac_24khz",
    ("dac", 44_100): "dac_44khz",
    ("mimi", 24_000): "mimi",
    ("xcodec", 16_000): "xcodec",
    ("snac", 24_000): "snac_24khz",
    **{("codecssl-machine", rate): "machine" for rate in (16_000, 24_000, 44_100, 48_000)},
}
"""(model_type, sampling rate) of a config.json in the hub's format: the codec's name."""


def load_codec(name_or_path: str, *, num_codebooks: int | None = None, device: str = "cpu") -> Codec:
    """Load a codec by NAME, by the PATH or URL of its weights, or by NAME@PATH where a path alone is ambiguous.

    num_codebooks keeps the first (coarsest) codebooks; the default is the backend's own.
    Raises UserError for an unknown name, missing weights, a count out of range, or a device that is not there.
    """
    from codecssl.tokenize.backends.weights import download, is_url, local

    check_device(device)
    name, _, path = name_or_path.partition("@")
    if name in BACKENDS:
        path = str(download(path)) if is_url(path) else local(path) if path else ""
        return _loader(name)(name, path or None, num_codebooks, device)
    if is_url(name_or_path):
        name_or_path = str(download(name_or_path))
    if Path(name_or_path).exists():
        return _loader(found := identify(Path(name_or_path)))(found, local(name_or_path), num_codebooks, device)
    if "/" in name_or_path or name_or_path.startswith("."):
        raise UserError(f"codec {name_or_path!r}: no such file or folder; give a path that exists or a codec's name")
    near = difflib.get_close_matches(name, BACKENDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown codec {name_or_path!r}: give a path or one of {', '.join(sorted(BACKENDS))}{hint}")


def check_device(device: str) -> None:
    """Raises UserError for what is neither cpu nor a GPU of this machine."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UserError(f"device {device!r}: give cpu, cuda, or cuda:1 for the second GPU")
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= there:
        raise UserError(f"device {device!r}: torch finds {there} CUDA devices on this machine; give cpu")


def load_codec_for(card: CodecCard, *, device: str = "cpu", weights: str | None = None) -> Codec:
    """Load the codec that wrote `card`, from `weights` where the card's own source has moved.

    Raises UserError when the weights are not the ones of the card (by sha256).
    """
    source = weights or card.weights
    spec = source if source.partition("@")[0] in BACKENDS else f"{card.name}@{source}"
    codec = load_codec(spec, num_codebooks=card.num_codebooks, device=device)
    if codec.card.weights_sha256 != card.weights_sha256:
        raise UserError(
            f"codec {card.name}: {source} has weights {codec.card.weights_sha256[:12]}, the data was written with "
            f"{card.weights_sha256[:12]}; give the original weights"
        )
    return codec


def identify(path: Path) -> str:
    """The name of the codec whose weights lie at `path`. Raises UserError when none is recognised."""
    config = path / "config.json"
    if config.exists():
        try:
            values = dict(json.loads(config.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{config}: not a model's configuration ({error})") from error
        kind, rate = values.get("model_type"), values.get("sampling_rate") or values.get("sample_rate")
        kind = kind or ("snac" if "vq_strides" in values else None)
        if name := MODEL_TYPES.get((str(kind), rate or 0)):
            return name
        raise UserError(f"{path}: model_type {kind!r} at {rate} Hz is no codec of ours; have {', '.join(BACKENDS)}")
    if path.is_dir() and any(path.rglob("soundstream_encoder.tflite")):
        return "lyra_v2"
    if path.suffix == ".safetensors":
        return "tiny_16khz"
    for name in ("encodec_24khz", "encodec_48khz"):
        if path.name.startswith(name) and path.suffix == ".th":
            return name
    raise UserError(f"{path}: no codec recognised; say which with NAME@{path}, NAME one of {', '.join(BACKENDS)}")


def _loader(name: str) -> Any:
    return importlib.import_module(BACKENDS[name].module).load


def keep_codebooks(name: str, wanted: int | None, default: int, available: int) -> int:
    """Check the number of codebooks asked for. Raises UserError outside 1..available."""
    count = default if wanted is None else wanted
    if not 1 <= count <= available:
        raise UserError(f"num_codebooks {count}: {name} has 1 to {available}")
    return count


def file_sha256(*paths: Path) -> str:
    """sha256 over the bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
