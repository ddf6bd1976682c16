"""`lyra_v2`: the SoundStream codec of Lyra v2 (Apache-2.0), run by ai-edge-litert from a folder of its .tflite files.

16 kHz mono, hop 320, residual quantizer of up to 46 codebooks x 16 entries. The codec is causal and runs one frame at
a time; the interpreter holds the state. Each utterance starts from a fresh state, so batched, single and chunked
encoding are equal by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from codecssl.tokenize.backends.parts.card_fields import policies, versions
from codecssl.tokenize.backends.parts.chunked_stream import ChunkedStream
from codecssl.tokenize.backends.table import BACKENDS
from codecssl.tokenize.codec import CodecCard, Encoded, encode_each, keep_codebooks
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256

SAMPLE_RATE, HOP, MAX_CODEBOOKS, CODEBOOK_SIZE = 16_000, 320, 46, 16
DEFAULT_CODEBOOKS = 16
FILES = ("soundstream_encoder.tflite", "quantizer.tflite", "lyragan.tflite")


class LyraCodec:
    """Lyra v2's networks as a `Codec`."""

    def __init__(self, files: Sequence[Path], card: CodecCard) -> None:
        self.files, self.card = files, card
        self.encoder_bytes, self.quantizer_bytes, self.decoder_bytes = (path.read_bytes() for path in files)
        self.quantizer, self.device = _interpreter(self.quantizer_bytes), torch.device("cpu")

    def stream(self) -> LyraStream:
        return LyraStream(self)

    def encode(self, waves: Sequence[Tensor]) -> list[Encoded]:
        return encode_each(self, waves)

    def quantize(self, feature: NDArray[np.float32]) -> NDArray[np.int64]:
        """Quantize one latent [1, 1, 64] to codes [K]."""
        encode = self.quantizer.get_signature_runner("encode")
        count = np.array(self.card.num_codebooks, np.int32)
        indices = next(iter(encode(input_frames=feature, num_quantizers=count).values()))
        return np.asarray(indices).reshape(-1)[: self.card.num_codebooks].astype(np.int64)

    def decode(self, codes: Tensor, scales: Tensor | None = None) -> Tensor:
        run = _interpreter(self.decoder_bytes).get_signature_runner("serving_default")
        name = next(iter(run.get_input_details()))
        shape = run.get_input_details()[name]["shape"]
        features = self.latents(codes).t().numpy()
        frames = [np.asarray(next(iter(run(**{name: f.reshape(shape)}).values()))).reshape(-1) for f in features]
        return torch.from_numpy(np.concatenate(frames).astype(np.float32)) if frames else torch.zeros(0)

    def embeddings(self) -> list[Tensor]:
        """Tables read out of the quantizer: the decoded latent of each entry alone, minus the latent of no entry."""
        tables = []
        for k in range(self.card.num_codebooks):
            indices = np.full((CODEBOOK_SIZE, MAX_CODEBOOKS), -1, np.int32)
            indices[:, k] = np.arange(CODEBOOK_SIZE)
            tables.append(torch.from_numpy(np.stack([self._dequantise(row) for row in indices])))
        return tables

    def latents(self, codes: Tensor) -> Tensor:
        rows = np.full((codes.shape[1], MAX_CODEBOOKS), -1, np.int32)
        rows[:, : codes.shape[0]] = codes.cpu().numpy().T
        found = [self._dequantise(row) for row in rows]
        return torch.from_numpy(np.stack(found)).t() if found else torch.zeros(self.card.latent_dim, 0)

    def _dequantise(self, indices: NDArray[np.int32]) -> NDArray[np.float32]:
        decode = self.quantizer.get_signature_runner("decode")
        name = next(iter(decode.get_input_details()))
        shape = decode.get_input_details()[name]["shape"]
        latent = next(iter(decode(**{name: indices.reshape(shape)}).values()))
        return np.asarray(latent).reshape(-1).astype(np.float32)


class LyraStream(ChunkedStream):
    """Streaming encoder of one wave, frame by frame. The interpreter holds the network's state."""

    codec: LyraCodec

    def __init__(self, codec: LyraCodec) -> None:
        super().__init__(codec, chunk=HOP)
        self.run = _interpreter(codec.encoder_bytes).get_signature_runner("serving_default")

    def encode_chunk(self, audio: Tensor, last: bool) -> Tensor:
        frame = F.pad(audio, (0, HOP - len(audio)))[None].numpy()
        feature = next(iter(self.run(input_audio=frame).values()))
        return torch.from_numpy(self.codec.quantize(np.asarray(feature)))[:, None]


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> LyraCodec:
    """Load `lyra_v2` from a folder that holds its .tflite files at any depth (`Codec` loader; see `load_codec`)."""
    how = BACKENDS[name].weights
    if weights is None:
        raise UserError(f"codec {name}: weights are not shipped; {how}")
    if device != "cpu":
        raise UserError(f"codec {name}: runs on the cpu only, not on {device}")
    found = [next(iter(sorted(Path(weights).rglob(file))), None) for file in FILES]
    files = [path for path in found if path is not None]
    if len(files) < len(FILES):
        raise UserError(f"codec {name}: {weights} lacks one of {', '.join(FILES)}; {how}")
    kept = keep_codebooks(name, num_codebooks, DEFAULT_CODEBOOKS, MAX_CODEBOOKS)
    _interpreter(files[0].read_bytes())  # reports a missing package early
    return LyraCodec(files, _card(name, weights, files, kept))


def _card(name: str, weights: str, files: Sequence[Path], num_codebooks: int) -> CodecCard:
    return CodecCard(
        name=name,
        weights=weights,
        weights_sha256=file_sha256(*files),
        sample_rate=SAMPLE_RATE,
        hop_length=HOP,
        codebook_sizes=(CODEBOOK_SIZE,) * num_codebooks,
        codes_per_frame=(1,) * num_codebooks,
        latent_dim=64,
        policies=policies("frame by frame, state in the interpreter", "cpu", precision="as the .tflite files"),
        versions=versions("ai-edge-litert", "soxr"),
    )


def _interpreter(model: bytes) -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise UserError('codec lyra_v2: needs ai-edge-litert; pip install "codecssl[lyra]"') from error
    interpreter = Interpreter(model_content=model, num_threads=1)
    interpreter.allocate_tensors()
    return interpreter
