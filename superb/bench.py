"""`codecssl-superb bench`: seconds of one training epoch with and without the caches, interleaved in one process.

An epoch is that of s3prl: its dataset loads each wave of the training set once, with its batches, head, loss, gradients
and optimiser. The upstream is `codes`: among codec models it has the least work next to the codec.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from codecssl.superb.corpora.corpus import TaskCorpus
from codecssl.superb.patches import import_patches
from codecssl.superb.runner.csvs import write_csvs
from codecssl.superb.runner.problems import make_problem
from codecssl.superb.tasks import Task, choose, official_config
from codecssl.superb.tokens.codec_at_16khz import encode
from codecssl.superb.tokens.fill import CacheJob, fill
from codecssl.superb.tokens.token_cache import CachedCodec, TokenCache
from codecssl.superb.tokens.waves import waves_of
from codecssl.superb.upstreams.codec_upstream import CodecUpstream, CodeTables
from codecssl.superb.upstreams.feature_cache import CachedUpstream
from codecssl.tokenize.codec import Codec
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

HUB_NAME = "codecssl_bench"
HEADS = ("ks", "sid", "ic", "er", "env", "inst", "pitch")
"""Tasks with a pooled linear head: one training batch is one step."""
WAYS = ("no cache", "token cache", "feature cache")
"""The last one from its second epoch on."""


@dataclass(frozen=True, kw_only=True)
class SuperbBenchConfig:
    """Settings of `codecssl-superb bench`."""

    codec: str
    tasks: str
    utterances: int
    rounds: int
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("utterances", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: at least 1")
        if other := [task.name for task in choose(self.tasks) if task.name not in HEADS]:
            raise UserError(f"task {other[0]}: bench runs one of {', '.join(HEADS)}")


def run(config: SuperbBenchConfig, corpus: TaskCorpus) -> list[dict[str, Any]]:
    """Return a row per task: audio, seconds of the fastest epoch of each variant, and the use of the caches."""
    import_patches.install()
    torch.set_num_threads(config.threads)
    codec = load_codec(config.codec)
    with tempfile.TemporaryDirectory() as folder:
        return [_measure(config, codec, task, corpus, Path(folder) / task.name) for task in choose(config.tasks)]


def _measure(config: SuperbBenchConfig, codec: Codec, task: Task, corpus: TaskCorpus, folder: Path) -> dict[str, Any]:
    splits = _fewer(corpus.select(task).splits, config.utterances)
    waves = waves_of(task, {"train": splits["train"]})
    began = time.perf_counter()
    fill(CacheJob(root=folder, name=task.name, waves=waves, card=codec.card, load=lambda: codec))
    filling = time.perf_counter() - began
    upstreams = _upstreams(codec, folder)
    epochs = {way: _epoch(task, splits, corpus, folder / way, upstream) for way, upstream in upstreams.items()}
    for way in WAYS:  # libraries load, torch plans its kernels; the feature cache is filled
        epochs[way](None if way == "feature cache" else 1)
    took = {way: (float("inf"), float("inf")) for way in WAYS}
    for _ in range(config.rounds):
        for way in WAYS:
            took[way] = min(took[way], _seconds(epochs[way]))
    counts = upstreams["token cache"].codes.counts
    audio = sum(len(wave) for w in waves if (wave := w.load()) is not None) / 16_000
    return {
        "task": task.name,
        "codec": codec.card.name,
        "utterances": len(splits["train"]),
        "audio_seconds": round(audio, 1),
        "threads": torch.get_num_threads(),
        "fill_seconds": round(filling, 3),
        "epoch_seconds": {way: round(seconds, 3) for way, (seconds, _) in took.items()},
        "epoch_cpu_seconds": {way: round(seconds, 3) for way, (_, seconds) in took.items()},
        "times_faster": {way: round(took["no cache"][0] / took[way][0], 2) for way in WAYS[1:]},
        "token_cache": counts,
    }


def _fewer(splits: dict[str, list[Any]], count: int) -> dict[str, list[Any]]:
    """Select at most `count` items of each split, evenly spaced: labels keep their proportions."""
    return {split: [all_[i * len(all_) // min(count, len(all_))] for i in range(min(count, len(all_)))]
            for split, all_ in splits.items()}  # fmt: skip


def _upstreams(codec: Codec, folder: Path) -> dict[str, Any]:
    """Build the upstream without a cache, with the token cache and with the feature cache, each in its own memory."""

    def expert(cache: TokenCache | None) -> CodecUpstream:
        codes = CachedCodec(lambda wavs: encode(codec, wavs), cache, limit_bytes=0)
        return CodecUpstream(codec.card, codes, CodeTables([table.cpu() for table in codec.embeddings()]))

    cached = TokenCache(folder, codec.card)
    ways = {"no cache": expert(None), "token cache": expert(cached)}
    return {**ways, "feature cache": CachedUpstream(expert(cached), 4 << 30)}


def _epoch(task: Task, splits: Any, corpus: TaskCorpus, folder: Path, upstream: Any) -> Callable[[int | None], None]:
    """Prepare s3prl's task on `upstream`. The returned function trains on the given number of batches, or on all."""
    import pickle

    import pandas
    import s3prl.hub
    from torch.utils.data import DataLoader

    folder.mkdir(parents=True)
    setattr(s3prl.hub, HUB_NAME, lambda **options: upstream)
    config, csvs = official_config(task), write_csvs(task, splits, folder, corpus)
    problem = make_problem(task, csvs)
    tables = [str(csvs["train"]), str(csvs["valid"]), [str(csvs["test"])]]
    path = folder / "encoder.pkl"
    problem.build_encoder({}, str(folder), str(folder), *tables)
    labels = pickle.loads(path.read_bytes())  # s3prl's own format, written the line before
    dataset = problem.build_dataset(config["build_dataset"], folder, folder, "train", csvs["train"], path, 320)
    model = problem.build_model(
        config["build_model"], len(labels), {"name": HUB_NAME}, config["build_featurizer"], config["build_downstream"]
    )
    head = problem.build_task(config["build_task"], model, labels, pandas.read_csv(csvs["valid"]))
    optimiser = problem.build_optimizer(config["build_optimizer"], head.parameters())
    size, collate = config["build_batch_sampler"]["train"]["batch_size"], problem.build_collate_fn({}, "train")
    batches = DataLoader(dataset, batch_size=size, collate_fn=collate)

    def epoch(count: int | None) -> None:
        head.train()
        for batch in islice(batches, count):
            loss, _ = head("train", **batch)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    return epoch


def _seconds(epoch: Callable[[int | None], None]) -> tuple[float, float]:
    """Wall-clock seconds and CPU seconds of all cores."""
    clock, cores = time.perf_counter(), time.process_time()
    epoch(None)
    return time.perf_counter() - clock, time.process_time() - cores


def console_table(rows: Sequence[dict[str, Any]]) -> Any:
    """Format the rows as a table for the console."""
    from rich.table import Table

    table = Table("task", "codec", "audio, s", "no cache, s", "token cache, s", "feature cache, s", "filling once, s")
    for row in rows:
        cells = [f"{row['epoch_seconds']['no cache']:.2f}"]
        cells += [f"{row['epoch_seconds'][way]:.2f} ({row['times_faster'][way]:.1f}x)" for way in WAYS[1:]]
        audio = f"{row['audio_seconds']:.1f} in {row['utterances']}"
        table.add_row(row["task"], row["codec"], audio, *cells, f"{row['fill_seconds']:.2f}")
    return table


def as_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Format as JSON, one line per task."""
    return "\n".join(json.dumps(row) for row in rows)
