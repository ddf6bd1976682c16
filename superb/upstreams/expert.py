"""Upstreams by name, and the frozen upstream of a codec and an encoder.

The codec encodes a wave at 16 kHz (once per distinct wave), and the encoder turns the codes into hidden states. The
interface is s3prl's: `forward(list of 1-D float waves) -> {"hidden_states": [[B, T, D], ...]}` and
`get_downsample_rates`.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from codecssl.pretrain.export.shipped import model_folder
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE, at_codec_rate, encode
from codecssl.superb.tokens.codes import CodeCache
from codecssl.superb.tokens.token_cache import TokenCache
from codecssl.superb.upstreams import s3prl_upstreams, spectral, transformers_upstreams
from codecssl.superb.upstreams.frozen import FrozenUpstream
from codecssl.tokenize.codec import Codec, CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec, mel_plane
from codecssl.tokenize.registry import load_codec, load_codec_for

if TYPE_CHECKING:
    from codecssl.pretrain.config import ModelConfig

DEFAULT_CODEC = "tiny_16khz"  # codec of bare `codes` and `random` if no model is named with them
DEFAULT_CONFIG = "codec2vec_tiny_codes"  # architecture of that `random`
NAMES = (
    "an exported model's folder, a shipped model's name (laptop_16khz), a codec's of task-codec, fbank, logmel, mfcc, "
    "codes, random, codes:MODEL, codes:CODEC, random:MODEL, NAME@s3prl, or hf:PATH|NAME for a HuBERT, wav2vec2 or WavLM"
    " of transformers"
)


class StateEncoder(Protocol):
    """Protocol from codes to hidden states: a pretrained model, or the codec's own tables."""

    def extract(self, codes: Tensor, frames: Sequence[int], mel: Tensor | None = None) -> list[Tensor]:
        """int64 codes [B, K, T], frames per item, uint8 mel [B, bands, T] -> hidden states, each [B, T, D]."""
        ...


class CodeTables(nn.Module):
    """The baseline `codes`: the codec's dequantised latent, the sum of its K table rows; one hidden state."""

    def __init__(self, tables: Sequence[Tensor]) -> None:
        super().__init__()
        for k, table in enumerate(tables):
            self.register_buffer(f"table_{k}", table.detach().clone())

    def extract(self, codes: Tensor, frames: Sequence[int], mel: Tensor | None = None) -> list[Tensor]:
        """int64 codes [B, K, T] -> one hidden state [B, T, latent_dim]."""
        tables = list(self.buffers())
        return [torch.stack([table[codes[:, k]] for k, table in enumerate(tables)]).sum(dim=0)]


class CodecExpert(FrozenUpstream):
    """An s3prl upstream of a codec and an encoder.

    A model with L layers has L + 1 hidden states. State 0 is the input of the first layer: the embedded codes,
    projected, with positions added. A post-norm model normalises it after that. State i is the output of layer i with
    its residuals. In a post-norm model it is taken after the layer's last norm, in a pre-norm model before any norm.
    State L of a pre-norm model is taken after the encoder's final norm. In a ResiDual model (EnCodecMAE), states 1 to
    L - 1 are the normalised stream, and state L is the sum of both streams. A task codec with its bottleneck at layer L
    gives the states L, L + 1, ... after the bottleneck, with `pool` frames for each frame of codes.

    The codec and the encoder are not submodules. Therefore no parameter reaches an optimiser or a checkpoint, and
    `train()` cannot switch dropout on. `to(device)` still moves them.

    The number of frames is s3prl's: a wave of n samples has ceil(n / rate) frames. If the codec's frame is not a whole
    number of samples at 16 kHz (24 kHz with a hop of 320: 213.33), `rate` is the integer part, and frame j is the
    codec's frame at sample j * rate. One frame in 640 then appears twice, and frames do not drift in long waves.
    """

    def __init__(self, card: CodecCard, codes: Callable[[Sequence[Tensor]], list[Tensor]], encoder: nn.Module) -> None:
        super().__init__(encoder)
        self.card = card
        self.codes = codes
        self._pool = int(getattr(encoder, "pool", 1))  # frames of states per frame of codes
        self._frame = Fraction(SAMPLE_RATE * card.hop_length, card.sample_rate * self._pool)  # samples at 16 kHz
        self._rate = frame_shift(card) // self._pool

    @property
    def encoder(self) -> Any:
        return self.frozen

    def get_downsample_rates(self, key: str) -> int:
        """Samples at 16 kHz per frame of hidden state."""
        return self._rate

    @torch.no_grad()
    def forward(self, wavs: Sequence[Tensor], codes: Sequence[Tensor] | None = None) -> dict[str, list[Tensor]]:
        """1-D float waves at 16 kHz -> {"hidden_states": [[B, T, D], ...]}, zeros beyond each wave's own frames.

        `codes`: codes of the waves, if the caller already has them from `self.codes`.
        """
        device = wavs[0].device
        codes = self.codes(wavs) if codes is None else codes
        batch = nn.utils.rnn.pad_sequence([c.T for c in codes], batch_first=True).transpose(1, 2)  # [B, K, T]
        inputs = [batch.to(device), [c.shape[1] for c in codes]]
        if (spec := getattr(self.encoder, "mel_spec", None)) is not None:
            inputs.append(self._mel(spec, wavs).to(device))
        states = self.encoder.extract(*inputs)
        index = [self._index(len(wav), c.shape[1] * self._pool).to(device) for wav, c in zip(wavs, codes, strict=True)]
        pad = nn.utils.rnn.pad_sequence
        return {"hidden_states": [pad([s[i, at] for i, at in enumerate(index)], batch_first=True) for s in states]}

    def _mel(self, spec: MelSpec, wavs: Sequence[Tensor]) -> Tensor:
        """Log-mel planes uint8 [B, bands, T] of the waves, as `codecssl-tokenize run --with-mel` stores them."""
        planes = [torch.from_numpy(mel_plane(spec, at_codec_rate(wav, self.card).cpu().numpy())) for wav in wavs]
        return nn.utils.rnn.pad_sequence(planes, batch_first=True).transpose(1, 2)

    def _index(self, samples: int, frames: int) -> Tensor:
        """Index of the codec frame at the first sample of each of s3prl's ceil(samples / rate) frames."""
        starts = torch.arange(-(-samples // self._rate)) * self._rate
        if not self.card.segment_samples:
            return (starts * self._frame.denominator // self._frame.numerator).clamp(max=frames - 1)
        segments, within = self._segment(starts)
        per_segment = -(-self.card.segment_samples // self.card.hop_length)
        return (segments * per_segment + within).clamp(max=frames - 1)

    def _segment(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Last segment that begins at or before each sample at 16 kHz, and the frame within it."""
        at = starts * self.card.sample_rate // SAMPLE_RATE
        stride = self.card.segment_stride
        return at // stride, at % stride // self.card.hop_length


def frames_only(card: CodecCard) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Replacement of the codec for models that read only the log-mel plane: zeros [R, T] per wave at 16 kHz."""

    def zeros(wavs: Sequence[Tensor]) -> list[Tensor]:
        samples = [at_codec_rate(wav, card).shape[-1] for wav in wavs]
        return [torch.zeros(card.num_rows, card.frames_of(n), dtype=torch.int64) for n in samples]

    return zeros


def frame_shift(card: CodecCard) -> int:
    """Whole samples at 16 kHz per frame: the downsample rate reported to s3prl."""
    return SAMPLE_RATE * card.hop_length // card.sample_rate


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A parsed upstream name.

    `argument`: a model's folder, a codec's name, an s3prl name, or a transformers checkpoint.
    """

    name: str
    kind: Literal["model", "fbank", "logmel", "mfcc", "codes", "random", "s3prl", "hf"]
    argument: str | None = None

    @property
    def reads_codes(self) -> bool:
        return self.kind in ("model", "codes", "random")

    @property
    def runs_codec(self) -> bool:
        """False for models whose only input is the log-mel plane of a wave."""
        model = _description(self.argument or "").get("model") if self.kind in ("model", "random") else None
        return self.reads_codes and not (isinstance(model, dict) and model.get("input") == "mel")

    def identity(self) -> dict[str, str | None]:
        """Identity of the upstream's features: the name, and for a path (also NAME@PATH) its files' sha256."""
        digest, files = None, _files(self.argument or "")
        if files:
            digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)).hexdigest()
        return {"name": self.name, "kind": self.kind, "argument": self.argument, "sha256": digest}


def parse(name: str) -> Upstream:
    """Parse a name as typed by the user. Raises UserError for an unknown name."""
    head, _, tail = name.partition(":")
    if name.endswith("@s3prl"):
        return Upstream(name=name, kind="s3prl", argument=name.removesuffix("@s3prl"))
    if name in ("fbank", "logmel", "mfcc"):
        return Upstream(name=name, kind=name)  # type: ignore[arg-type]
    if head == "hf" and tail:
        return Upstream(name=name, kind="hf", argument=tail)
    if head == "codes":
        return Upstream(name=name, kind="codes", argument=tail or None)
    if head == "random" and (not tail or _is_model(tail)):
        return Upstream(name=name, kind="random", argument=tail or None)
    if transformers_upstreams.is_checkpoint(name):
        raise UserError(f"upstream {name}: a checkpoint of transformers; give hf:{name}")
    if _is_model(name) or _is_compressed(name):
        return Upstream(name=name, kind="model", argument=name)
    raise UserError(f"upstream {name}: not known; give {NAMES} (codecssl-pretrain export makes such a folder)")


def parse_all(names: Sequence[str]) -> list[Upstream]:
    """Parse the names of one comparison.

    Bare `codes` and `random` use the codec and architecture of the first named model.
    """
    upstreams = [parse(name) for name in names]
    model = next((u.argument for u in upstreams if u.kind == "model" and _is_model(u.argument or "")), None)
    bare = [u.kind in ("codes", "random") and u.argument is None for u in upstreams]
    return [
        Upstream(name=u.name, kind=u.kind, argument=model) if is_bare else u
        for u, is_bare in zip(upstreams, bare, strict=True)
    ]


def _is_model(path: str) -> bool:
    """True if a folder is an exported model. Codecs and other models also have a config.json."""
    return _description(path).get("format") == "codecssl-model"


def _is_compressed(path: str) -> bool:
    """True if a folder is a codec written by `codecssl-superb task-codec`."""
    return _description(path).get("model_type") == "codecssl-machine"


def _description(path: str) -> dict[str, Any]:
    try:
        found = json.loads((model_folder(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _files(name: str) -> list[Path]:
    """Weight and settings files that a name points to. Empty if it is not a path."""
    path = model_folder(name.partition("@")[2] or name)
    if not name or not path.exists():
        return []
    kinds = (".json", ".safetensors", ".bin", ".th", ".tflite")
    return [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in kinds)


class UpstreamBuilder:
    """Build upstreams in one process.

    Upstreams with the same codec share its codes, and the codec runs once per wave. `code_folder`: folder of a token
    cache. The codec does not run on waves in this cache.
    """

    def __init__(self, *, device: str = "cpu", code_folder: Path | None = None, seed: int = 0) -> None:
        self.device = device
        self.code_folder = code_folder
        self.seed = seed
        self._codecs: dict[str, tuple[Codec, CodeCache]] = {}

    def build(self, upstream: Upstream) -> nn.Module:
        """Build the upstream, frozen and on the device."""
        if upstream.kind == "fbank":
            return s3prl_upstreams.fbank("fbank").to(self.device)
        if upstream.kind in ("logmel", "mfcc"):
            return (spectral.LogMel() if upstream.kind == "logmel" else spectral.Mfcc()).to(self.device)
        if upstream.kind == "s3prl":
            return s3prl_upstreams.from_s3prl(upstream.argument or "").to(self.device)
        if upstream.kind == "hf":
            return transformers_upstreams.load(upstream.argument or "").to(self.device)
        card, encoder = self.encoder(upstream)
        if not upstream.runs_codec:
            return CodecExpert(card, frames_only(card), encoder).to(self.device)
        _, codes = self._codec(card.fingerprint, lambda: load_codec_for(card, device=self.device))
        return CodecExpert(card, codes, encoder).to(self.device)

    def build_unnormalised(self, upstream: Upstream) -> nn.Module:
        """Build the upstream, with fbank unnormalised.

        s3prl's normalisation makes the mean over time of every fbank utterance zero.
        """
        return (
            s3prl_upstreams.fbank("fbank_no_cmvn").to(self.device) if upstream.kind == "fbank" else self.build(upstream)
        )

    def encoder(self, upstream: Upstream) -> tuple[CodecCard, nn.Module]:
        """Build the encoder from codes to hidden states, for data that is already encoded."""
        from codecssl.pretrain.export.export import load_pretrained
        from codecssl.pretrain.model.model import untrained

        assert upstream.reads_codes
        if upstream.argument and _is_model(upstream.argument):
            model = load_pretrained(upstream.argument)
            if upstream.kind == "model":
                return model.card, model
            if not upstream.runs_codec:
                return model.card, untrained(model.config, model.card, None, self.seed, model.mel_spec)
            codec, _ = self._codec(model.card.fingerprint, lambda: load_codec_for(model.card, device=self.device))
            return model.card, self._baseline(upstream.kind, codec, model.config, model.mel_spec)
        from codecssl.configs.load import load_config
        from codecssl.pretrain.config import RunConfig

        codec = load_codec(upstream.argument or DEFAULT_CODEC, device=self.device)
        codec, _ = self._codec(codec.card.fingerprint, lambda: codec)
        if upstream.kind == "model":
            return codec.card, codec.compressed  # type: ignore[attr-defined]  # task codec
        return codec.card, self._baseline(
            upstream.kind, codec, load_config(RunConfig, "pretrain", DEFAULT_CONFIG).model
        )

    def codec(self, upstream: Upstream) -> tuple[Codec, Callable[[], Codec]]:
        """Codec of an upstream that reads codes, and a function that loads it in another process."""
        from codecssl.pretrain.export.export import load_pretrained

        if upstream.argument and _is_model(upstream.argument):
            load = functools.partial(load_codec_for, load_pretrained(upstream.argument).card, device=self.device)
        else:
            load = functools.partial(load_codec, upstream.argument or DEFAULT_CODEC, device=self.device)
        return load(), load

    def _baseline(self, kind: str, codec: Codec, config: "ModelConfig", mel: MelSpec | None = None) -> nn.Module:
        from codecssl.pretrain.build import first_tables
        from codecssl.pretrain.model.model import untrained

        if kind == "codes":
            return CodeTables([table.cpu() for table in codec.embeddings()])
        return untrained(config, codec.card, first_tables(config, codec), self.seed, mel)

    def _codec(self, fingerprint: str, load: Callable[[], Codec]) -> tuple[Codec, CodeCache]:
        if fingerprint not in self._codecs:
            codec = load()
            stored = TokenCache(self.code_folder, codec.card) if self.code_folder else None
            self._codecs[fingerprint] = codec, CodeCache(lambda wavs: encode(codec, wavs, self.device), stored)
        codec, codes = self._codecs[fingerprint]
        if codes.cache is not None:
            codes.cache.refresh()
        return codec, codes
