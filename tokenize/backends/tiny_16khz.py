"""`tiny_16khz`: the embedded codec, a small version of EnCodec's architecture (16 kHz, 50 Hz, 8 codebooks x 1024).

The parts come from the `encodec` package: a causal SEANet encoder and decoder and its residual vector quantizer
(Defossez et al. 2022, arXiv 2210.13438, section 3.2). There are four differences from EnCodec's 24 kHz model. The width
is halved. The encoder has one LSTM layer instead of two, the decoder none. The latent has 64 channels. The strides are
reversed (8, 5, 4, 2), which moves most of the work to a low rate and leaves a third of the operations.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from encodec.model import EncodecModel
from encodec.modules.seanet import SEANetDecoder, SEANetEncoder
from encodec.quantization.vq import ResidualVectorQuantizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from codecssl.tokenize.backends.encodec import EncodecCodec, from_encodec, make_card
from codecssl.tokenize.codec import keep_codebooks
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256
from codecssl.tokenize.common.kmeans import lloyd

SAMPLE_RATE = 16_000
NUM_CODEBOOKS = 8
CODEBOOK_SIZE = 1024
LATENT_DIM = 64
NUM_FILTERS = 16
RATIOS = [2, 4, 5, 8]
"""Strides of the decoder, in order. The encoder's strides are reversed."""
WEIGHTS = Path(__file__).with_name("tiny_16khz.safetensors")


def build_network(*, weight_norm: bool, dead_code_threshold: float = 0.0) -> EncodecModel:
    """Build the network with fresh weights.

    Training uses `weight_norm`. For inference it is folded into plain weights (`fold`), which is faster and smaller.
    `dead_code_threshold` is the moving count below which training replaces a codebook entry.
    """
    width: dict[str, Any] = dict(
        ratios=RATIOS,
        dimension=LATENT_DIM,
        n_filters=NUM_FILTERS,
        causal=True,
        norm="weight_norm" if weight_norm else "none",
    )
    with warnings.catch_warnings():  # torch deprecates the weight_norm that the encodec package uses
        warnings.simplefilter("ignore", FutureWarning)
        encoder, decoder = SEANetEncoder(lstm=1, **width), SEANetDecoder(lstm=0, **width)
    quantizer = ResidualVectorQuantizer(
        dimension=LATENT_DIM,
        n_q=NUM_CODEBOOKS,
        bins=CODEBOOK_SIZE,
        threshold_ema_dead_code=dead_code_threshold,  # type: ignore[arg-type]
    )
    kbps_per_codebook = float(10 * SAMPLE_RATE / encoder.hop_length / 1000)
    bandwidths = [kbps_per_codebook * k for k in range(1, NUM_CODEBOOKS + 1)]
    model = EncodecModel(encoder, decoder, quantizer, bandwidths, SAMPLE_RATE, channels=1, name="tiny_16khz")
    model.set_target_bandwidth(bandwidths[-1])
    return model


def fold(trained: EncodecModel) -> dict[str, Tensor]:
    """Return inference weights of a trained network: weight norm folded, float16, without the training's counters."""
    source, state = trained.state_dict(), {}
    for key, value in source.items():
        if key.endswith(".weight_g"):
            stem = key.removesuffix("_g")
            direction = source[stem + "_v"]
            norm = direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.dim() - 1))
            state[stem] = value * direction / norm
        elif not key.endswith((".weight_v", ".cluster_size", ".embed_avg", ".inited")):
            state[key] = value
    return {key: value.detach().to(torch.float16).contiguous() for key, value in state.items()}


def save_weights(trained: EncodecModel, path: Path, metadata: dict[str, str]) -> None:
    """Write `fold(trained)` as safetensors (about 6 MB)."""
    save_file(fold(trained), path, metadata=metadata)


def load_network(path: Path = WEIGHTS) -> EncodecModel:
    """Load inference weights (stored float16, computed in float32)."""
    model = build_network(weight_norm=False)
    try:
        state = {key: value.float() for key, value in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path}: not the weights of tiny_16khz ({error})") from error
    missing, unexpected = model.load_state_dict(state, strict=False)
    counters = (".cluster_size", ".embed_avg", ".inited")
    if unexpected or any(not key.endswith(counters) for key in missing):
        raise UserError(f"{path}: not the weights of tiny_16khz (unexpected {unexpected[:3]}, missing {missing[:3]})")
    mark_initialised(model)
    return model.eval()


def mark_initialised(model: nn.Module) -> None:
    """Mark every codebook as initialized, so no forward pass fits its entries again."""
    for key, buffer in model.named_buffers():
        if key.endswith(".inited"):
            buffer.fill_(1)


@torch.no_grad()
def fit_codebooks(model: EncodecModel, latents: Tensor, iterations: int = 10) -> None:
    """Fit each codebook in turn by k-means on the residual of the ones before it.

    latents: [N, latent_dim], N >= 1024 encoder outputs. Without it random codebooks are all zeros.
    """
    residual = latents
    for layer in model.quantizer.vq.layers:
        codebook = layer._codebook
        start = residual[torch.randperm(len(residual))[: codebook.codebook_size]].clone()
        entries, counts = lloyd(residual, start, iterations, lambda x, y: torch.cdist(x, y).argmin(1))
        codebook.embed.copy_(entries)
        codebook.cluster_size.copy_(counts.float())
        codebook.embed_avg.copy_(entries * counts[:, None])
        codebook.inited.fill_(1)
        residual = residual - entries[codebook.quantize(residual)]


def load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> EncodecCodec:
    """Load `tiny_16khz` (`Codec` loader; see `load_codec`)."""
    path = Path(weights) if weights else WEIGHTS
    if not path.is_file():
        raise UserError(f"codec {name}: no weights at {path}; reinstall codecssl or give the file")
    net, digest = from_encodec(load_network(path)), file_sha256(path)
    kept = keep_codebooks(name, num_codebooks, NUM_CODEBOOKS, len(net.codebooks))
    return EncodecCodec(net, make_card(name, weights or name, digest, net, kept, device), device)
