"""Linear probes: how much of a label can be read off frozen features, layer by layer.

Features are averaged over time, standardised on the training folds, and read by logistic regression. Folds
keep the values of a group column apart (unseen speakers), else they are stratified. "Best layer" is chosen
inside the training folds; the layer that looks best on the test folds is reported too, under the name it
deserves: optimistic.
"""

import fnmatch
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codecssl.superb import results
from codecssl.superb.probe.crossvalidate import Settings, evaluate
from codecssl.superb.probe.features import open_rows
from codecssl.superb.upstreams.expert import Shelf, Upstream, parse_all
from codecssl.tokenize.common.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Which rows, what to predict, and what to keep apart."""

    name: str
    label: str
    task: str | None = None
    group: str | None = None
    where: dict[str, str] = field(default_factory=dict)

    def takes(self, row: dict[str, Any]) -> bool:
        in_task = self.task is None or self.task in str(row.get("task", "")).split(",")
        return in_task and all(fnmatch.fnmatch(str(row.get(key, "")), glob) for key, glob in self.where.items())


def load_probes(name: str) -> list[Probe]:
    """Probes of a YAML file, or of the configuration of that name; UserError on a key that no probe has."""
    import yaml

    shipped = Path(__file__).resolve().parents[2] / "configs" / "superb" / f"{name}.yaml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        raise UserError(f"probes {name}: neither a file nor a name in configs/superb")
    try:
        return [Probe(name=key, **values) for key, values in yaml.safe_load(path.read_text(encoding="utf-8")).items()]
    except (TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"probes {path}: {' '.join(str(error).split())}; keys are task, label, group, where") from error


def run(
    names: Sequence[str],
    data: Path,
    probes: Sequence[Probe],
    output: Path,
    settings: Settings,
    report: Callable[[str], None] = print,
) -> list[results.Row]:
    """Every probe on every upstream; what is finished in `output` is not computed again. Returns the rows
    asked for.
    """
    rows, source = [], open_rows(data)
    shelf = Shelf(device=settings.device, code_folder=output / "cache")
    for upstream in parse_all(names):
        features: Callable[[int], list[np.ndarray]] | None = None
        for probe in probes:
            identity = _identity(upstream, probe, source.fingerprint, settings)
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
            path = output / "probes" / probe.name / digest / "result.json"
            if not path.is_file():
                features = features or source.features(upstream, shelf)
                row = {**identity, "data": str(data), **_measure(source.rows, probe, features, settings)}
                results.write_json(path, row)
                results.publish(output)
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            report(f"{upstream.name}  {probe.name}  best layer {percent(rows[-1]['best_layer'])} %")
    return rows


def _identity(upstream: Upstream, probe: Probe, fingerprint: str, settings: Settings) -> dict[str, Any]:
    how = {key: value for key, value in asdict(settings).items() if key not in ("device", "jobs")}
    return {
        "upstream": upstream.identity(),
        "probe": asdict(probe),
        "data_fingerprint": fingerprint,
        "settings": how,
    }


def _measure(
    rows: Sequence[dict[str, Any]],
    probe: Probe,
    features: Callable[[int], list[np.ndarray]],
    settings: Settings,
) -> results.Row:
    chosen = [i for i, row in enumerate(rows) if probe.takes(row)]
    labels = np.array([_column(rows[i], probe, probe.label) for i in chosen])
    groups = np.array([_column(rows[i], probe, probe.group) for i in chosen]) if probe.group else None
    check(probe, labels, groups, settings.folds)
    pooled = np.stack([np.stack([layer.mean(axis=0) for layer in features(i)]) for i in chosen])  # [N, L, D]
    return {
        "utterances": len(chosen),
        "classes": len(set(labels)),
        "groups": len(set(groups)) if groups is not None else None,
        "chance": max(Counter(labels.tolist()).values()) / len(labels),
        **evaluate(pooled, labels, groups, settings),
    }


def _column(row: dict[str, Any], probe: Probe, column: str) -> str:
    if row.get(column) is None:
        raise UserError(f"probe {probe.name}: {row['path']} has no column {column}; narrow the probe with where")
    return str(row[column])


def check(probe: Probe, labels: np.ndarray, groups: np.ndarray | None, folds: int) -> None:
    """UserError where the folds can't be made."""
    what = f"probe {probe.name}"
    if len(labels) == 0:
        raise UserError(f"{what}: no row matches it; look at task and where")
    rarest, count = min(Counter(labels.tolist()).items(), key=lambda item: item[1])
    if len(set(labels.tolist())) < 2 or (groups is None and count < folds):
        raise UserError(f"{what}: class {rarest} has {count} rows; give two classes and {folds} rows, one a fold")
    if groups is not None and len(set(groups.tolist())) < folds:
        raise UserError(
            f"{what}: {len(set(groups.tolist()))} values of {probe.group} for {folds} folds; give fewer folds"
        )


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table_lines(rows: Sequence[results.Row]) -> tuple[list[str], list[list[str]]]:
    header = [
        "probe",
        "upstream",
        "best layer %",
        "± seeds",
        "chosen",
        "optimistic %",
        "layers %",
        "chance %",
        "rows",
    ]
    body = []
    for row in sorted(rows, key=lambda row: row["probe"]["name"]):
        chosen = " ".join(f"{layer}x{n}" for layer, n in sorted(Counter(chain(*row["chosen_layers"])).items()))
        line = [row["probe"]["name"], row["upstream"]["name"], percent(row["best_layer"])]
        line += [percent(row["best_layer_deviation"]), chosen, percent(row["optimistic_layer"])]
        line += [" ".join(percent(v) for v in row["layers"]), percent(row["chance"])]
        body.append([*line, f"{row['utterances']}, {row['classes']} classes"])
    return header, body


def console_table(rows: Sequence[results.Row]) -> "Table":
    from rich.table import Table

    header, body = table_lines(rows)
    table = Table(*header, title="Linear probes of frozen, mean-pooled features", caption=NOTE)
    for line in body:
        table.add_row(*line)
    return table


def write_markdown(rows: Sequence[results.Row], output: Path) -> Path:
    header, body = table_lines(rows)
    lines = ["# Linear probes", "", NOTE, ""]
    lines += [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body)]
    (output / "probe.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return output / "probe.md"


NOTE = (
    "Best layer: chosen inside the training folds. Optimistic: the best layer on the test folds themselves. "
    "fbank is taken without its per-utterance normalisation, which would leave a mean of zero."
)
