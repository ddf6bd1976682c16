"""Plots of `codecssl-tokenize stats`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codecssl.tokenize.common.errors import UserError

if TYPE_CHECKING:
    from codecssl.tokenize.measure.stats_sample import Sample
    from codecssl.tokenize.shards import Shards


def draw(path: Path, found: dict[str, Any], sample: Sample, shards: Shards) -> None:
    """Write a PNG: lengths of utterances, bits per code, usage of the codebooks' entries, and its evenness.

    Raises UserError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    compressed = ", compressed" if found["compressed"] else ""
    figure.suptitle(
        f"{shards.path.name}: {found['codec']}, {found['hours']:.2f} h, {found['utterances']} utterances, "
        f"{found['stored_bits_per_code']:.2f} bits per code{compressed}"
    )
    (lengths, bits), (ranks, evenness) = figure.subplots(2, 2)
    _lengths(lengths, shards)
    _bits(bits, found)
    _ranks(ranks, found, sample)
    _evenness(evenness, found)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}); give a .png in a folder that exists") from error


def _lengths(axes: Any, shards: Shards) -> None:
    seconds = np.maximum(shards.frames, 1) / float(shards.card.frame_rate)
    low, high = np.log10([seconds.min(), seconds.max()]) if len(seconds) else (0.0, 1.0)
    axes.hist(seconds, bins=np.logspace(low - 0.02, high + 0.02, 60), color="tab:blue")
    axes.set(xscale="log", xlabel="seconds", ylabel="utterances", title="Length of the utterances")
    _plain_ticks(axes, 10**low, 10**high)


def _bits(axes: Any, found: dict[str, Any]) -> None:
    books = found["codebooks"]
    places = np.arange(len(books))
    colors = ("0.8", "tab:blue", "tab:orange", "tab:green")
    series = {
        "packed": [max(1, (book["size"] - 1).bit_length()) for book in books],
        "entropy": [book["entropy_bits"] for book in books],
        "given the code before": [book["bits_given_previous"] for book in books],
        "given the coarser codebook's": [book["bits_given_coarser"] for book in books],
    }
    for i, (name, values) in enumerate(series.items()):
        heights = [0.0 if value is None else value for value in values]
        axes.bar(places + (i - 1.5) * 0.2, heights, 0.2, label=name, color=colors[i])
    axes.axhline(found["stored_bits_per_code"], color="k", lw=0.8, ls="--", label="in the files, mean")
    axes.set(xlabel="codebook", ylabel="bits per code", title="Bits per code")
    axes.set_xticks(places[:: -(-len(books) // 16)])
    axes.set_ylim(0, 1.35 * max(series["packed"], default=1))
    axes.legend(fontsize=8, ncols=2, loc="upper right")


def _ranks(axes: Any, found: dict[str, Any], sample: Sample) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"](np.linspace(0, 0.9, len(found["codebooks"])))
    every = -(-len(colors) // 16)  # at most the legend's capacity
    for k, (plane, book) in enumerate(zip(sample.planes, found["codebooks"])):
        counts = np.sort(np.bincount(plane, minlength=book["size"]))[::-1]
        shares = counts[counts > 0] / max(len(plane), 1)
        axes.plot(np.arange(1, len(shares) + 1), shares, color=colors[k], lw=1.2, label=None if k % every else f"{k}")
    axes.set(xscale="log", xlabel="entry, by how often it is used", ylabel="share of the codes")
    axes.set_yscale("log" if len(sample.frames) else "linear")
    _plain_ticks(axes, 1, max(book["size"] for book in found["codebooks"]))
    axes.set_title("How often each entry is used")
    axes.legend(fontsize=7, ncols=4, title="codebook", title_fontsize=8, loc="lower left")


def _evenness(axes: Any, found: dict[str, Any]) -> None:
    books = found["codebooks"]
    places = np.arange(len(books))
    used, even = ([100 * book[name] / book["size"] for book in books] for name in ("used", "perplexity"))
    axes.bar(places - 0.2, used, 0.4, label="entries used", color="0.75")
    axes.bar(places + 0.2, even, 0.4, label="perplexity", color="tab:blue")
    axes.set(xlabel="codebook", ylabel="% of its size", title="How evenly the entries are used")
    axes.set_xticks(places[:: -(-len(books) // 16)])
    axes.set_ylim(0, 119)
    axes.legend(fontsize=8, ncols=2, loc="upper right")


def _plain_ticks(axes: Any, low: float, high: float) -> None:
    """Set ticks 1, 2, 5, 10, ... on a logarithmic axis, or 1, 10, 100 if these would be too many."""
    steps = (1, 2, 5) if high / low < 1e4 else (1,)
    ticks = [step * 10.0**e for e in range(-3, 7) for step in steps if low / 1.1 <= step * 10.0**e <= high * 1.1]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
