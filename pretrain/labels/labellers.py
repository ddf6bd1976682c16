"""Sources of frame labels: nearest centroids of a model's features or of the codec's latents, or a file."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from codecssl.pretrain.data.corpus import with_codebooks
from codecssl.pretrain.labels.clustering import Clustering, Features
from codecssl.tokenize.backends.parts.weights import state_sha256
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256
from codecssl.tokenize.registry import load_codec_for
from codecssl.tokenize.shards import Shards

_BATCH_FRAMES = 8_000
WINDOW_SECONDS = 60.0
"""Maximum length that a model reads at once, seconds. Longer utterances are read in windows."""
_LEAST_DEVIATION = 0.05
"""Added to deviations, so that silence is not scaled up to noise."""

Labelled = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""An utterance's index, its labels [T], and the squared distance of each frame to its centroid [T]."""


class Labeller(Protocol):
    """Labels of whole utterances."""

    made_of: dict[str, str]
    classes: int
    digest: str
    """sha256 of the centroids or the file that determines the labels."""

    def __call__(self, shards: Shards, indices: range) -> Iterator[Labelled]:
        """Yield the labels of these utterances, in order."""


class FeatureSource(Protocol):
    """Features that are clustered."""

    made_of: dict[str, str]

    def features(self, shards: Shards, indices: Sequence[int]) -> list[Features]:
        """Return features [T_i, D] of the given utterances."""


class Extractor:
    """Feature extractor: codes of utterances to features of each."""

    def __init__(self, source: str, layer: int, card: CodecCard, *, device: str) -> None:
        """source: a model folder, or latents. layer: see `LabelConfig`. card: card of the data's codec."""
        self.device = torch.device(device)
        self.num_codebooks = card.num_codebooks
        """Number of the data's codebooks that it reads. A model may have been trained on the first few only."""
        self.tables: list[torch.Tensor] = []
        self.made_of = {"source": source, "layer": str(layer), "codec": card.name}
        if source == "latents":
            self.tables = [t.to(self.device) for t in load_codec_for(card).embeddings()]
            self.made_of |= {"layer": "latents", "weights_sha256": card.weights_sha256}
            return
        from codecssl.pretrain.export.export import load_pretrained

        self.model = load_pretrained(source).to(self.device)
        states = self.model.config.layers + 1
        if not -states <= layer < states:
            raise UserError(f"--layer {layer}: {source} has 0 to {states - 1}, or -1 to -{states}")
        card = with_codebooks(card, min(card.num_codebooks, self.model.card.num_codebooks))
        if self.model.card.fingerprint != card.fingerprint:
            raise UserError(
                f"{source}: trained on codec {self.model.card.name}, the data is of {card.name}"
                f" ({self.model.card.difference(card)})"
            )
        self.num_codebooks = card.num_codebooks
        self.layer = layer % states
        self.window = max(2, round(WINDOW_SECONDS * float(card.frame_rate)))
        """Maximum input length of the model, frames."""
        if self.model.config.positions == "rotary":
            self.window = min(self.window, self.model.config.rotary_max_frames)
        self.made_of |= {"layer": str(self.layer), "weights_sha256": state_sha256(self.model)}

    @property
    def reads_mel(self) -> bool:
        """True for models with model.input mel or both."""
        return not self.tables and self.model.mel_spec is not None

    def features(self, shards: Shards, indices: Sequence[int]) -> list[Features]:
        """Return features [T_i, D] of the given utterances."""
        codes = [shards.codes(index, num_codebooks=self.num_codebooks) for index in indices]
        if not self.reads_mel:
            return self(codes)
        if shards.mel_spec != self.model.mel_spec:
            raise UserError(f"{shards.path}: not the log-mel plane that the model reads ({self.model.mel_spec})")
        return self(codes, [shards.mel(index) for index in indices])

    @torch.no_grad()
    def __call__(
        self, codes: Sequence[npt.NDArray[np.uint16]], mel: Sequence[npt.NDArray[np.uint8]] | None = None
    ) -> list[Features]:
        """Codes [R, T_i] each, log-mel planes [T_i, bands] each where `reads_mel` -> features [T_i, D] each.

        A model reads utterances longer than `window` frames in windows that overlap by half, because attention over an
        hour is too slow and a rotary model has a maximum input length. Each frame's features are from the window with
        the nearest middle.
        """
        if self.tables:
            return [self._latents(torch.from_numpy(c.astype(np.int64)).to(self.device)) for c in codes]
        if max(c.shape[1] for c in codes) <= self.window:
            return self._hidden(codes, mel)
        planes = [None] * len(codes) if mel is None else list(mel)
        return [self._in_windows(item, plane) for item, plane in zip(codes, planes, strict=True)]

    def _in_windows(self, codes: npt.NDArray[np.uint16], mel: npt.NDArray[np.uint8] | None) -> Features:
        """Codes [R, T], log-mel plane [T, bands] -> features [T, D]."""
        found = []
        for begin, end, first, last in windows(codes.shape[1], self.window):
            plane = None if mel is None else [mel[begin:end]]
            found.append(self._hidden([codes[:, begin:end]], plane)[0][first - begin : last - begin])
        return np.concatenate(found)

    def _hidden(
        self, codes: Sequence[npt.NDArray[np.uint16]], mel: Sequence[npt.NDArray[np.uint8]] | None
    ) -> list[Features]:
        """Return the layer's output for one padded batch."""
        frames = [c.shape[1] for c in codes]
        padded = torch.zeros(len(codes), codes[0].shape[0], max(frames), dtype=torch.int64)
        for row, item in zip(padded, codes):
            row[:, : item.shape[1]] = torch.from_numpy(item.astype(np.int64))
        planes = None
        if mel is not None:
            tensors = [torch.from_numpy(np.array(plane)) for plane in mel]
            planes = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).transpose(1, 2).to(self.device)
        hidden = self.model.extract(padded.to(self.device), frames, planes)[self.layer].float().cpu().numpy()
        return [hidden[i, :n] for i, n in enumerate(frames)]

    def _latents(self, codes: torch.Tensor) -> Features:
        """Return the codec's dequantised latent: codes [R, T] -> [T, D]."""
        summed = torch.stack([table[row] for table, row in zip(self.tables, codes)]).sum(0)
        found: Features = summed.float().cpu().numpy()
        return found


def windows(frames: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (begin, end, first, last) of windows of at most `size` frames. Of begin .. end, first .. last are kept.

    The kept parts cover all frames, in order. Each has a quarter of a window of context before and after it, except at
    the ends of the utterance.
    """
    stride = max(1, size // 2)
    starts = [0] if frames <= size else [*range(0, frames - size, stride), frames - size]
    bounds = [0, *((a + size + b) // 2 for a, b in pairwise(starts)), frames]
    for start, (first, last) in zip(starts, pairwise(bounds), strict=True):
        yield start, min(start + size, frames), first, last


def normalised(features: Features) -> Features:
    """Subtract the mean over time and divide by the deviation over time plus 0.05, for each column of [T, D].

    This is cepstral mean and variance normalisation of an utterance (Viikki and Laurila 1998). It removes a constant
    channel, and the mean and spread of a speaker's voice. Of hidden states it removes what is constant in an utterance,
    and gives all columns the same weight in a clustering.
    """
    found: Features = (features - features.mean(0)) / (features.std(0) + np.float32(_LEAST_DEVIATION))
    return found


class Normalised:
    """The features of another source, `normalised` in each utterance."""

    def __init__(self, source: FeatureSource) -> None:
        self.source = source
        self.made_of = source.made_of | {"layer": f"{source.made_of['layer']}, cmvn"}

    def features(self, shards: Shards, indices: Sequence[int]) -> list[Features]:
        """Return features [T_i, D] of the given utterances."""
        return [normalised(features) for features in self.source.features(shards, indices)]


class ByCentroids:
    """Label each frame with the nearest centroid of its features."""

    def __init__(self, extract: FeatureSource, clustering: Clustering) -> None:
        self.extract, self.clustering = extract, clustering
        self.made_of, self.classes = clustering.made_of, len(clustering.centroids)
        self.digest = hashlib.sha256(np.ascontiguousarray(clustering.centroids, "<f4").tobytes()).hexdigest()

    def __call__(self, shards: Shards, indices: range) -> Iterator[Labelled]:
        for batch in _batches(shards, indices):
            for index, features in zip(batch, self.extract.features(shards, batch), strict=True):
                yield index, *self.clustering.assign(features)


def _batches(shards: Shards, indices: range) -> Iterator[list[int]]:
    """Yield batches of consecutive utterances of about `_BATCH_FRAMES` frames, padding included."""
    batch: list[int] = []
    longest = 0
    for index in indices:
        frames = int(shards.frames[index])
        if batch and max(longest, frames) * (len(batch) + 1) > _BATCH_FRAMES:
            yield batch
            batch, longest = [], 0
        batch.append(index)
        longest = max(longest, frames)
    if batch:
        yield batch


class FromFile:
    """Labels from rows {"id": ..., "labels": [one per frame]}, in any order. Memory usage is two bytes per frame."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, _read_rows(path)
        self.digest = file_sha256(path)
        self.made_of = {"source": str(path), "sha256": self.digest}
        self.classes = max(int(row.max(initial=0)) for row in self.rows.values()) + 1
        if all((row == self.classes - 1).all() for row in self.rows.values()):
            raise UserError(f"{path}: all labels are {self.classes - 1}; nothing can be learnt from them")

    def __call__(self, shards: Shards, indices: range) -> Iterator[Labelled]:
        for utterance in map(shards.utterance, indices):
            if (labels := self.rows.get(utterance.id)) is None:
                raise UserError(f"{self.path}: no labels for {utterance.id!r} of {shards.path}")
            if len(labels) != utterance.frames:
                raise UserError(
                    f"{self.path}: {len(labels)} labels for {utterance.id!r}, which has {utterance.frames} frames;"
                    f" labels must come at {float(shards.card.frame_rate):g} a second"
                )
            yield utterance.index, labels.astype(np.int64), np.zeros(len(labels), dtype=np.float32)


def _read_rows(path: Path) -> dict[str, npt.NDArray[np.uint16]]:
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
