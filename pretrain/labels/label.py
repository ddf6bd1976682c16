"""`codecssl-pretrain label`: k-means labels of a model's layer, the codec's latents or MFCCs, or labels from a file.

    LABELS/               a folder of token shards, one stream of labels for each frame of the data
    LABELS/clustering.safetensors   the centroids; --clustering FILE labels other data with them
    LABELS/report.json    inertia, cluster usage, and phone purity and PNMI where the data has phones with times
    LABELS/label.json     the settings: the same command resumes, a different one is refused

With several data folders there are LABELS/0-NAME, LABELS/1-NAME, ...: one label folder for each, in order. Several
tasks (--tasks, --task) share the shards. The task that finds the last shard finished writes dataset.json and
report.json.
"""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.pretrain.data.hashed_random import permuted, smallest, uniform
from codecssl.pretrain.export.shipped import model_folder
from codecssl.pretrain.labels.cepstra import CepstralExtractor
from codecssl.pretrain.labels.clustering import Clustering, Features, Quality, fit
from codecssl.pretrain.labels.labellers import ByCentroids, Extractor, FeatureSource, FromFile, Labeller, Normalised
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.command_line import progress_bar
from codecssl.tokenize.common.errors import UserError, check_share
from codecssl.tokenize.common.files import alone_in, names_in, refuse_links_out, write_atomic
from codecssl.tokenize.common.hashing import file_sha256
from codecssl.tokenize.format.layout import shard_path
from codecssl.tokenize.registry import check_device
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.write_codes import Item, finish_written, write_shard

_SAMPLE, _FRAMES = 210, 211  # streams of random numbers
_SHARD_UTTERANCES = 8192
CENTROIDS, PLAN, REPORT = "clustering.safetensors", "label.json", "report.json"
_COUNTS = "counts"
"""Folder of each shard's contribution to the report, until the report is written."""


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """Settings of `codecssl-pretrain label`."""

    source: str
    """A run or model folder, `latents`, `mfcc`, or a .jsonl of labels."""
    data: tuple[Path, ...]
    output: Path
    layer: int = -1
    """0 is the input of the first layer, L the output of the last; negative counts from the end."""
    cmvn: bool = False
    """Normalise the features of each utterance to mean 0 and deviation 1, see `labellers.normalised`."""
    clusters: int = 500
    sample_frames: int = 300_000
    """Number of frames to which the clustering is fitted."""
    utterance_frames: int | None = None
    """Maximum number of sampled frames per utterance, at random positions (EnCodecMAE's self-training: one from each of
    10,000 utterances)."""
    clustering: Path | None = None
    """File of centroids to use instead of fitting new ones."""
    device: str = "cpu"
    seed: int = 0
    tasks: int = 1
    task: int = 0
    """Index of this process's task. It labels every tasks-th shard, starting with number `task`."""

    def __post_init__(self) -> None:
        if not 2 <= self.clusters <= 1 << 16:
            raise UserError(f"--clusters {self.clusters}: must be from 2 to 65536")
        if self.cmvn and self.source.endswith(".jsonl"):
            raise UserError(f"--cmvn: normalises features, but {self.source} has labels; remove it")
        if self.sample_frames < self.clusters:
            raise UserError(f"--sample-frames {self.sample_frames}: must be at least --clusters ({self.clusters})")
        if self.utterance_frames is not None and self.utterance_frames < 1:
            raise UserError(f"--utterance-frames {self.utterance_frames}: must be at least 1")
        check_share(self.tasks, self.task)
        check_device(self.device)
        if not self.data:
            raise UserError("--data: no shard folder given")


@dataclass(frozen=True)
class _Part:
    """A label shard to be made from one data folder."""

    shards: Shards
    """Shards of the data."""
    folder: Path
    """Folder of the labels."""
    shard: int
    counts: Path
    """File of the shard's contribution to the report."""

    @property
    def utterances(self) -> range:
        first = self.shard * _SHARD_UTTERANCES
        return range(first, min(first + _SHARD_UTTERANCES, len(self.shards)))

    @property
    def done(self) -> bool:
        return shard_path(self.folder, self.shard).with_suffix(".json").exists()


def label(config: LabelConfig, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """Write this task's label shards and return the contents of report.json.

    Returns None while shards of other tasks are missing. The same command resumes after it was killed. Raises UserError
    for data of several codecs, an output folder with other contents or other settings, and a source that does not fit
    the data.
    """
    data = [Shards(path) for path in config.data]
    for other in data[1:]:
        if other.card.fingerprint != data[0].card.fingerprint:
            raise UserError(f"{other.path}: codec {other.card.name}, {data[0].path} has {data[0].card.name}")
    if config.output.exists() and names_in(config.output) and not (config.output / PLAN).exists():
        raise UserError(f"{config.output}: is not empty; remove it, or give another --output")
    refuse_links_out(config.output)
    with alone_in(config.output, f".{config.task}-of-{config.tasks}.lock"):
        with _one_task(config, "start"):
            source = _source(config, data[0].card)
            _open_plan(config, data, source.made_of)
        if not (config.output / REPORT).exists():
            try:
                if not _label_all(config, data, source, say):
                    return None
            except FileNotFoundError as error:
                if not Path(error.filename or "").is_relative_to(config.output):
                    raise
                raise UserError(
                    f"{config.output}: another process is at work on the same shards ({error.filename} is gone); give"
                    " all the same --tasks and each its own --task, then run the same command again"
                ) from error
        shutil.rmtree(config.output / _COUNTS, ignore_errors=True)
    report: dict[str, Any] = json.loads((config.output / REPORT).read_text())
    return report


def _label_all(
    config: LabelConfig, data: Sequence[Shards], source: FeatureSource | FromFile, say: Callable[[str], None]
) -> bool:
    """Label this task's shards. Return True if the shards of all tasks, and the report, are complete."""
    labeller: Labeller = source if isinstance(source, FromFile) else ByCentroids(
        source, _clustering(config, data, source, say))  # fmt: skip
    parts = _parts(config, data)
    _label(parts[config.task :: config.tasks], labeller)
    if not all(part.done for part in parts):
        return False
    with _one_task(config, "finish"):
        if not (config.output / REPORT).exists():
            _finish(config, data, parts, labeller)
    return True


def _open_plan(config: LabelConfig, data: Sequence[Shards], made_of: dict[str, str]) -> None:
    """Check or write label.json, the settings that must be the same for every task and every start."""
    plan: dict[str, Any] = {key: value for key, value in made_of.items() if key != "source"}
    plan["data"] = [shards.fingerprint for shards in data]
    if not config.source.endswith(".jsonl"):
        plan |= {key: getattr(config, key) for key in ("clusters", "sample_frames", "utterance_frames", "seed")}
        plan["clustering"] = config.clustering and file_sha256(config.clustering)
    path = config.output / PLAN
    if not path.exists() or (config.tasks == 1 and not _has_begun(config)):  # a failed start may be corrected
        write_atomic(path, json.dumps(plan, indent=1).encode())
        return
    begun = json.loads(path.read_text())
    for key in plan | begun:
        if begun.get(key) != plan.get(key):
            raise UserError(
                f"{config.output}: was begun with {key} {begun.get(key)}, this is {plan.get(key)}; give the same, or"
                " another --output"
            )


def _has_begun(config: LabelConfig) -> bool:
    kept = (config.output / name for name in (CENTROIDS, REPORT))
    return any(path.exists() for path in kept) or any((config.output / _COUNTS).glob("*.npz"))


def _one_task(config: LabelConfig, name: str) -> AbstractContextManager[None]:
    """Hold a lock that serialises this work among tasks."""
    return alone_in(config.output, f".{name}.lock", wait=True) if config.tasks > 1 else nullcontext()


def _source(config: LabelConfig, card: CodecCard) -> FeatureSource | FromFile:
    """Open the source of the labels.

    A run is exported once into the label folder first, because later checkpoints would give other labels.
    """
    if config.source.endswith(".jsonl"):
        return FromFile(Path(config.source))
    source = CepstralExtractor(card) if config.source == "mfcc" else _extractor(config, card)
    return Normalised(source) if config.cmvn else source


def _extractor(config: LabelConfig, card: CodecCard) -> Extractor:
    """Open a model, or the codec's latents. A run is exported once into the label folder."""
    path, made = model_folder(config.source), config.source
    if config.source != "latents" and not (path / "model.safetensors").exists():
        from codecssl.pretrain.export.export import export, is_export_of
        from codecssl.pretrain.run_folder import read_config

        read_config(path)
        target = config.output.with_name(f"{config.output.name}.model")
        if not (_has_begun(config) and (target / "config.json").exists()) and not is_export_of(path, target):
            export(path, target)
        made = str(target)
    return Extractor(made, config.layer, card, device=config.device)


def _parts(config: LabelConfig, data: Sequence[Shards]) -> list[_Part]:
    """Return all label shards, in order."""
    return [
        _Part(shards, folder, shard, config.output / _COUNTS / f"{number}-{shard:05d}.npz")
        for number, (folder, shards) in enumerate(zip(_folders(config), data, strict=True))
        for shard in range(_shard_count(shards))
    ]


def _shard_count(shards: Shards) -> int:
    return -(-len(shards) // _SHARD_UTTERANCES)


def _folders(config: LabelConfig) -> list[Path]:
    if len(config.data) == 1:
        return [config.output]
    return [config.output / f"{i}-{path.name}" for i, path in enumerate(config.data)]


# ---------------------------------------------------------------- centroids


def _clustering(
    config: LabelConfig, data: Sequence[Shards], extract: FeatureSource, say: Callable[[str], None]
) -> Clustering:
    kept = config.output / CENTROIDS
    with _one_task(config, "clustering"):
        if kept.exists():
            return _given(kept, extract)
        found = _given(config.clustering, extract) if config.clustering else _fitted(config, data, extract, say)
        found.save(kept)
        return found


def _fitted(
    config: LabelConfig, data: Sequence[Shards], extract: FeatureSource, say: Callable[[str], None]
) -> Clustering:
    say(f"fitting {config.clusters} clusters to {config.sample_frames} frames")
    batches = _sampled(config, data, extract)
    return Clustering(fit(batches, config.clusters, frames=config.sample_frames, seed=config.seed), extract.made_of)


def _given(path: Path, extract: FeatureSource) -> Clustering:
    given = Clustering.load(path)
    for key in ("layer", "weights_sha256"):
        if given.made_of.get(key) != extract.made_of[key]:
            raise UserError(
                f"{path}: made of {key} {given.made_of.get(key)}, this is {extract.made_of[key]};"
                " give the source that it was made of"
            )
    return given


def _sampled(config: LabelConfig, data: Sequence[Shards], extract: FeatureSource) -> Iterator[Features]:
    """Yield features of utterances in random order, each once."""
    first = np.cumsum([0, *(len(shards) for shards in data)])
    total = int(first[-1])
    for begin in range(0, total, 1 << 16):
        for index in permuted(np.arange(begin, min(begin + (1 << 16), total)), total, config.seed, _SAMPLE).tolist():
            folder = int(np.searchsorted(first, index, side="right")) - 1
            [features] = extract.features(data[folder], [index - int(first[folder])])
            if not (frames := len(features)):
                continue
            most = np.array([config.utterance_frames or frames])
            yield features[smallest(uniform(config.seed, _FRAMES, index, np.arange(frames))[None], most)[0]]


# ---------------------------------------------------------------- shards


def _label(parts: Sequence[_Part], labeller: Labeller) -> None:
    done = itertools.count(1 + sum(len(part.utterances) for part in parts if part.done))
    total = sum(len(part.utterances) for part in parts)
    with progress_bar("utterances") as bar:
        for part in parts:
            if not part.done:
                _label_shard(part, labeller, lambda: bar(next(done), total, ""))


def _label_shard(part: _Part, labeller: Labeller, on_progress: Callable[[], object]) -> None:
    """Label one shard.

    Its contribution to the report is written first. Every finished shard therefore has one.
    """
    quality, items = Quality(labeller.classes), list[Item]()
    rate = float(part.shards.card.frame_rate)
    for index, labels, distance in labeller(part.shards, part.utterances):
        utterance = part.shards.utterance(index)
        quality.add(labels, distance)
        quality.add_phones(labels, _phones(utterance.labels, rate, len(labels)))
        items.append((utterance.id, labels[None, :], {}))
        on_progress()
    quality.save(part.counts)
    write_shard(part.folder, part.shard, _card(part.shards, labeller), items)


def _phones(labels: dict[str, Any], frame_rate: float, frames: int) -> list[tuple[str, int, int]]:
    """Convert the `phones` rows [phone, start, end in seconds] to (phone, first frame, frame after the last)."""
    rows = labels.get("phones")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 3 for row in rows):
        return []
    bounds = [(str(p), round(float(a) * frame_rate), round(float(b) * frame_rate)) for p, a, b in rows]
    return [(phone, min(a, frames), min(b, frames)) for phone, a, b in bounds]


def _card(shards: Shards, labeller: Labeller) -> CodecCard:
    """Build the card of the labels of these shards."""
    return CodecCard(
        name="labels",
        weights=labeller.made_of["source"],
        weights_sha256=labeller.digest,
        sample_rate=shards.card.sample_rate,
        hop_length=shards.card.hop_length,
        codebook_sizes=(labeller.classes,),
        codes_per_frame=(1,),
        latent_dim=1,
        policies={"labels_of": shards.fingerprint},
    )


def _finish(config: LabelConfig, data: Sequence[Shards], parts: Sequence[_Part], labeller: Labeller) -> None:
    """Write dataset.json of every folder, then report.json, which marks completion."""
    quality = Quality(labeller.classes)
    for part in parts:
        quality.add_saved(part.counts)
    for folder, shards in zip(_folders(config), data, strict=True):
        folder.mkdir(exist_ok=True)
        finish_written(folder, _card(shards, labeller), _shard_count(shards))
    report = {"made_of": dict(sorted(labeller.made_of.items())), **quality.report()}
    write_atomic(config.output / REPORT, json.dumps(report, indent=1).encode())
