"""EnCodec and its kin: causal SEANet encoders with an LSTM and a residual vector quantizer.

Exact in bounded memory (tests/tokenize/test_encodec.py): a wave is cut into chunks of `CHUNK_SECONDS`. The convolutions
before the LSTM see no further back than 2,398 samples, so each chunk is preceded by 8 frames of context, whose outputs
are dropped; the LSTM's state is carried; the last convolution keeps its 6 previous inputs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.codec import CodecCard, file_sha256, keep_codebooks
from codecssl.tokenize.errors import UserError
from codecssl.tokenize.weights import load_pretrained, state_sha256

CHUNK_SECONDS = 10
CONTEXT_FRAMES = 8


@dataclass(frozen=True, kw_only=True)
class Seanet:
    """The parts that matter of an EnCodec network, whichever library built it."""

    encoder: Sequence[nn.Module]
    """The encoder's layers in order."""
    codebooks: Tensor
    """[K, V, D] float32."""
    decoder: nn.Module
    sample_rate: int
    hop_length: int


class EncodecCodec:
    """A causal EnCodec network as a `Codec`."""

    def __init__(self, net: Seanet, card: CodecCard, device: str = "cpu") -> None:
        self.net, self.card, self.device = net, card, torch.device(device)
        layers = list(net.encoder)
        split = next(i for i, layer in enumerate(layers) if hasattr(layer, "lstm"))
        self.front = nn.Sequential(*layers[:split]).to(device).eval()
        self.lstm: nn.LSTM = layers[split].lstm.to(device).eval()  # type: ignore[union-attr, assignment]
        self.activation, self.last = layers[split + 1].to(device), layers[split + 2].to(device).eval()
        self.decoder = net.decoder.to(device).eval()
        self.codebooks = net.codebooks[: card.num_codebooks].to(device)
        self.squared_norms = self.codebooks.pow(2).sum(2)

    def stream(self) -> EncodecStream:
        return EncodecStream(self)

    @torch.inference_mode()
    def encode(self, waves: Sequence[Tensor]) -> list[Tensor]:
        codes = []
        for wave in waves:
            stream = self.stream()
            codes.append(torch.cat([stream.push(wave), stream.finish()], dim=1))
        return codes

    @torch.inference_mode()
    def quantize(self, latents: Tensor) -> Tensor:
        """Latents [D, T] to codes [K, T]: nearest entry of each codebook to what the ones before it left over."""
        residual, codes = latents.t(), []
        for table, squared in zip(self.codebooks, self.squared_norms):
            # the same expression as the encodec package's: ties and rounding fall alike
            distance = residual.pow(2).sum(1, keepdim=True) - 2 * residual @ table.t() + squared
            index = distance.argmin(dim=1)
            residual = residual - F.embedding(index, table)
            codes.append(index)
        return torch.stack(codes)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """The decoder runs over the whole utterance: memory grows with its length."""
        wave: Tensor = self.decoder(self.latents(codes)[None])
        return wave[0, 0, : codes.shape[1] * self.net.hop_length]

    def embeddings(self) -> list[Tensor]:
        return [table.cpu().clone() for table in self.codebooks]

    @torch.inference_mode()
    def latents(self, codes: Tensor) -> Tensor:
        rows = [F.embedding(c, table) for c, table in zip(codes.to(self.device), self.codebooks)]
        return torch.stack(rows).sum(0).t()


class EncodecStream:
    """Streaming encoder of one wave; chunk bounds do not depend on how the wave is pushed."""

    def __init__(self, codec: EncodecCodec) -> None:
        self.codec, hop = codec, codec.net.hop_length
        self.chunk = CHUNK_SECONDS * codec.net.sample_rate // hop * hop
        self.context = CONTEXT_FRAMES * hop
        self.pending: list[Tensor] = []
        self.pending_samples = 0
        self.tail: Tensor | None = None
        self.state: tuple[Tensor, Tensor] | None = None
        self.history: Tensor | None = None

    @torch.inference_mode()
    def push(self, wave: Tensor) -> Tensor:
        self.pending.append(wave.to(self.codec.device))
        self.pending_samples += len(wave)
        codes = [self._empty()]
        while self.pending_samples > self.chunk:  # not >=: the last chunk is left for finish()
            everything = torch.cat(self.pending)
            codes.append(self._encode(everything[: self.chunk]))
            self.pending = [everything[self.chunk :]]
            self.pending_samples = len(self.pending[0])
        return torch.cat(codes, dim=1)

    @torch.inference_mode()
    def finish(self) -> Tensor:
        if self.pending_samples == 0:
            return self._empty()
        rest = torch.cat(self.pending)
        self.pending, self.pending_samples = [], 0
        return self._encode(F.pad(rest, (0, -len(rest) % self.codec.net.hop_length)))

    def _encode(self, wave: Tensor) -> Tensor:
        codec, first = self.codec, self.tail is None
        audio = wave if first else torch.cat([self.tail, wave])  # type: ignore[list-item]
        features = codec.front(audio[None, None])
        if not first:
            features = features[..., -(len(wave) // codec.net.hop_length) :]
        self.tail = audio[-self.context :]
        output = self._recur(features)
        return codec.quantize(output[0])

    def _recur(self, features: Tensor) -> Tensor:
        """LSTM and last convolution: [1, C, t] to latents [1, D, t]."""
        inputs = features.permute(2, 0, 1)
        outputs, self.state = self.codec.lstm(inputs, self.state)
        hidden = (outputs + inputs).permute(1, 2, 0)
        kept: int = self.codec.last.conv_context  # type: ignore[assignment]
        if self.history is None:  # start of the wave: the layer pads by reflection, as it was trained
            latents = self.codec.last(self.codec.activation(hidden))
        else:
            hidden = torch.cat([self.history, hidden], dim=2)
            latents = self.codec.last.conv(self.codec.activation(hidden))  # type: ignore[operator]
        self.history = hidden[..., -kept:]
        return latents

    def _empty(self) -> Tensor:
        return torch.zeros(self.codec.card.num_codebooks, 0, dtype=torch.int64, device=self.codec.device)


# ---------------------------------------------------------------- loading


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> EncodecCodec:
    """Load `tiny_16khz` or `encodec_24khz` (`Codec` loader; see `load_codec`)."""
    if name == "tiny_16khz":
        from codecssl.tokenize import tiny

        path = Path(weights) if weights else tiny.WEIGHTS
        if not path.is_file():
            raise UserError(f"codec tiny_16khz: no weights at {path}; reinstall codecssl or give the file")
        net, digest, default = from_encodec(tiny.load_network(path)), file_sha256(path), tiny.NUM_CODEBOOKS
    else:
        net, digest = _load_24khz(weights)
        default = 8
    kept = keep_codebooks(name, num_codebooks, default, len(net.codebooks))
    return EncodecCodec(net, make_card(name, weights or name, digest, net, kept, device), device)


def make_card(name: str, weights: str, digest: str, net: Seanet, num_codebooks: int, device: str) -> CodecCard:
    """The card of a causal EnCodec network."""
    kind = torch.device(device).type
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=digest,
        sample_rate=net.sample_rate,
        hop_length=net.hop_length,
        codebook_sizes=(net.codebooks.shape[1],) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=net.codebooks.shape[2],
        policies={
            "channels": "mean",
            "resample": "soxr HQ, whole file",
            "padding": "zeros to a whole frame",
            "chunk": f"{CHUNK_SECONDS} s, {CONTEXT_FRAMES} frames of context, carried LSTM state",
            "precision": "float32",
            "device": kind,
        },
        versions={"torch": torch.__version__, "encodec": version("encodec"), "soxr": version("soxr")},
    )


def from_encodec(model: Any) -> Seanet:
    """Parts of an `encodec.EncodecModel`."""
    layers = list(model.encoder.model)
    _remember_context(layers[-1])
    tables = torch.stack([layer.codebook for layer in model.quantizer.vq.layers])
    return Seanet(
        encoder=layers,
        codebooks=tables.detach(),
        decoder=model.decoder,
        sample_rate=model.sample_rate,
        hop_length=int(model.encoder.hop_length),
    )


def from_transformers(model: Any) -> Seanet:
    """Parts of a `transformers.EncodecModel`."""
    layers = list(model.encoder.layers)
    _remember_context(layers[-1])
    tables = torch.stack([layer.codebook.embed for layer in model.quantizer.layers])
    return Seanet(
        encoder=layers,
        codebooks=tables.detach(),
        decoder=model.decoder,
        sample_rate=model.config.sampling_rate,
        hop_length=int(model.config.hop_length),
    )


def _remember_context(layer: nn.Module) -> None:
    convolution: Any = layer.conv
    convolution = getattr(convolution, "conv", convolution)  # the encodec package wraps it once more
    layer.conv_context = convolution.kernel_size[0] - 1  # type: ignore[assignment]


def _load_24khz(weights: str | None) -> tuple[Seanet, str]:
    """EnCodec 24 kHz from a folder in the hub's format, from the package's .th file, or from their caches."""
    if weights and Path(weights).is_file():
        return _load_th(Path(weights))
    cached = (
        Path(os.environ.get("TORCH_HOME", Path.home() / ".cache/torch")) / "hub/checkpoints/encodec_24khz-d7cc33bc.th"
    )
    if weights is None and cached.exists():
        return _load_th(cached)
    import transformers

    source = weights or "facebook/encodec_24khz"
    model = load_pretrained("encodec_24khz", transformers.EncodecModel, source)
    if model.config.sampling_rate != 24_000 or not model.config.use_causal_conv:
        raise UserError(f"{source}: {model.config.sampling_rate} Hz EnCodec, encodec_24khz is causal at 24000 Hz")
    return from_transformers(model), state_sha256(model)


def _load_th(path: Path) -> tuple[Seanet, str]:
    from encodec.model import EncodecModel

    model = EncodecModel.encodec_model_24khz(pretrained=False)
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{path}: not the weights of encodec_24khz ({str(error).splitlines()[0][:120]})") from error
    return from_encodec(model), file_sha256(path)
