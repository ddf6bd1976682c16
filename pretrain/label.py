"""`codecssl-pretrain label`: k-means labels of any layer of a model, of the codec's latents, or labels from a file.

    LABELS/               a folder of token shards, one stream of labels for each frame of the data
    LABELS/clustering.safetensors   the centroids; --clustering FILE labels other data with them
    LABELS/report.json    inertia, cluster usage, and phone purity and PNMI where the data has phones with times

With several data folders there are LABELS/0-NAME, LABELS/1-NAME, ...: one label folder for each, in order.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from codecssl.pretrain.chance import permuted, smallest, uniform
from codecssl.pretrain.cluster import Clustering, Features, Quality, fit
from codecssl.pretrain.corpus import with_codebooks
from codecssl.tokenize.codec import CodecCard, check_device, file_sha256, load_codec_for
from codecssl.tokenize.errors import UserError
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.weights import state_sha256
from codecssl.tokenize.writer import write_shards

_SAMPLE, _FRAMES = 210, 211  # streams of random numbers
_BATCH_FRAMES = 8_000
CENTROIDS = "clustering.safetensors"


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """What `codecssl-pretrain label` was asked for."""

    source: str
    """A run or model folder, `latents`, or a .jsonl of labels."""
    data: tuple[Path, ...]
    output: Path
    layer: int = -1
    """0 is the input of the first layer, L the output of the last; negative counts from the end."""
    clusters: int = 500
    sample_frames: int = 300_000
    """Frames that the clustering is fitted to."""
    utterance_frames: int | None = None
    """Most of them from one utterance, at random places (EnCodecMAE's self-training: one from each of 10,000)."""
    clustering: Path | None = None
    """Use these centroids instead of fitting any."""
    codec_weights: str | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.clusters <= 1 << 16:
            raise UserError(f"--clusters {self.clusters}: must be from 2 to 65536")
        if self.sample_frames < self.clusters:
            raise UserError(f"--sample-frames {self.sample_frames}: must be at least --clusters ({self.clusters})")
        if self.utterance_frames is not None and self.utterance_frames < 1:
            raise UserError(f"--utterance-frames {self.utterance_frames}: must be at least 1")
        check_device(self.device)
        if not self.data:
            raise UserError("--data: no shard folder given")


class Extractor:
    """Codes of some utterances in, the features of each out."""

    def __init__(self, config: LabelConfig, card: CodecCard) -> None:
        self.device = torch.device(config.device)
        self.num_codebooks = card.num_codebooks
        """How many of the data's codebooks it reads: a model may have been trained on the first few."""
        self.tables: list[torch.Tensor] = []
        self.made_of = {"source": config.source, "layer": str(config.layer), "codec": card.name}
        if config.source == "latents":
            self.tables = [t.to(self.device) for t in load_codec_for(card, weights=config.codec_weights).embeddings()]
            self.made_of |= {"layer": "latents", "weights_sha256": card.weights_sha256}
            return
        from codecssl.pretrain.export import load_pretrained

        self.model = load_pretrained(_model_folder(config)).to(self.device)
        states = self.model.config.layers + 1
        if not -states <= config.layer < states:
            raise UserError(f"--layer {config.layer}: {config.source} has 0 to {states - 1}, or -1 to -{states}")
        card = with_codebooks(card, min(card.num_codebooks, self.model.card.num_codebooks))
        if self.model.card.fingerprint != card.fingerprint:
            raise UserError(
                f"{config.source}: trained on codec {self.model.card.name}, the data is of {card.name}"
                f" ({self.model.card.difference(card)})"
            )
        self.num_codebooks = card.num_codebooks
        self.layer = config.layer % states
        self.made_of |= {"layer": str(self.layer), "weights_sha256": state_sha256(self.model)}

    @torch.no_grad()
    def __call__(self, codes: Sequence[npt.NDArray[np.uint16]]) -> list[Features]:
        """[R, T_i] each -> [T_i, D] each."""
        if self.tables:
            return [self._latents(torch.from_numpy(c.astype(np.int64)).to(self.device)) for c in codes]
        frames = [c.shape[1] for c in codes]
        padded = torch.zeros(len(codes), codes[0].shape[0], max(frames), dtype=torch.int64)
        for row, item in zip(padded, codes):
            row[:, : item.shape[1]] = torch.from_numpy(item.astype(np.int64))
        hidden = self.model.extract(padded.to(self.device), frames)[self.layer].float().cpu().numpy()
        return [hidden[i, :n] for i, n in enumerate(frames)]

    def _latents(self, codes: torch.Tensor) -> Features:
        """[R, T] -> [T, D], the codec's dequantised latent."""
        summed = torch.stack([table[row] for table, row in zip(self.tables, codes)]).sum(0)
        found: Features = summed.float().cpu().numpy()
        return found


def label(config: LabelConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the label folders; return what report.json says.

    Raises UserError for data of several codecs, an output that is there already, and a source that does not fit.
    """
    data = [Shards(path) for path in config.data]
    for other in data[1:]:
        if other.card.fingerprint != data[0].card.fingerprint:
            raise UserError(f"{other.path}: codec {other.card.name}, {data[0].path} has {data[0].card.name}")
    if config.output.exists() and any(config.output.iterdir()):
        raise UserError(f"{config.output}: is not empty; remove it, or give another --output")
    if config.source.endswith(".jsonl"):
        return _import(config, data, say)
    extract = Extractor(config, data[0].card)
    clustering = _clustering(config, data, extract, say)
    quality = Quality(len(clustering.centroids))
    card = _card(data[0].card, clustering)
    config.output.mkdir(parents=True, exist_ok=True)
    for folder, shards in zip(_folders(config), data, strict=True):
        named = replace(card, policies={**card.policies, "labels_of": shards.fingerprint})
        write_shards(folder, named, _labelled(shards, extract, clustering, quality, say))
    clustering.save(config.output / CENTROIDS)
    report = {"made_of": clustering.made_of, **quality.report()}
    (config.output / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _model_folder(config: LabelConfig) -> Path:
    """The source as an exported model; a run is exported beside the labels first."""
    path = Path(config.source)
    if (path / "model.safetensors").exists():
        return path
    from codecssl.pretrain.export import export

    target = config.output.with_name(f"{config.output.name}.model")
    export(path, target)
    return target


def _folders(config: LabelConfig) -> list[Path]:
    if len(config.data) == 1:
        return [config.output]
    return [config.output / f"{i}-{path.name}" for i, path in enumerate(config.data)]


def _clustering(
    config: LabelConfig, data: Sequence[Shards], extract: Extractor, say: Callable[[str], None]
) -> Clustering:
    if config.clustering is None:
        say(f"fitting {config.clusters} clusters to {config.sample_frames} frames")
        batches = _sampled(config, data, extract)
        return Clustering(fit(batches, config.clusters, frames=config.sample_frames, seed=config.seed), extract.made_of)
    given = Clustering.load(config.clustering)
    for key in ("layer", "weights_sha256"):
        if given.made_of.get(key) != extract.made_of[key]:
            raise UserError(
                f"{config.clustering}: made of {key} {given.made_of.get(key)}, this is {extract.made_of[key]};"
                " give the source that it was made of"
            )
    return given


def _sampled(config: LabelConfig, data: Sequence[Shards], extract: Extractor) -> Iterator[Features]:
    """Features of utterances in random order, each once."""
    first = np.cumsum([0, *(len(shards) for shards in data)])
    total = int(first[-1])
    for begin in range(0, total, 1 << 16):
        for index in permuted(np.arange(begin, min(begin + (1 << 16), total)), total, config.seed, _SAMPLE).tolist():
            folder = int(np.searchsorted(first, index, side="right")) - 1
            codes = data[folder].codes(index - int(first[folder]), num_codebooks=extract.num_codebooks)
            if not (frames := codes.shape[1]):
                continue
            most = np.array([config.utterance_frames or frames])
            yield extract([codes])[0][smallest(uniform(config.seed, _FRAMES, index, np.arange(frames))[None], most)[0]]


def _labelled(
    shards: Shards, extract: Extractor, clustering: Clustering, quality: Quality, say: Callable[[str], None]
) -> Iterator[tuple[str, npt.NDArray[np.int64], dict[str, Any]]]:
    """(id, labels [1, T], {}) of every utterance, in order; holds one batch."""
    from tqdm import tqdm

    with tqdm(total=len(shards), unit=" utterances", disable=None) as bar:
        for batch in _batches(shards):
            features = extract([shards.codes(i, num_codebooks=extract.num_codebooks) for i in batch])
            for index, own in zip(batch, features, strict=True):
                utterance = shards.utterance(index)
                labels, distance = clustering.assign(own)
                quality.add(labels, distance)
                quality.add_phones(labels, _phones(utterance.labels, float(shards.card.frame_rate), len(labels)))
                yield utterance.id, labels[None, :], {}
            bar.update(len(batch))


def _batches(shards: Shards) -> Iterator[list[int]]:
    """Consecutive utterances of about `_BATCH_FRAMES` frames, padding included."""
    batch: list[int] = []
    longest = 0
    for index, frames in enumerate(shards.frames):
        if batch and max(longest, int(frames)) * (len(batch) + 1) > _BATCH_FRAMES:
            yield batch
            batch, longest = [], 0
        batch.append(index)
        longest = max(longest, int(frames))
    if batch:
        yield batch


def _phones(labels: dict[str, Any], frame_rate: float, frames: int) -> list[tuple[str, int, int]]:
    """(phone, first frame, frame after the last) where the data's `phones` are [phone, start, end in seconds] rows."""
    rows = labels.get("phones")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 3 for row in rows):
        return []
    bounds = [(str(p), round(float(a) * frame_rate), round(float(b) * frame_rate)) for p, a, b in rows]
    return [(phone, min(a, frames), min(b, frames)) for phone, a, b in bounds]


def _card(card: CodecCard, clustering: Clustering) -> CodecCard:
    import hashlib

    digest = hashlib.sha256(np.ascontiguousarray(clustering.centroids, "<f4").tobytes()).hexdigest()
    return _label_card(card, len(clustering.centroids), digest, clustering.made_of.get("source", ""))


def _label_card(card: CodecCard, classes: int, digest: str, source: str) -> CodecCard:
    return CodecCard(
        name="labels",
        weights=source,
        weights_sha256=digest,
        sample_rate=card.sample_rate,
        hop_length=card.hop_length,
        codebook_sizes=(classes,),
        codes_per_frame=(1,),
        latent_dim=1,
    )


# ---------------------------------------------------------------- labels from a file


def _import(config: LabelConfig, data: Sequence[Shards], say: Callable[[str], None]) -> dict[str, Any]:
    """Labels from rows {"id": ..., "labels": [one per frame]}, in any order."""
    rows = _read_rows(Path(config.source))
    classes = max(int(row.max(initial=0)) for row in rows.values()) + 1
    if all((row == classes - 1).all() for row in rows.values()):
        raise UserError(f"{config.source}: all labels are {classes - 1}; nothing can be learnt from them")
    card = _label_card(data[0].card, classes, file_sha256(Path(config.source)), config.source)
    quality = Quality(classes)
    config.output.mkdir(parents=True, exist_ok=True)
    for folder, shards in zip(_folders(config), data, strict=True):
        named = replace(card, policies={"labels_of": shards.fingerprint})
        write_shards(folder, named, _given(config.source, shards, rows, quality))
    report = {"made_of": {"source": config.source}, **quality.report()}
    (config.output / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _read_rows(path: Path) -> dict[str, npt.NDArray[np.uint16]]:
    """Labels by id: two bytes a frame are held."""
    rows = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                values = np.asarray(row["labels"], dtype=np.int64)
                if values.ndim != 1 or values.min(initial=0) < 0 or values.max(initial=0) >= 1 << 16:
                    raise UserError(f"{path}, line {number}: labels must be one list of numbers from 0 to 65535")
                rows[str(row["id"])] = values.astype(np.uint16)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: rows must be {{'id': ..., 'labels': [...]}} ({type(error).__name__}: {error})"
        ) from error
    if not rows:
        raise UserError(f"{path}: no rows")
    return rows


def _given(
    source: str, shards: Shards, rows: dict[str, npt.NDArray[np.uint16]], quality: Quality
) -> Iterator[tuple[str, npt.NDArray[np.int64], dict[str, Any]]]:
    for utterance in shards.utterances():
        if (labels := rows.get(utterance.id)) is None:
            raise UserError(f"{source}: no labels for {utterance.id!r} of {shards.path}")
        if len(labels) != utterance.frames:
            raise UserError(
                f"{source}: {len(labels)} labels for {utterance.id!r}, which has {utterance.frames} frames;"
                f" labels must come at {float(shards.card.frame_rate):g} a second"
            )
        wide = labels.astype(np.int64)
        quality.add(wide, np.zeros(len(wide), dtype=np.float32))
        quality.add_phones(wide, _phones(utterance.labels, float(shards.card.frame_rate), len(wide)))
        yield utterance.id, wide[None, :], {}
