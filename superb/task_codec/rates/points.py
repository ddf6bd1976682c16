"""Points of a report: errors and bits on the test part of one fold.

Each point has its own head, trained by one procedure (`head_training`). The heads of task codecs and k-means start from
the head of model.

    model         the unmodified model, its states L, L + 1, ...; rate: the base codec's, all codebooks
    all layers    the unmodified model, all of its states
    compress      a bottleneck at a rate, and each smaller number of its codebooks
    codebooks     the model given only the base codec's first codebooks
    tables        the base codec's own embeddings of its first codebooks
    k-means       plain k-means of the same layer, pooled to about the same rate
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from codecssl.superb.task_codec.bottleneck import MOST_BITS
from codecssl.superb.task_codec.examples import Examples
from codecssl.superb.task_codec.head_training import STAGES, Summaries, count_errors, train_head
from codecssl.superb.task_codec.kmeans_baseline import cluster_bottleneck
from codecssl.superb.task_codec.make_codec import Prepared, TaskCodecConfig, build, new_head, settle
from codecssl.superb.task_codec.rates.code_rates import Codes, costs
from codecssl.superb.task_codec.rates.table import Point
from codecssl.superb.task_codec.states import Source, after, batched, first_codebooks, quantised, tables
from codecssl.superb.task_codec.training import BottleneckTraining
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.registry import load_codec_for


class Shared:
    """Cache shared by points: head summaries, which do not depend on the fold, and heads after their first stage."""

    def __init__(self, ready: Prepared) -> None:
        self.ready = ready
        self._summaries: dict[tuple[Any, ...], Summaries] = {}
        self._heads: dict[tuple[Any, ...], Any] = {}

    def summaries(self, config: TaskCodecConfig, found: Examples, source: Source, *key: Any) -> Summaries:
        """Head summaries of a source, cached under the key."""
        if (key := (found.kind, *key)) not in self._summaries:
            states = source(next(iter(found.labels)))
            head = new_head(config, found, states[0].shape[1], len(states))
            self._summaries[key] = Summaries(head, batched(source))
        return self._summaries[key]

    def head(self, config: TaskCodecConfig, found: Examples, summaries: Summaries, *key: Any) -> Any:
        """Return a copy of the key's head after its first stage. Only heads of the last fold are cached."""
        key = (config.task, config.train.seed, found.parts["test"], *key)
        if key not in self._heads:
            if self._heads and next(iter(self._heads))[:3] != key[:3]:
                self._heads.clear()
            first, _ = summaries(found.parts["train"][:1])
            head = new_head(config, found, first.shape[3], first.shape[1])
            train_head(head, summaries, found, config.train, STAGES.index("head"))
            self._heads[key] = head
        return copy.deepcopy(self._heads[key])

    def model_head(self, config: TaskCodecConfig, found: Examples) -> Any:
        """Return the head on the states L, L + 1, ... of the unmodified model."""
        summaries = self.summaries(config, found, after(self.ready.states, config.layer), "model", config.layer)
        return self.head(config, found, summaries, "model", config.layer)


def points(
    configs: Sequence[TaskCodecConfig], shared: Shared, fold: int, found: Examples
) -> Iterator[tuple[str, Callable[[], list[Point]]]]:
    """Names of a fold's points, and functions that compute them. configs: one per rate, otherwise equal."""
    first, card = configs[0], shared.ready.model.card
    yield "model", partial(_model, first, shared, found)
    for config in configs:
        yield f"compress-{config.rate_bps:g}", partial(_task_codec_points, config, shared, fold)
        yield f"k-means-{config.rate_bps:g}", partial(_clusters, config, shared, found)
    for count in sorted({nearest_count(card, config.rate_bps) for config in configs} - {0}):
        yield f"codebooks-{count}", partial(_base, first, shared, found, count)


def nearest_count(card: CodecCard, rate_bps: float) -> int:
    """Number of first codebooks of the base codec nearest to a bit rate. 0 if codebooks differ in codes per frame."""
    if set(card.codes_per_frame) != {1}:
        return 0
    each = np.cumsum([bits * float(card.frame_rate) for bits in card.code_bits])
    return int(np.abs(each - rate_bps).argmin()) + 1


def code_card(base: CodecCard, pool: int, sizes: tuple[int, ...]) -> CodecCard:
    """Codec card of codes at a pooled frame rate."""
    return replace(base, hop_length=base.hop_length * pool, codebook_sizes=sizes, codes_per_frame=(1,) * len(sizes))


# ---------------------------------------------------------------- kinds of points


def _model(config: TaskCodecConfig, shared: Shared, found: Examples) -> list[Point]:
    states, count = shared.ready.states, shared.ready.model.card.num_codebooks
    methods = {
        "model": (after(states, config.layer), "model", config.layer),
        "all layers": (after(states, 0), "model", 0),
    }
    return _base_points(methods, f"{count} codebooks", config, shared, found, count)


def _base(config: TaskCodecConfig, shared: Shared, found: Examples, count: int) -> list[Point]:
    ready, device = shared.ready, config.device
    model = after(first_codebooks(ready.model, ready.shards, count, device), config.layer)
    methods = {
        "codebooks": (model, "codebooks", count, config.layer),
        "tables": (_tables(ready, count, device), "tables", count),
    }
    return _base_points(methods, f"first {count} codebooks", config, shared, found, count)


def _tables(ready: Prepared, count: int, device: str) -> Source:
    embeddings = load_codec_for(ready.model.card, device=device).embeddings()
    return tables(embeddings, ready.shards, count, device)


def _base_points(
    methods: dict[str, tuple[Any, ...]],
    shape: str,
    config: TaskCodecConfig,
    shared: Shared,
    found: Examples,
    count: int,
) -> list[Point]:
    """Points of the base codec's first codebooks. methods: the source and the cache key of each method."""
    ready, card = shared.ready, shared.ready.model.card
    card = replace(card, codebook_sizes=card.codebook_sizes[:count], codes_per_frame=card.codes_per_frame[:count])
    codes = {part: [ready.shards.codes(i)[: card.num_rows] for i in found.parts[part]] for part in ("train", "test")}
    bits, made = costs(codes["train"], codes["test"], card), []
    for method, (source, *key) in methods.items():
        summaries = shared.summaries(config, found, source, *key)
        head = shared.head(config, found, summaries, *key)
        made.append(_point(method, shape, ready, found, _tested(head, summaries, found, config), card, bits))
    return made


def _tested(head: Any, summaries: Summaries, found: Examples, config: TaskCodecConfig) -> tuple[int, int]:
    """Number of errors and labels of the test part, after the head's second stage."""
    train_head(head, summaries, found, config.train, STAGES.index("b"))
    return count_errors(head, summaries, found, "test")


def _task_codec_points(config: TaskCodecConfig, shared: Shared, fold: int) -> list[Point]:
    ready = shared.ready
    found, bit_rate = settle(config, ready, fold)
    training = build(config, ready, found, bit_rate, shared.model_head(config, found))
    training.run(lambda row: None, lambda: None)
    codes, made, size = _codes(training), [], 1 << bit_rate.bits
    for k in range(1, bit_rate.num_codebooks + 1):
        card = code_card(ready.model.card, bit_rate.pool, (size,) * k)
        shape = f"{k} of {bit_rate.num_codebooks} x {size} at {float(card.frame_rate):g} Hz"
        wrong = count_errors(training.head, training.summaries(k), found, "test")
        cut = {part: [rows[:k] for rows in given] for part, given in codes.items()}
        dead = [size - len(np.unique(np.concatenate([rows[i] for rows in codes["train"]]))) for i in range(k)]
        made.append(
            _point("compress", shape, ready, found, wrong, card, costs(cut["train"], cut["test"], card))
            | {"dead_entries": dead}
        )
    return made


def _clusters(config: TaskCodecConfig, shared: Shared, found: Examples) -> list[Point]:
    """k-means with as many centres as the bits of a frame allow, at most 1024. Higher rates are pooled less."""
    ready, base = shared.ready, shared.ready.model.card
    most = settle(config, ready)[1].pool
    bits_of = {pool: int(config.rate_bps * pool / float(base.frame_rate)) for pool in range(1, most + 1)}
    pool = max((pool for pool, bits in bits_of.items() if 1 <= bits <= MOST_BITS), default=1)
    bits = min(bits_of[pool], MOST_BITS)
    bottleneck = cluster_bottleneck(ready.model.config.dim, pool, 1 << bits)
    source = after(ready.states, config.layer)
    training = BottleneckTraining(ready.model, config.layer, bottleneck, None, found, source, config.train)
    training.fit()
    head = shared.model_head(config, found)
    wrong = _tested(head, Summaries(head, quantised(ready.model, config.layer, bottleneck, source)), found, config)
    card = code_card(base, pool, (1 << bits,))
    shape = f"{1 << bits} at {float(card.frame_rate):g} Hz"
    codes = _codes(training)
    return [_point("k-means", shape, ready, found, wrong, card, costs(codes["train"], codes["test"], card))]


def _codes(training: BottleneckTraining) -> dict[str, list[Codes]]:
    """Codes [K, T'] of the training and test utterances."""
    encode, source, parts = training.bottleneck.encode, training.source, training.found.parts
    return {part: [encode(source(i)[0]).cpu().numpy() for i in parts[part]] for part in ("train", "test")}


def _point(
    method: str, shape: str, ready: Prepared, found: Examples, wrong: tuple[int, int], card: CodecCard,
    bits: dict[str, float],
) -> Point:  # fmt: skip
    shards, test = ready.shards, found.parts["test"]
    commonest = Counter(found.labels[i] for i in test).most_common(1)[0][1]
    return {
        "method": method,
        "shape": shape,
        "metric": "per" if found.kind == "ctc" else "accuracy",
        "wrong": wrong[0],
        "labels": wrong[1],
        "nominal_bps": card.bits_per_second,
        "seconds": sum(shards.utterance(i).samples for i in test) / shards.card.sample_rate,
        "test_utterances": len(test),
        "commonest": commonest,
        "apart": found.apart,
        **bits,
    }
