"""Tables, plots and pages of `codecssl-tokenize compare`."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import write_atomic

TITLE = "Comparison of codecs"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1300px; margin: 2rem auto; padding: 0 1rem; color: #1c2430 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid #d9dee5 }
th:first-child, td:first-child { text-align: left }
.scroll { overflow-x: auto }
svg { max-width: 620px; height: auto }
"""
COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("frame_rate", "frames/s", ".4g"),
    ("kbps", "kbit/s nominal", ".3f"),
    ("kbps_entropy_coded", "entropy-coded", ".3f"),
    ("kbps_order_0", "order-0", ".3f"),
    ("kbps_given_previous", "given the code before", ".3f"),
    ("kbps_given_coarser", "given the coarser", ".3f"),
    ("used", "entries used", ".1%"),
    ("perplexity", "perplexity", ".0f"),
    ("mel_distance", "mel distance", ".3f"),
    ("si_sdr_db", "SI-SDR (dB)", ".2f"),
    ("encode_x_real_time", "encode, x real time", ".1f"),
    ("decode_x_real_time", "decode, x real time", ".1f"),
    ("peak_gigabytes", "peak memory (GB)", ".2f"),
)
"""Key of a row, title and format of each column, between the codec's name and its probes."""


def cells(found: dict[str, Any]) -> list[list[str]]:
    """Return the table as rows of texts, the titles first. Values that a codec does not have are "-"."""
    titles = ["codec", "codebooks", *(title for _, title, _ in COLUMNS)]
    titles += [f"{name} (chance {_chance(found, name):.1%})" for name in found["probes"]]
    rows = [titles]
    for row in found["codecs"]:
        values = [(row[key], form) for key, _, form in COLUMNS]
        values += [(row["probes"][name]["accuracy"], ".1%") for name in found["probes"]]
        rows.append([row["codec"], _codebooks(row), *("-" if _none(v) else format(v, form) for v, form in values)])
    return rows


def _none(value: float | None) -> bool:
    return value is None or bool(np.isnan(value))


def _chance(found: dict[str, Any], name: str) -> float:
    return float(found["codecs"][0]["probes"][name]["chance"])


def _codebooks(row: dict[str, Any]) -> str:
    """Describe codebooks, e.g. "8 x 1024"; codes per frame are shown only if they differ from 1."""
    sizes, counts = row["codebook_sizes"], row["codes_per_frame"]
    text = f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else " + ".join(map(str, sizes))
    return text if set(counts) == {1} else f"{text} at {':'.join(map(str, counts))} a frame"


def notes(found: dict[str, Any]) -> list[str]:
    """Return notes on the meaning of the columns, and on figures that were not measured."""
    lines = [
        f"{found['clips']} clips, {found['hours'] * 3600:.0f} s. Rates are in kbit/s over all codebooks. Entropies are "
        "estimates from these clips. Entropy-coded: with tables fitted to the other half of the clips.",
        "Mel distance and SI-SDR at 16 kHz. Speed with the threads of one process; memory of that process.",
    ]
    if found["probes"]:
        lines.append("Probes: logistic regression on mean and deviation of the latents, cross-validated.")
    lines += [f"{row['codec']}: not decoded: {row['not_decoded']}" for row in found["codecs"] if row["not_decoded"]]
    return lines


def markdown(found: dict[str, Any]) -> str:
    """Format the table as Markdown, with its notes."""
    titles, *rows = cells(found)
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes(found))])


def write(folder: Path, found: dict[str, Any]) -> list[Path]:
    """Write results.json, report.md, report.html and the plots. Return their paths."""
    plots = {
        "mel_distance.svg": plot(found["codecs"], [row["mel_distance"] for row in found["codecs"]], "mel distance")
    }
    if found["probes"]:
        means = [np.mean([probe["accuracy"] for probe in row["probes"].values()]) for row in found["codecs"]]
        label = "accuracy of the probes, mean, %"
        plots = {"probe_accuracy.svg": plot(found["codecs"], [100 * mean for mean in means], label)} | plots
    pictures = "".join(f"\n![{name.removesuffix('.svg').replace('_', ' ')}]({name})" for name in plots)
    files = plots | {
        "results.json": json.dumps(found, indent=1),
        "report.md": f"# {TITLE}\n\n{markdown(found)}\n{pictures}\n",
        "report.html": _html(found, list(plots.values())),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomic(folder / name, text.encode())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); give a folder that you may write to") from error
    return [folder / name for name in files]


def _html(found: dict[str, Any], plots: Sequence[str]) -> str:
    titles, *rows = ([escape(text) for text in row] for row in cells(found))
    head = "<tr>" + "".join(f"<th>{text}</th>" for text in titles) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{text}</td>" for text in row) + "</tr>" for row in rows)
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes(found))
    pictures = "".join(svg[svg.index("<svg") :] for svg in plots)
    meta = f'<meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style>'
    table = f'<div class="scroll"><table>{head}{body}</table></div><ul>{listed}</ul>'
    page = f"<h1>{TITLE}</h1>{table}{pictures}"
    return f'<!doctype html><html lang="en"><head>{meta}</head><body>{page}</body></html>\n'


def plot(rows: Sequence[dict[str, Any]], values: Sequence[float | None], label: str) -> str:
    """Draw values against the bit rates: nominal ones as dots, entropy-coded ones as rings, joined. Return an SVG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "codecssl"}):  # ids that do not change from run to run
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for number, (row, value) in enumerate(zip(rows, values)):
            if value is None:
                continue
            color, coded = f"C{number % 10}", row["kbps_entropy_coded"]
            axes.plot([row["kbps"], coded], [value, value], color=color, lw=1)
            axes.plot(row["kbps"], value, "o", color=color, label=row["codec"])
            axes.plot(coded, value, "o", color=color, mfc="none")
        axes.set(xscale="log", xlabel="kbit/s (filled: nominal, open: entropy-coded)", ylabel=label)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
        figure.savefig(buffer := io.StringIO(), format="svg", metadata={"Date": None})
    return buffer.getvalue()
