"""ABX errors of all layers of upstreams on a probe's clips, and a page of charts per layer for ABX and probes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb import results
from codecssl.superb.probe.abx import abx_error, distance_matrix
from codecssl.superb.probe.features import open_rows
from codecssl.superb.probe.probe import Probe
from codecssl.superb.reporting.svg_charts import PALETTE, line_chart
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import parse_all
from codecssl.tokenize.common.errors import UserError

LONGEST_FRAMES = 200
"""Longer clips are cut: warping costs the product of two lengths."""


def run(
    names: Sequence[str],
    data: Path,
    probe: Probe,
    output: Path,
    *,
    clips: int = 200,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Return a row with "layers", the ABX error of each layer, for each upstream. Finished rows are not computed again.

    The probe's group column gives the speakers. clips: maximum number of clips, drawn at random. Raises
    UserError if there are none.
    """
    source, builder, rows = open_rows(data), UpstreamBuilder(device=device, code_folder=output / "cache"), []
    chosen = np.array([i for i, row in enumerate(source.rows) if probe.takes(row)], int)
    if not len(chosen):
        raise UserError(f"probe {probe.name}: no row matches it; look at task and where")
    drawn = sorted(np.random.default_rng(seed).permutation(chosen)[:clips].tolist())
    labels = [str(source.rows[i][probe.label]) for i in drawn]
    speakers = [str(source.rows[i][probe.group]) for i in drawn] if probe.group else None
    for upstream in parse_all(names):
        identity = {"upstream": upstream.identity(), "abx": probe.name, "data": source.fingerprint, "clips": drawn}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        path = output / "abx" / probe.name / digest / "result.json"
        if not path.is_file():
            states = [[layer[:LONGEST_FRAMES] for layer in read(i)] for read in [source.features(upstream, builder)]
                      for i in drawn]  # fmt: skip
            layers = [abx_error(distance_matrix(list(layer)), labels, speakers) for layer in zip(*states)]
            results.write_json(path, {**identity, "layers": layers})
        rows.append(results.read_json(path))
        on_progress(f"{upstream.name}  ABX error %: {' '.join(f'{100 * value:.1f}' for value in rows[-1]['layers'])}")
    write_page(output)
    return rows


def write_page(output: Path) -> Path:
    """Write layers.html: ABX errors, and the accuracies of finished probes in `output`, against the layer."""
    abx = [results.read_json(path) for path in sorted(output.glob("abx/*/*/result.json"))]
    charts = [(f"ABX error %, {row['abx']}", row) for row in abx]
    charts += [(f"accuracy %, {row['probe']['name']}", row) for row in results.read_rows(output, "probes")]
    by_title: dict[str, list[dict[str, Any]]] = {}
    for title, row in charts:
        by_title.setdefault(title, []).append(row)
    parts = ["<!doctype html><meta charset='utf-8'><title>Layers</title><h1>Layers</h1>"]
    for title, rows in by_title.items():
        series = [
            (Path(row["upstream"]["name"]).name, PALETTE[i % len(PALETTE)],
             [(float(layer), 100 * value) for layer, value in enumerate(row["layers"])])
            for i, row in enumerate(rows)
        ]  # fmt: skip
        legend = " ".join(f"<span style='color:{colour}'>{label}</span>" for label, colour, _ in series)
        parts.append(f"<figure>{line_chart(title, series, x_label='layer')}<figcaption>{legend}</figcaption></figure>")
    results.write_text(output / "layers.html", "\n".join(parts) + "\n")
    return output / "layers.html"
