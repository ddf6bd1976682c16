"""Train the embedded codec `tiny_16khz` on real audio, on a CPU: `codecssl-tokenize train-codec`.

Generator losses only (a CPU has no time for a discriminator): log-mel L1 at several window lengths (as EnCodec, section
3.4, and DAC), the L1 of the waveform and of power-compressed complex spectra, which hold the phase, and EnCodec's
commitment loss. The codebooks follow the encoder by moving averages (EnCodec, section 3.2).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from encodec.model import EncodecModel
from torch import Tensor, nn
from torch.nn import functional as F

from codecssl.tokenize.backends import tiny_16khz
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import atomic_file
from codecssl.tokenize.sources.manifest import read_rows

FIT_BATCHES = 20
"""Number of batches, of 20 segments each, to which the codebooks are fitted."""

SAVE_EVERY = 500
"""Steps between checkpoints."""


@dataclass(frozen=True, kw_only=True)
class CodecTrainConfig:
    """Training settings of `tiny_16khz`."""

    steps: int = 3400
    warmup_steps: int = 900
    """Steps in which encoder and decoder are trained separately on the guide. Then k-means fits the codebooks."""
    batch_size: int = 8
    segment_seconds: float = 0.8
    lr: float = 1.5e-3
    seed: int = 0
    mel_weight: float = 1.0
    wave_weight: float = 0.5
    spectrum_weight: float = 0.1
    commit_weight: float = 1.0
    guide_weight: float = 1.0


# ---------------------------------------------------------------- data


def is_held_out(row: dict[str, Any]) -> bool:
    """True for one in ten speakers, and one in ten clips without a known speaker. They are not used for training."""
    key = row.get("speaker") or row["path"]
    return int(hashlib.sha256(str(key).encode()).hexdigest(), 16) % 10 == 0


class AudioPool:
    """All training audio as one int16 array on disk, 16 kHz mono: random segments cost no decoding."""

    def __init__(self, manifest: Path, cache: Path, read: Callable[[Path], np.ndarray]) -> None:
        """`read` gives a file as float32 mono at 16 kHz. Rows with task `robust` and held-out rows are left out."""
        rows = read_rows(manifest, "path", "task")
        self.rows = [row for row in rows if row["task"] != "robust" and not is_held_out(row)]
        if not self.rows:
            raise UserError(f"{manifest}: no audio to train on; give a manifest with rows outside the held-out tenth")
        index = cache.with_suffix(".json")
        if not index.exists():
            lengths = self._fill(manifest.parent, cache, read)
            index.write_text(json.dumps(lengths))
        self.samples = np.memmap(cache, dtype=np.int16, mode="r")
        self.ends = np.cumsum(json.loads(index.read_text()))

    def _fill(self, root: Path, cache: Path, read: Callable[[Path], np.ndarray]) -> list[int]:
        lengths = []
        with cache.open("wb") as file:
            for row in self.rows:
                wave = read(root / row["path"])
                file.write((np.clip(wave, -1, 1) * 32767).astype(np.int16).tobytes())
                lengths.append(len(wave))
        return lengths

    def batch(self, generator: np.random.Generator, size: int, length: int) -> Tensor:
        """[size, 1, length] random segments; gains of -12 to +6 dB teach the codec every level."""
        starts = generator.integers(0, len(self.samples) - length, size)
        waves = np.stack([self.samples[s : s + length] for s in starts]).astype(np.float32) / 32768
        gains = 10 ** (generator.uniform(-12, 6, (size, 1)) / 20)
        gains = np.minimum(gains, 0.99 / np.maximum(np.abs(waves).max(1, keepdims=True), 1e-3))
        return torch.from_numpy((waves * gains).astype(np.float32)).unsqueeze(1)


# ---------------------------------------------------------------- losses


class SpectralLoss(nn.Module):
    """Distances between waves [B, 1, N] at several window lengths."""

    LOG_FLOOR = 1e-2
    """Added to mel magnitudes: speech lies at 1 to 100, so silence costs little and its gradient stays bounded."""

    def __init__(self, windows: tuple[int, ...] = (128, 512, 1024, 2048)) -> None:
        super().__init__()
        self.windows = windows
        for n in windows:
            fbank = torchaudio.functional.melscale_fbanks(
                n // 2 + 1, 0.0, 8000.0, max(8, n * 80 // 1024), tiny_16khz.SAMPLE_RATE
            )
            self.register_buffer(f"fbank{n}", fbank)
            self.register_buffer(f"window{n}", torch.hann_window(n))

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return (L1 of log mels, L1 of compressed complex spectra), scalars, means over window lengths."""
        mel_loss = spectrum_loss = output.new_zeros(())
        for n in self.windows:
            fbank = self.get_buffer(f"fbank{n}")
            spectra = [self._spectrum(wave, n) for wave in (output, target)]
            ours, theirs = (torch.log(s.abs().transpose(1, 2) @ fbank + self.LOG_FLOOR) for s in spectra)
            mel_loss = mel_loss + F.l1_loss(ours, theirs)
            ours, theirs = (torch.view_as_real(_compress(s)) for s in spectra)
            spectrum_loss = spectrum_loss + F.l1_loss(ours, theirs)
        return mel_loss / len(self.windows), spectrum_loss / len(self.windows)

    def _spectrum(self, wave: Tensor, n: int) -> Tensor:
        window = self.get_buffer(f"window{n}")
        return torch.stft(wave.squeeze(1), n, n // 4, window=window, return_complex=True)


def _compress(spectrum: Tensor) -> Tensor:
    """Magnitude to the power 0.3, phase kept: quiet partials count, and the phase is learned with them."""
    power = spectrum.real.square() + spectrum.imag.square()
    return spectrum * (power + 1e-3).pow(-0.35)


class Guide(nn.Module):
    """Regression target of the latent: the normalised 64-band log-mel spectrum at the end of each frame.

    Without a guide, encoder and decoder need days of CPU to agree on a latent. With it the encoder is trained by
    regression and the decoder as a vocoder, separately and at the same time. Quantization then starts from an
    informative latent, as in codecs that are distilled from a teacher (SpeechTokenizer, Mimi).
    """

    WINDOW, HOP = 1024, 320

    def __init__(self, waves: Tensor) -> None:
        """waves: [B, 1, N] of training audio, for the mean and the deviation of each band."""
        super().__init__()
        fbank = torchaudio.functional.melscale_fbanks(
            self.WINDOW // 2 + 1, 0.0, 8000.0, tiny_16khz.LATENT_DIM, tiny_16khz.SAMPLE_RATE
        )
        self.register_buffer("fbank", fbank)
        self.register_buffer("window", torch.hann_window(self.WINDOW))
        logs = self._log_mel(waves)
        self.register_buffer("mean", logs.mean((0, 2), keepdim=True))
        self.register_buffer("std", logs.std((0, 2), keepdim=True))

    def forward(self, wave: Tensor) -> Tensor:
        """[B, 1, T * 320] to [B, 64, T]: frame t sees the 1,024 samples up to its own end, nothing later."""
        return (self._log_mel(wave) - self.get_buffer("mean")) / self.get_buffer("std")

    def _log_mel(self, wave: Tensor) -> Tensor:
        past = F.pad(wave.squeeze(1), (self.WINDOW - self.HOP, 0))
        window = self.get_buffer("window")
        spectrum = torch.stft(past, self.WINDOW, self.HOP, window=window, center=False, return_complex=True)
        mel = spectrum.abs().transpose(1, 2) @ self.get_buffer("fbank")
        return torch.log(mel + SpectralLoss.LOG_FLOOR).transpose(1, 2)


# ---------------------------------------------------------------- the loop


def quantize(model: EncodecModel, latents: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Straight-through quantization with a random number of codebooks on half of the steps (EnCodec, section 3.2)."""
    n_q = tiny_16khz.NUM_CODEBOOKS
    if generator.random() < 0.5:
        n_q = int(generator.integers(1, n_q + 1))
    quantized, _, losses = model.quantizer.vq(latents, n_q=n_q)
    return quantized, losses.mean()


def learning_rate(step: int, config: CodecTrainConfig) -> float:
    """Linear warm-up over 100 steps, then a cosine to 2 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)


def train(pool: AudioPool, config: CodecTrainConfig, work: Path, log: Callable[[str], None] = print) -> EncodecModel:
    """Train; `work` keeps `last.pt` (for resuming) and `log.jsonl`. Return the network in eval mode."""
    torch.manual_seed(config.seed)
    frames = round(config.segment_seconds * tiny_16khz.SAMPLE_RATE / 320)
    mean_count = config.batch_size * frames / tiny_16khz.CODEBOOK_SIZE
    model = tiny_16khz.build_network(weight_norm=True, dead_code_threshold=0.1 * mean_count).train()
    spectral = SpectralLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.8, 0.99), weight_decay=1e-4)
    first = pool.batch(np.random.default_rng(config.seed), 20 * config.batch_size, frames * 320)
    calibrate(model, first[: config.batch_size])
    guide = Guide(first)
    start, checkpoint = 0, work / "last.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began = time.time()
    for step in range(start, config.steps):
        generator = np.random.default_rng([config.seed, step])
        torch.manual_seed(config.seed * config.steps + step)  # a resumed run draws what an uninterrupted one does
        if step == config.warmup_steps:
            fit_to_data(model, pool, generator, frames * 320)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        wave = pool.batch(generator, config.batch_size, frames * 320)
        latents, target = model.encoder(wave), guide(wave)
        guided = F.mse_loss(latents, target)
        commit = wave.new_zeros(())
        if step >= config.warmup_steps:
            latents, commit = quantize(model, latents, generator)
        else:
            latents = target + 0.1 * torch.randn_like(target)
        output = model.decoder(latents)
        mel, spectrum = spectral(output, wave)
        wave_l1 = F.l1_loss(output, wave)
        loss = (
            config.mel_weight * mel
            + config.spectrum_weight * spectrum
            + config.wave_weight * wave_l1
            + config.commit_weight * commit
            + config.guide_weight * guided
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == config.steps:
            row = dict(step=step, mel=mel.item(), spectrum=spectrum.item(), wave=wave_l1.item(), commit=commit.item())
            row["guided"] = guided.item()
            row["seconds"] = time.time() - began
            log(" ".join(f"{k} {v:.4g}" for k, v in row.items()))
            with (work / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == config.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            with atomic_file(checkpoint) as file:
                torch.save({**state, "config": asdict(config)}, file)
    return model.eval()


@torch.no_grad()
def calibrate(model: EncodecModel, wave: Tensor) -> None:
    """Scale each convolution, in order, so that it puts out unit variance on real audio (LSUV, Mishkin 2016).

    PyTorch's own initial weights shrink the signal at each of the 30 layers: the latent is then all bias, constant in
    time, and a short training never leaves that state. wave: [B, 1, N].
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]
    for layer in layers:
        layer.bias.zero_()  # type: ignore[union-attr]
        layer.get_parameter("weight_g").div_(_output_std(layer, model, wave))
    layers[-1].get_parameter("weight_g").mul_(wave.std())


def _output_std(layer: nn.Module, model: EncodecModel, wave: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _m, _i, output: seen.append(output.std()))
    model.decoder(model.encoder(wave))
    hook.remove()
    return seen[0]


@torch.no_grad()
def fit_to_data(model: EncodecModel, pool: AudioPool, generator: np.random.Generator, length: int) -> None:
    """Fit the codebooks by k-means on frames of training audio."""
    waves = [pool.batch(generator, 20, length) for _ in range(FIT_BATCHES)]
    latents = torch.cat([model.encoder(wave) for wave in waves])
    tiny_16khz.fit_codebooks(model, latents.transpose(1, 2).reshape(-1, tiny_16khz.LATENT_DIM))


def train_codec(manifest: Path, output: Path, config: CodecTrainConfig) -> Path:
    """Train on a manifest and write `tiny_16khz.safetensors` into `output`; rerun to resume. Return its path."""
    from codecssl.tokenize.sources.audio import read_wave

    if not manifest.is_file():
        raise UserError(f"manifest {manifest}: no such file")
    output.mkdir(parents=True, exist_ok=True)
    pool = AudioPool(manifest, output / "pool.int16", lambda path: read_wave(path, tiny_16khz.SAMPLE_RATE))
    print(f"{len(pool.rows)} clips, {len(pool.samples) / tiny_16khz.SAMPLE_RATE / 3600:.2f} h", flush=True)
    model = train(pool, config, output, lambda line: print(line, flush=True))
    path = output / "tiny_16khz.safetensors"
    tiny_16khz.save_weights(model, path, {"codec": "tiny_16khz", "config": json.dumps(asdict(config))})
    return path
