"""Linear probes of frozen features: accuracy of predicting a label from each layer.

The features of an utterance are the mean and standard deviation over time of each dimension. They are standardised on
the training folds and classified by logistic regression. The training folds choose the layer and the penalty strength.
The accuracy of the layer that is best on the test folds is reported too, as optimistic.
"""

import fnmatch
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from codecssl.pretrain.export.shipped import model_folder
from codecssl.pretrain.export.sources import seen_sources
from codecssl.superb import results
from codecssl.superb.probe.crossvalidate import Settings, evaluate
from codecssl.superb.probe.features import open_rows
from codecssl.superb.rows import BASELINES, ResultRow
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import Upstream, parse_all
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import refuse_links_out


class Rows(Protocol):
    """The data of probes: label columns, features, and the sha256 of each row's audio file."""

    @property
    def rows(self) -> Sequence[dict[str, Any]]: ...

    def features(self, upstream: Upstream, builder: UpstreamBuilder) -> Callable[[int], list[np.ndarray]]: ...

    def source_sha256(self, index: int) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The rows of a probe, the column to predict, and the column whose values no two folds share.

    where: file-name patterns for columns, one or a list. One pattern of a list must match. Patterns that begin with "!"
    must not match.
    """

    name: str
    label: str
    task: str | None = None
    group: str | None = None
    where: dict[str, str | list[str]] = field(default_factory=dict)

    def takes(self, row: dict[str, Any]) -> bool:
        """True if a row of the manifest belongs to the probe."""
        in_task = self.task is None or self.task in str(row.get("task", "")).split(",")
        return in_task and all(_matches(str(row.get(key, "")), globs) for key, globs in self.where.items())


def _matches(value: str, globs: str | list[str]) -> bool:
    given = [globs] if isinstance(globs, str) else [str(glob) for glob in globs]
    without = [glob[1:] for glob in given if glob.startswith("!")]
    wanted = [glob for glob in given if not glob.startswith("!")] or ["*"]
    return any(fnmatch.fnmatch(value, glob) for glob in wanted) and not any(
        fnmatch.fnmatch(value, glob) for glob in without
    )


def load_probes(name: str) -> list[Probe]:
    """Load probes from a YAML file or a named configuration. Raises UserError on an unknown key."""
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
    on_progress: Callable[[str], None] = print,
) -> list[ResultRow]:
    """Run every probe on every upstream and return the requested rows.

    Finished results in `output` are not computed again.
    """
    refuse_links_out(output)
    rows, source = [], open_rows(data)
    builder = UpstreamBuilder(device=settings.device, code_folder=output / "cache")
    for upstream in parse_all(names):
        features: Callable[[int], list[np.ndarray]] | None = None
        for probe in probes:
            identity = _identity(upstream, probe, source.fingerprint, settings)
            digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
            path = output / "probes" / probe.name / digest / "result.json"
            if not path.is_file():
                features = features or source.features(upstream, builder)
                found = _measure(source.rows, probe, features, settings)
                row = {**identity, "data": str(data), **found, **_seen(source, upstream, probe)}
                results.write_json(path, row)
                results.publish(output)
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            on_progress(f"{upstream.name}  {probe.name}  best layer {100 * rows[-1]['best_layer']:.1f} %")
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
) -> ResultRow:
    chosen = [i for i, row in enumerate(rows) if probe.takes(row)]
    labels = np.array([_column(rows[i], probe, probe.label) for i in chosen])
    groups = np.array([_column(rows[i], probe, probe.group) for i in chosen]) if probe.group else None
    check(probe, labels, groups, settings.folds)
    pooled = np.stack([np.stack([pool(layer, settings.pool) for layer in features(i)]) for i in chosen])  # [N, L, D]
    return {
        "utterances": len(chosen),
        "classes": len(set(labels)),
        "groups": len(set(groups)) if groups is not None else None,
        "chance": max(Counter(labels.tolist()).values()) / len(labels),
        **evaluate(pooled, labels, groups, settings),
    }


def pool(states: np.ndarray, how: str) -> np.ndarray:
    """Hidden states [T, D] -> their mean over time [D], or mean and standard deviation [2 D]."""
    mean = states.mean(axis=0, dtype=np.float64)
    return mean if how == "mean" else np.concatenate([mean, states.std(axis=0, dtype=np.float64)])


def _seen(source: Rows, upstream: Upstream, probe: Probe) -> ResultRow:
    """Count the probe's clips that a pretrained model was trained on: [clips, clips with a known answer].

    None if the model has no record. Empty for a baseline.
    """
    if upstream.kind in BASELINES:
        return {}
    known = seen_sources(model_folder(upstream.argument or "")) if upstream.kind == "model" else None
    if known is None:
        return {"in_pretraining": None}
    return {
        "in_pretraining": known.count(
            [source.source_sha256(i) for i, row in enumerate(source.rows) if probe.takes(row)]
        )
    }


def _column(row: dict[str, Any], probe: Probe, column: str) -> str:
    if row.get(column) is None:
        raise UserError(f"probe {probe.name}: {row['path']} has no column {column}; narrow the probe with where")
    return str(row[column])


def check(probe: Probe, labels: np.ndarray, groups: np.ndarray | None, folds: int) -> None:
    """Raise UserError if the folds cannot be made."""
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
