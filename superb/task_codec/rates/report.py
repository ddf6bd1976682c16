"""`codecssl-superb task-codec-report`: task metrics against bit rate, of task codecs and of baselines."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from codecssl.superb import results
from codecssl.superb.task_codec.config import BottleneckTrainConfig
from codecssl.superb.task_codec.examples import FOLDS
from codecssl.superb.task_codec.make_codec import Prepared, TaskCodecConfig, prepare, settle
from codecssl.superb.task_codec.rates.plot import draw
from codecssl.superb.task_codec.rates.points import Shared, points
from codecssl.superb.task_codec.rates.table import Point, markdown, summary
from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Grid of points. The other settings are those of `TaskCodecConfig`."""

    upstream: Path
    data: Path
    output: Path
    tasks: tuple[str, ...]
    layers: tuple[int, ...]
    rates_bps: tuple[float, ...] = (50.0, 100.0, 200.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    folds: int = FOLDS
    """Number of folds tested per seed. Fewer are faster but less conclusive."""
    frame_rate: float | None = None
    codebook_dim: int = 32
    probes: str = "probes"
    device: str = "cpu"
    train: BottleneckTrainConfig = field(default_factory=BottleneckTrainConfig)


def report(config: ReportConfig, say: Callable[[str], None] = print) -> list[Path]:
    """Compute missing points. Write results.jsonl, report.md and report.png to the output folder."""
    if "none" in config.tasks:
        raise UserError("task none: has no metric to report; give a task")
    if not 1 <= config.folds <= FOLDS:
        raise UserError(f"folds {config.folds}: must be 1 to {FOLDS}")
    ready = prepare(config.upstream, config.data, config.output / "work", config.device)
    shared, work = Shared(ready), config.output / "work" / "points" / _digest(config, ready)
    rows: list[Point] = []
    for task in config.tasks:
        for layer in config.layers:
            for seed in config.seeds:
                rows += _all_folds(config, shared, work, {"task": task, "layer": layer, "seed": seed}, say)
    name, settings = config.upstream.resolve().name, asdict(config.train)
    lines = "".join(json.dumps({"upstream": name, **row}, sort_keys=True) + "\n" for row in rows)
    results.write_text(config.output / "results.jsonl", lines)
    text = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "seed")
    results.write_text(config.output / "report.md", f"{markdown(summary(rows))}\nUpstream {name}; {text}.\n")
    draw(config.output / "report.png", summary(rows))
    return [config.output / name for name in ("results.jsonl", "report.md", "report.png")]


def _all_folds(
    config: ReportConfig, shared: Shared, work: Path, which: Point, say: Callable[[str], None]
) -> list[Point]:
    """Compute all points of a task, layer and seed. Each is stored in a file and computed once."""
    plain = {name: getattr(config, name) for name in COMMON} | {"train": replace(config.train, seed=which["seed"])}
    plain |= {"task": which["task"], "layer": which["layer"]}
    configs = [TaskCodecConfig(**plain, rate_bps=rate) for rate in sorted(config.rates_bps)]
    rows: list[Point] = []
    for fold in range(min(config.folds, settle(configs[0], shared.ready)[0].folds)):
        found, _ = settle(configs[0], shared.ready, fold)
        name = "{task}-{layer}-{seed}".format(**which)
        for kind, make in points(configs, shared, fold, found):
            path = work / f"{name}-{fold}-{kind}.json"
            if not path.is_file():
                results.write_json(path, [{**which, "fold": fold, **point} for point in make()])
            made = results.read_json(path)
            text = ", ".join(f"{p['method']} {p['nominal_bps']:g} bit/s {p['wrong']} of {p['labels']}" for p in made)
            say(f"{name} fold {fold}: wrong {text}")
            rows += made
    return rows


COMMON = ("upstream", "data", "output", "frame_rate", "codebook_dim", "probes", "device")


def _digest(config: ReportConfig, ready: Prepared) -> str:
    """Hash of everything a point depends on except its task, layer, seed, fold and rate."""
    weights = hashlib.sha256((config.upstream / "model.safetensors").read_bytes()).hexdigest()
    parts: list[Any] = [weights, ready.shards.fingerprint, config.frame_rate, config.codebook_dim, config.probes]
    return hashlib.sha256(json.dumps([*parts, asdict(config.train)]).encode()).hexdigest()[:10]
