"""`codecssl-superb compress-report`: a task's metric against rate, of codes for the machine and of simpler ones.

Each point has its metric on the test part and three rates of that part's codes (`code_rates.rates`). Points:

    model         the model as it is; rate: the base codec's, all codebooks
    compress      `compress` at a rate, and each smaller number of its codebooks
    codebooks     the model given the base codec's first codebooks alone, with a head of its own
    tables        the base codec's own tables of its first codebooks, with a head of its own
    k-means       plain k-means of the same layer, pooled alike, with a head of its own
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb import results
from codecssl.superb.bottleneck import MOST_BITS
from codecssl.superb.clusters import cluster_bottleneck
from codecssl.superb.code_rates import rates
from codecssl.superb.compress import CompressConfig, Prepared, codes_of, compress, prepare
from codecssl.superb.compress_plot import draw
from codecssl.superb.compress_settings import TrainConfig
from codecssl.superb.compress_source import Kept, Source, first_codebooks, quantised, tables
from codecssl.superb.compress_train import Training, error_rate, train_head
from codecssl.superb.compressed import Compressed, load
from codecssl.superb.heads import HEADS
from codecssl.tokenize.codec import CodecCard, load_codec_for
from codecssl.tokenize.errors import UserError

Point = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which points; the rest is `CompressConfig`'s."""

    upstream: Path
    data: Path
    output: Path
    layers: tuple[int, ...]
    task: str
    rates_bps: tuple[float, ...] = (50.0, 100.0, 200.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    frame_rate: float | None = None
    codebook_dim: int = 16
    probes: str = "probes"
    device: str = "cpu"
    train: TrainConfig = field(default_factory=TrainConfig)


def report(config: ReportConfig, say: Callable[[str], None] = print) -> list[Path]:
    """Compute the points that are missing; write results.jsonl, report.md and report.png in the output."""
    if config.task == "none":
        raise UserError("task none: has no metric to report; give a task")
    rows: list[Point] = []
    for seed in config.seeds:
        for layer in config.layers:
            rows += _one(config, layer, seed, say)
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    results.write_text(config.output / "results.jsonl", lines)
    text = ["# Task metric against rate", "", *markdown(summary(rows)), "", NOTE, ""]
    results.write_text(config.output / "report.md", "\n".join(text))
    draw(config.output / "report.png", summary(rows), config.task)
    return [config.output / name for name in ("results.jsonl", "report.md", "report.png")]


def _one(config: ReportConfig, layer: int, seed: int, say: Callable[[str], None]) -> list[Point]:
    """All points of a layer and a seed; each is a file, so that it is computed once."""
    plain = asdict(config)
    shared = {k: v for k, v in plain.items() if k not in ("layers", "rates_bps", "seeds", "train", "output")}
    train = replace(config.train, seed=seed)
    work = config.output / "work"
    configs = [
        CompressConfig(**shared, output=work / f"{_digest(config)}-{layer}-{seed}-{rate:g}", layer=layer,
                       rate_bps=rate, train=train)
        for rate in config.rates_bps
    ]  # fmt: skip
    rows, ready = [], _Ready(configs[0])
    for name, make in _points(configs, ready, say):
        path = work / "points" / f"{_digest(config)}-{layer}-{seed}-{name}.json"
        if not path.is_file():
            head = {"layer": layer, "seed": seed, "task": config.task, "upstream": config.upstream.resolve().name}
            results.write_json(path, [{**head, **point} for point in make()])
        found = results.read_json(path)
        rows += found
        for point in found:
            say(f"layer {layer}  seed {seed}  {point['method']}  {point['nominal_bps']:g} bit/s  {_metric(point)}")
    return rows


def _digest(config: ReportConfig) -> str:
    """Of all that a point depends on beside its layer, rate and seed."""
    weights = hashlib.sha256((config.upstream / "model.safetensors").read_bytes()).hexdigest()
    data = config.data / "dataset.json" if (config.data / "dataset.json").is_file() else config.data
    what = data.read_text() if data.is_file() else str(data.resolve())
    parts = [weights, what, config.task, config.frame_rate, config.codebook_dim, config.probes]
    return hashlib.sha256(json.dumps([*parts, asdict(config.train)]).encode()).hexdigest()[:10]


class _Ready:
    """What `prepare` gives, made when first needed."""

    def __init__(self, config: CompressConfig) -> None:
        self.config = config
        self._found: Prepared | None = None

    def __call__(self) -> Prepared:
        if self._found is None:
            self._found = prepare(self.config)
        return self._found


def _points(
    configs: Sequence[CompressConfig], ready: _Ready, say: Callable[[str], None]
) -> Iterator[tuple[str, Callable[[], list[Point]]]]:
    for config in configs:
        yield f"compress-{config.rate_bps:g}", lambda config=config: _compressed(config, ready(), say)  # type: ignore[misc]
    for config in configs:
        yield f"codebooks-{config.rate_bps:g}", lambda config=config: _base(config, ready())  # type: ignore[misc]
        yield f"k-means-{config.rate_bps:g}", lambda config=config: _clusters(config, ready())  # type: ignore[misc]


# ---------------------------------------------------------------- kinds of points


def _compressed(config: CompressConfig, ready: Prepared, say: Callable[[str], None]) -> list[Point]:
    made = compress(config, report=say)["training"]
    model, shards, parts = load(config.output).to(config.device), ready.shards, ready.found.parts
    train, test = (codes_of(model, shards, parts[part], config.device) for part in ("train", "test"))
    points = [_whole(ready, made["test_error_unquantised"])]
    for k, error in enumerate(made["test_error_by_codebooks"], 1):
        card = code_card(ready.model.card, model.pool, (made["entries"],) * k)
        shape = f"{k} of {len(made['used_entries'])} x {made['entries']} at {float(card.frame_rate):g} Hz"
        found = rates([c[:k] for c in train], [c[:k] for c in test], card, tested_seconds(ready))
        more = {"dead_entries": made["dead_entries"][:k], "asked_bps": config.rate_bps}
        points.append(_point("compress", shape, ready, error, found) | more)
    return points


def tested_seconds(ready: Prepared) -> float:
    """Of the test part, by the base codec's frames."""
    frames = sum(int(ready.shards.frames[i]) for i in ready.found.parts["test"])
    return frames / float(ready.model.card.frame_rate)


def code_card(base: CodecCard, pool: int, sizes: tuple[int, ...]) -> CodecCard:
    """A card for counting codes at a pooled rate."""
    return replace(base, hop_length=base.hop_length * pool, codebook_sizes=sizes, codes_per_frame=(1,) * len(sizes))


def _whole(ready: Prepared, error: float) -> Point:
    return _point("model", f"{ready.model.card.num_codebooks} codebooks", ready, error, _base_rates(ready, None))


def _base_rates(ready: Prepared, count: int | None) -> dict[str, float]:
    """Rates of the base codec's first codebooks."""
    card, parts = ready.model.card, ready.found.parts
    kept = card.num_codebooks if count is None else count
    card = replace(card, codebook_sizes=card.codebook_sizes[:kept], codes_per_frame=card.codes_per_frame[:kept])
    train, test = ([ready.shards.codes(i)[: card.num_rows] for i in parts[part]] for part in ("train", "test"))
    return rates(train, test, card, tested_seconds(ready))


def _base(config: CompressConfig, ready: Prepared) -> list[Point]:
    """The base codec's first codebooks, as many as come nearest to the rate."""
    card, device = ready.model.card, config.device
    if set(card.codes_per_frame) != {1}:
        return []
    each = np.cumsum([bits * float(card.frame_rate) for bits in card.code_bits])
    count = int(np.abs(each - config.rate_bps).argmin()) + 1
    found = _base_rates(ready, count)
    model = first_codebooks(ready.model, ready.shards, config.layer, count, device)
    own = tables(load_codec_for(card, device=device).embeddings(), ready.shards, count, device)
    return [
        _point(name, f"first {count} codebooks", ready, _own_head(config, ready, source), found)
        | {"asked_bps": config.rate_bps}
        for name, source in (("codebooks", model), ("tables", own))
    ]


def _clusters(config: CompressConfig, ready: Prepared) -> list[Point]:
    """k-means with as many centres as a frame's bits allow, 1024 at most."""
    base, found = ready.model.card, ready.found
    pool = ready.rate.pool
    bits = min(MOST_BITS, int(config.rate_bps / float(ready.rate.frame_rate)))
    bottleneck = cluster_bottleneck(ready.model.config.dim, pool, 1 << bits)
    training = Training(ready.model, config.layer, bottleneck, None, found, ready.source, config.train)
    training._fit()
    model = Compressed(ready.model, config.layer, bottleneck, None, ()).eval()
    error = _own_head(config, ready, quantised(model, ready.shards, 1, config.device))
    train, test = (codes_of(model, ready.shards, found.parts[part], config.device) for part in ("train", "test"))
    card = code_card(base, pool, (1 << bits,))
    shape = f"{1 << bits} at {float(card.frame_rate):g} Hz"
    return [
        _point("k-means", shape, ready, error, rates(train, test, card, tested_seconds(ready)))
        | {"asked_bps": config.rate_bps}
    ]


def _own_head(config: CompressConfig, ready: Prepared, source: Source) -> float:
    """Test error of a head trained on a source, as long as stage head and stage B together."""
    import torch

    kept, found = Kept(source), ready.found
    first = kept(found.parts["train"][0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        head = HEADS[found.kind](first[0].shape[1], len(first), len(found.names)).to(config.device)
    steps = config.train.head_steps + config.train.b_steps
    train_head(head, kept, found, replace(config.train, head_steps=steps))
    return error_rate(head, kept, found, "test")


def _point(method: str, shape: str, ready: Prepared, error: float, found: dict[str, float]) -> Point:
    kind = ready.found.kind
    metric = {"per": error} if kind == "ctc" else {"accuracy": 1 - error}
    apart = {"apart": ready.found.apart, "test_utterances": len(ready.found.parts["test"])}
    return {"method": method, "shape": shape, "error": error, **metric, **found, **apart}


# ---------------------------------------------------------------- the table


NOTE = (
    "Mean and deviation over seeds; a seed draws parts, weights and batches. Rates are of the test part's codes. "
    "Nominal: bits of a code. Cross-entropy: under counts of the training part. Stored: compressed shards, the streams "
    "and their tables. Of model, the rate is that of all the base codec's codebooks, and relative is 100 by definition."
)


def summary(rows: Sequence[Point]) -> list[Point]:
    """Points of one method, shape and layer over seeds; `relative` is the share of the model's accuracy that is kept
    (mean over seeds), of phone error rates the difference in points.
    """
    groups: dict[tuple[Any, ...], dict[int, Point]] = {}
    for row in rows:
        key = (row["layer"], row["method"], row["shape"], round(row["nominal_bps"], 3))
        groups.setdefault(key, {})[row["seed"]] = row
    whole = {(r["layer"], r["seed"]): r for r in rows if r["method"] == "model"}
    return [_group(key, list(group.values()), whole) for key, group in sorted(groups.items(), key=lambda g: g[0][3])]


def _group(key: tuple[Any, ...], rows: list[Point], whole: dict[tuple[int, int], Point]) -> Point:
    means = {name: float(np.mean([row[name] for row in rows])) for name in RATES}
    metric = "per" if "per" in rows[0] else "accuracy"
    values = [row[metric] for row in rows]
    references = [whole[row["layer"], row["seed"]][metric] for row in rows if (row["layer"], row["seed"]) in whole]
    relative = None
    if len(references) == len(rows):
        ratios = [v - r if metric == "per" else v / max(r, 1e-9) for v, r in zip(values, references, strict=True)]
        relative = float(np.mean(ratios))
    return {
        "layer": key[0], "method": key[1], "shape": key[2], **means, "metric": metric,
        "mean": float(np.mean(values)), "deviation": float(np.std(values)), "relative": relative, "seeds": len(rows),
    }  # fmt: skip


RATES = ("nominal_bps", "cross_entropy_bps", "stored_bps", "streams_bps")


def markdown(points: Sequence[Point]) -> list[str]:
    """The table."""
    metric = points[0]["metric"] if points else "accuracy"
    kept = "points over model" if metric == "per" else "% of model"
    header = ["layer", "method", "codes", "nominal bit/s", "cross-entropy bit/s", "stored bit/s", "streams alone bit/s"]
    header += [f"{metric} %", "± seeds", kept, "seeds"]
    rows = [header, ["---"] * len(header)]
    for point in points:
        relative = "-" if point["relative"] is None else f"{100 * point['relative']:.1f}"
        row = [str(point["layer"]), point["method"], point["shape"], *(f"{point[name]:.1f}" for name in RATES)]
        rows.append(
            [*row, *(f"{100 * point[key]:.1f}" for key in ("mean", "deviation")), relative, str(point["seeds"])]
        )
    return [f"| {' | '.join(row)} |" for row in rows]


def _metric(point: Point) -> str:
    name = "per" if "per" in point else "accuracy"
    return f"{name} {100 * point[name]:.2f} %"
