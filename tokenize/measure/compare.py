"""`codecssl-tokenize compare`: codecs on the same clips: bits, entropies, fidelity, speed, memory and linear probes."""

from __future__ import annotations

import fnmatch
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from codecssl.tokenize.codec import Codec, CodecCard, Encoded
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.encode import LoadedAudio, read
from codecssl.tokenize.format.entropy import Coder
from codecssl.tokenize.format.entropy_tables import fit
from codecssl.tokenize.format.layout import to_planes
from codecssl.tokenize.measure.fidelity import RATE, align, mel_distance, si_sdr
from codecssl.tokenize.measure.latent_probe import LatentProbe, accuracy, default_probes, pool
from codecssl.tokenize.measure.stats import codebook
from codecssl.tokenize.measure.stats_sample import Sample
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.sources.inputs import Input
from codecssl.tokenize.sources.sources import read_sources

PRELOADED = (__name__, "sklearn.linear_model", "sklearn.model_selection", "sklearn.pipeline", "sklearn.preprocessing")
"""Modules that every codec's process needs."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Options of `codecssl-tokenize compare`."""

    codecs: tuple[str, ...]
    """NAME, PATH or NAME@PATH, each with `:K` at its end to keep K codebooks."""
    data: tuple[str, ...]
    """Sources, as of `run`."""
    labels: tuple[str, ...] = ()
    """Probes as LABEL or LABEL/GROUP; none: the usual label columns that the data has."""
    where: tuple[str, ...] = ()
    """COLUMN=PATTERN: only inputs whose column matches the file-name pattern."""
    clips: int = 60
    seconds: float = 10.0
    """Length to which clips are cut."""
    device: str = "cpu"


def compare(config: CompareConfig, on_progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure every codec in a process of its own. Return the clips' totals and one row per codec.

    Raises UserError for a codec that cannot be loaded, and if no clip can be read.
    """
    items = choose(read_sources(list(config.data)), config)
    probes = [LatentProbe.parse(text) for text in config.labels] or default_probes([item.labels for item in items])
    _in_new_process(_check, config.codecs, config.device)
    rows = []
    for spec in config.codecs:
        # a new process for each codec, so that its peak memory is its own
        rows.append(_in_new_process(measure, spec, items, probes, config.seconds, config.device))
        on_progress(f"{spec}: {rows[-1]['seconds_spent']:.0f} s")
    return {
        "data": list(config.data),
        "clips": rows[0]["clips"],
        "hours": rows[0]["audio_seconds"] / 3600,
        "probes": [probe.name for probe in probes],
        "codecs": rows,
    }


def _in_new_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` in a fork of a process that has imported PRELOADED and nothing else, so that imports cost once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def _check(specs: Sequence[str], device: str) -> None:
    """Load every codec once, so that a missing one is reported before minutes of work on the others."""
    for spec in specs:
        _load(spec, device)


def choose(inputs: Any, config: CompareConfig) -> list[Input]:
    """Return up to `clips` evenly spaced inputs that match `where`. Raises UserError if there is none."""
    wanted = [_condition(text) for text in config.where]
    found = [item for item in inputs if all(_matches(item, column, pattern) for column, pattern in wanted)]
    if not found:
        raise UserError(f"compare: no input in {', '.join(config.data)} matches {' '.join(config.where) or 'anything'}")
    picks = np.unique(np.linspace(0, len(found) - 1, config.clips).round().astype(int))
    return [found[i] for i in picks]


def _condition(text: str) -> tuple[str, str]:
    column, sign, pattern = text.partition("=")
    if not sign:
        raise UserError(f"--where {text}: must be COLUMN=PATTERN, e.g. task=er")
    return column, pattern


def _matches(item: Input, column: str, pattern: str) -> bool:
    value = item.path if column == "path" else item.labels.get(column)
    return value is not None and fnmatch.fnmatch(str(value), pattern)


# ---------------------------------------------------------------- one codec


def measure(
    spec: str, items: Sequence[Input], probes: Sequence[LatentProbe], seconds: float, device: str
) -> dict[str, Any]:
    """Measure one codec: a row of the comparison. Peak memory is that of the whole process."""
    began = time.perf_counter()
    codec = _load(spec, device)
    waves, labels = _waves(items, codec.card, seconds)
    encoded, encoding = _timed(lambda: [codec.encode([wave])[0] for wave in waves])
    decoded, decoding, refused = _decoded(codec, encoded)
    pooled = np.stack([pool(codec.latents(e.codes).float().cpu().numpy()) for e in encoded])
    card, audio = codec.card, sum(wave.shape[-1] for wave in waves) / codec.card.sample_rate
    found = {
        "codec": spec,
        "name": card.name,
        "sample_rate": card.sample_rate,
        "frame_rate": float(card.frame_rate),
        "codebook_sizes": list(card.codebook_sizes),
        "codes_per_frame": list(card.codes_per_frame),
        "latent_dim": card.latent_dim,
        "clips": len(waves),
        "audio_seconds": audio,
        **_bits(card, [e.codes.cpu().numpy() for e in encoded], audio),
        **_fidelity(waves, decoded, card.sample_rate),
        "not_decoded": refused,
        "encode_x_real_time": audio / encoding,
        "decode_x_real_time": audio / decoding if decoded else None,
        "probes": {probe.name: accuracy(pooled, labels, probe) for probe in probes},
        "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    return found | {"seconds_spent": time.perf_counter() - began}


def _load(spec: str, device: str) -> Codec:
    name, _, count = spec.rpartition(":")
    if name and count.isdecimal():
        return load_codec(name, num_codebooks=int(count), device=device)
    return load_codec(spec, device=device)


def _waves(items: Sequence[Input], card: CodecCard, seconds: float) -> tuple[list[Tensor], list[dict[str, Any]]]:
    waves, labels = [], []
    for item in items:
        loaded = read(item, card)
        if isinstance(loaded, LoadedAudio) and loaded.wave is not None:
            waves.append(torch.from_numpy(loaded.wave[..., : int(seconds * card.sample_rate)].copy()))
            labels.append(item.labels)
    if not waves:
        raise UserError("compare: none of the clips could be read, or all are longer than half a minute")
    return waves, labels


def _decoded(codec: Codec, encoded: Sequence[Encoded]) -> tuple[list[Tensor], float, str | None]:
    """Decode all clips. Return the waves, the seconds spent and, if the codec does not decode, its reason."""
    try:
        waves, spent = _timed(lambda: [codec.decode(e.codes, e.scales).cpu() for e in encoded])
    except UserError as error:
        return [], 0.0, str(error)
    return waves, spent, None


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def _fidelity(waves: Sequence[Tensor], decoded: Sequence[Tensor], sample_rate: int) -> dict[str, Any]:
    """Mean mel distance and median SI-SDR in dB at 16 kHz, mono; None for a codec that does not decode."""
    mel, sdr = [], []
    for wave, output in zip(waves, decoded):
        target, found = align(*(_mono_16khz(x, sample_rate) for x in (wave, output[..., : wave.shape[-1]])))
        mel.append(mel_distance(target, found))
        sdr.append(si_sdr(target, found))
    return {
        "mel_distance": float(np.mean(mel)) if mel else None,
        "si_sdr_db": float(np.median(sdr)) if sdr else None,
    }


def _mono_16khz(wave: Tensor, sample_rate: int) -> NDArray[np.float32]:
    samples = (wave if wave.dim() == 1 else wave.mean(dim=0)).float().numpy()
    return samples if sample_rate == RATE else soxr.resample(samples, sample_rate, RATE, quality="HQ")


# ---------------------------------------------------------------- bits


def _bits(card: CodecCard, codes: Sequence[NDArray[np.int64]], audio_seconds: float) -> dict[str, Any]:
    """Bit rates, entropies of the codes, and usage of the codebooks. Rates are in kbit/s, over all codebooks."""
    planes = [to_planes(c, card) for c in codes]
    frames = np.array([c.shape[1] for c in codes])
    joined = [np.concatenate(plane) for plane in zip(*planes)]
    books = [codebook(k, Sample(joined, frames), size) for k, size in enumerate(card.codebook_sizes)]
    per_second = [n * float(card.frame_rate) for n in card.codes_per_frame]

    def kbps(name: str) -> float | None:
        values = [book[name] if book[name] is not None else book["entropy_bits"] for book in books]
        missing = all(book[name] is None for book in books)
        return None if missing else sum(v * rate for v, rate in zip(values, per_second)) / 1000

    return {
        "kbps": card.bits_per_second / 1000,
        "kbps_entropy_coded": _coded_bits(card, planes, frames) / audio_seconds / 1000,
        "kbps_order_0": kbps("entropy_bits"),
        "kbps_given_previous": kbps("bits_given_previous"),
        "kbps_given_coarser": kbps("bits_given_coarser"),
        "used": sum(book["used"] for book in books) / sum(card.codebook_sizes),
        "perplexity": float(np.mean([book["perplexity"] for book in books])),
        "codebooks": books,
    }


def _coded_bits(card: CodecCard, planes: Sequence[Sequence[NDArray[Any]]], frames: NDArray[np.int64]) -> float:
    """Bits of all clips, each coded with tables that were fitted to the other half of the clips.

    The tables themselves are not counted: in a dataset they are shared by thousands of utterances.
    """
    if len(planes) < 2:
        return float("nan")
    bits = 0.0
    for half in (0, 1):
        rest = range(1 - half, len(planes), 2)
        joined = [np.concatenate(plane) for plane in zip(*(planes[i] for i in rest))]
        coder = Coder(fit(joined, frames[list(rest)], card.codebook_sizes), card.codes_per_frame)
        bits += sum(coder.encode(planes[i]).nbytes * 8 for i in range(half, len(planes), 2))
    return bits
