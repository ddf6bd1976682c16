"""`codecssl-tokenize stats`: amount of audio, bits, and usage of the codebooks.

Entropies are estimates for the source of the codes, not for the sample. Order-0 is the estimate of Miller and Madow
(1955): the entropy of the histogram plus (used - 1) / 2N nats. Conditional entropies are the bits that a count model,
smoothed towards order-0, needs for utterances it has not seen. Such a cross-entropy is never below the entropy, and
approaches it as the data grow.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.entropy import aligned
from codecssl.tokenize.format.layout import NOTES
from codecssl.tokenize.measure.entropies import conditional_entropy, corrected_entropy
from codecssl.tokenize.measure.stats_sample import MAX_CODES, Sample, take_sample
from codecssl.tokenize.shards import Shards, Utterance

FLAC_FILES = 32
FLAC_SECONDS = 120.0
"""Maximum seconds of an utterance in the comparison with FLAC."""


def stats(root: Path, *, plot: Path | None = None, max_codes: int = MAX_CODES) -> dict[str, Any]:
    """Return totals of a dataset and, per codebook, the usage and entropies (bits) of its codes.

    At most about `max_codes` codes are counted, of evenly spaced utterances. `plot` is a PNG file to write.
    Raises UserError if `root` is not a finished dataset.
    """
    shards = Shards(root)
    card, totals = shards.card, shards.header["totals"]
    seconds = totals["samples"] / card.sample_rate
    sample = take_sample(shards, max_codes)
    nominal = sum(b * r for b, r in zip(card.code_bits, card.codes_per_frame)) * totals["frames"]
    mel = shards.mel_spec.bands * totals["frames"] if shards.mel_spec else 0
    stored = (sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) - mel) * 8
    codes = totals["frames"] * sum(card.codes_per_frame)
    flac, flac_files, without_flac = flac_bits_per_second(shards)
    found = {
        "codec": card.name,
        "num_codebooks": card.num_codebooks,
        "frame_rate": float(card.frame_rate),
        "compressed": shards.entropy_coded,
        "mel_bands": shards.mel_spec.bands if shards.mel_spec else None,
        "mel_bytes": mel,
        "utterances": totals["utterances"],
        "failed": totals["failed"],
        "notes": totals.get("notes", {}),
        "hours": seconds / 3600,
        "frames": totals["frames"],
        "codes": codes,
        "codes_per_second": codes / seconds if seconds else 0.0,
        "nominal_bits_per_code": nominal / max(codes, 1),
        "stored_bits_per_code": stored / max(codes, 1),
        "overhead": stored / max(nominal, 1) - 1,
        "ratio_to_pcm16": seconds * 16 * card.sample_rate * card.channels / max(stored, 1),
        "ratio_to_flac": None if flac is None else seconds * flac / max(stored, 1),
        "flac_files": flac_files,
        "without_flac": without_flac,
        "counted_utterances": len(sample.frames),
        "codebooks": [codebook(k, sample, size) for k, size in enumerate(card.codebook_sizes)],
    }
    if plot is not None:
        from codecssl.tokenize.measure.stats_plot import draw  # imports matplotlib

        draw(plot, found, sample, shards)
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """Format the result of `stats` as text."""
    rate = f"{found['frame_rate']:g} frames/s, {found['codes_per_second']:g} codes/s"
    nominal = f"{found['nominal_bits_per_code']:.3f} nominal ({found['overhead']:+.2%})"
    flac = f"against FLAC     {found['without_flac']}"
    if found["ratio_to_flac"] is not None:
        flac = f"smaller than     FLAC by {found['ratio_to_flac']:.1f} x (16 bit, {found['flac_files']} of the sources)"
    return [
        f"codec            {found['codec']}, {found['num_codebooks']} codebooks, {rate}",
        f"utterances       {found['utterances']} ({found['failed']} inputs failed)",
        *(f"note             {count} {NOTES.get(note, note)}" for note, count in found["notes"].items()),
        f"audio            {found['hours']:.3f} h, {found['frames']} frames, {found['codes']} codes",
        f"bits per code    {found['stored_bits_per_code']:.3f} stored in all files, {nominal}",
        *_mel_line(found),
        f"smaller than     PCM16 by {found['ratio_to_pcm16']:.1f} x{' (the codes)' if found['mel_bytes'] else ''}",
        flac,
        "                 used            perplexity    bits    given the code    given the coarser",
        "                                                       before            codebook's",
        *(_codebook_line(k, book) for k, book in enumerate(found["codebooks"])),
    ]


def _mel_line(found: dict[str, Any]) -> list[str]:
    if not found["mel_bytes"]:
        return []
    rate = found["mel_bytes"] * 8 / (found["hours"] * 3600) / 1000
    return [f"log-mel plane    {found['mel_bytes'] / 1e6:.2f} MB more, {found['mel_bands']} bands, {rate:.1f} kbit/s"]


def _codebook_line(k: int, book: dict[str, Any]) -> str:
    def text(name: str) -> str:
        return "-" if book[name] is None else f"{book[name]:.3f}"

    used = f"{book['used']} of {book['size']}"
    known = f"{text('bits_given_previous'):<16}  {text('bits_given_coarser')}"
    return f"codebook {k:<6}  {used:<14}  {book['perplexity']:<12.1f}  {text('entropy_bits'):<6}  {known}"


def codebook(k: int, sample: Sample, size: int) -> dict[str, Any]:
    """Usage of one codebook: the entries used, and the entropies of its codes, alone and given preceding codes."""
    plane = sample.planes[k].astype(np.int64)
    rate = len(plane) // max(int(sample.frames.sum()), 1)
    utterance = np.repeat(np.arange(len(sample.frames)), sample.frames * rate)
    counts = np.bincount(plane, minlength=size)
    bits = corrected_entropy(counts)
    inside = np.flatnonzero(utterance[1:] == utterance[:-1]) + 1  # an utterance's first code has no predecessor
    before = conditional_entropy(plane[inside], plane[inside - 1], utterance[inside], size)
    coarser = None
    if k:
        known = aligned(sample.planes[k - 1], len(plane)).astype(np.int64)
        coarser = conditional_entropy(plane, known, utterance, size)
    return {
        "used": int((counts > 0).sum()),
        "size": size,
        "entropy_bits": bits,
        "perplexity": 2**bits,
        "bits_given_previous": before,
        "bits_given_coarser": coarser,
    }


# ---------------------------------------------------------------- FLAC


def flac_bits_per_second(shards: Shards, files: int = FLAC_FILES) -> tuple[float | None, int, str | None]:
    """Return bits per second of the sources as FLAC (16 bit, the codec's sample rate), the number of files, and None.

    Measured on up to `files` evenly spaced utterances whose sources are unchanged. If that is impossible, returns
    None, 0 and the reason.
    """
    import soundfile

    from codecssl.tokenize.sources.audio import AudioReader
    from codecssl.tokenize.sources.changes import sha256_of_input

    card, size, seconds, count = shards.card, 0, 0.0, 0
    wanted = {u.id: u for u in _spaced(shards, files)}
    try:
        for item in _inputs(shards, set(wanted)):
            with item.open() as file:
                if sha256_of_input(item, file) != wanted[item.id].source_sha256:
                    continue
                reader = AudioReader(file, card.sample_rate, item.start, item.end, channels=card.channels)
                wave = np.concatenate(list(reader.blocks()), axis=-1)
            soundfile.write(buffer := io.BytesIO(), wave.T, card.sample_rate, format="FLAC", subtype="PCM_16")
            size, seconds, count = size + len(buffer.getvalue()), seconds + wave.shape[-1] / card.sample_rate, count + 1
    except (UserError, OSError, RuntimeError) as error:
        return None, 0, f"not measured: {str(error).splitlines()[0]}"
    if not count:
        return None, 0, "not measured: none of the sources is there as it was"
    return size * 8 / seconds, count, None


def _spaced(shards: Shards, count: int) -> Iterator[Utterance]:
    short = np.flatnonzero(shards.frames <= FLAC_SECONDS * float(shards.card.frame_rate))
    picks = np.unique(np.linspace(0, len(short) - 1, count).astype(int)) if len(short) else short
    return (shards.utterance(int(short[i])) for i in picks)


def _inputs(shards: Shards, ids: set[str]) -> Iterator[Any]:
    from codecssl.tokenize.sources.sources import is_stream, read_sources

    sources = shards.header["sources"]
    if not sources or any(is_stream(source) for source in sources):
        raise UserError("the sources are not files" if sources else "the dataset names no sources")
    for item in read_sources(sources):
        if item.id in ids:
            ids.remove(item.id)
            yield item
        if not ids:
            return
