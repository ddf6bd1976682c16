"""Measures of all layers of upstreams that train no classifier, and a page of charts per layer of these and probes.

OUTPUT/abx/PROBE/HASH/result.json     ABX errors
OUTPUT/pnmi/PROBE/HASH/result.json    PNMI of k-means units
OUTPUT/layers.html
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb import results
from codecssl.superb.probe.abx import abx_error, distance_matrix
from codecssl.superb.probe.features import AudioRows, ShardRows, open_rows
from codecssl.superb.probe.pnmi import layer_pnmi, segments_of
from codecssl.superb.probe.probe import Probe
from codecssl.superb.reporting.svg_charts import PALETTE, line_chart
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import parse_all
from codecssl.tokenize.common.errors import UserError

TITLES = {"abx": "ABX error %", "pnmi": "PNMI %"}

Clips = Sequence[list[np.ndarray]]
"""The hidden states [T, D] of each clip."""


@dataclass(frozen=True, kw_only=True)
class Abx:
    """ABX error of each layer. The probe's group column gives the speakers."""

    name: str = "abx"
    longest_frames: int | None = 200
    """Longer clips are cut: warping costs the product of two lengths."""

    def settings(self) -> dict[str, Any]:
        return {}

    def __call__(self, clips: Clips, source: AudioRows | ShardRows, drawn: Sequence[int], probe: Probe) -> list[float]:
        labels = [str(source.rows[i][probe.label]) for i in drawn]
        speakers = [str(source.rows[i][probe.group]) for i in drawn] if probe.group else None
        return [abx_error(distance_matrix(list(layer)), labels, speakers) for layer in zip(*clips)]


@dataclass(frozen=True, kw_only=True)
class Pnmi:
    """PNMI of each layer's k-means units."""

    clusters: int = 100
    seed: int = 0
    name: str = "pnmi"
    longest_frames: int | None = None

    def settings(self) -> dict[str, Any]:
        return {"clusters": self.clusters, "seed": self.seed}

    def __call__(self, clips: Clips, source: AudioRows | ShardRows, drawn: Sequence[int], probe: Probe) -> list[float]:
        segments = [segments_of(source.rows[i], str(source.rows[i][probe.label]), source.seconds(i)) for i in drawn]
        order = np.random.default_rng(self.seed).permutation(len(drawn))  # which half of the clips fits
        shuffled = [segments[i] for i in order]
        return [
            layer_pnmi([layer[i] for i in order], shuffled, self.clusters, self.seed)
            for layer in map(list, zip(*clips))
        ]


def run(
    names: Sequence[str],
    data: Path,
    probe: Probe,
    output: Path,
    *,
    measure: Abx | Pnmi | None = None,
    clips: int = 200,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Return a row with "layers", the measure of each layer, for each upstream. Finished rows are not computed again.

    measure: ABX by default. clips: maximum number of clips, drawn at random. Raises UserError if there are none.
    """
    source, builder, rows = open_rows(data), UpstreamBuilder(device=device, code_folder=output / "cache"), []
    measure = measure or Abx()
    chosen = np.array([i for i, row in enumerate(source.rows) if probe.takes(row)], int)
    if not len(chosen):
        raise UserError(f"probe {probe.name}: no row matches it; look at task and where")
    drawn = sorted(np.random.default_rng(seed).permutation(chosen)[:clips].tolist())
    for upstream in parse_all(names):
        identity = {"upstream": upstream.identity(), measure.name: probe.name, "data": source.fingerprint}
        identity |= {"clips": drawn, **measure.settings()}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        path = output / measure.name / probe.name / digest / "result.json"
        if not path.is_file():
            read = source.features(upstream, builder)
            clips_of = [[layer[: measure.longest_frames] for layer in read(i)] for i in drawn]
            results.write_json(path, {**identity, "layers": measure(clips_of, source, drawn, probe)})
        rows.append(results.read_json(path))
        values = " ".join(f"{100 * value:.1f}" for value in rows[-1]["layers"])
        on_progress(f"{upstream.name}  {TITLES[measure.name]}: {values}")
    write_page(output)
    return rows


def write_page(output: Path) -> Path:
    """Write layers.html: ABX errors, PNMI, and the accuracies of finished probes in `output`, against the layer."""
    charts = [(f"{title}, {row[name]}", row) for name, title in TITLES.items()
              for row in map(results.read_json, sorted(output.glob(f"{name}/*/*/result.json")))]  # fmt: skip
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
