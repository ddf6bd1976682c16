"""Prediction targets. A new target is one class here, and its name in `ObjectiveConfig.target`."""

from typing import Protocol

from torch import Tensor

from codecssl.pretrain.config import ObjectiveConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.tokenize.codec import CodecCard


class Target(Protocol):
    """S streams of classes, one prediction head each."""

    sizes: tuple[int, ...]
    """Classes of each stream."""
    width: int | None
    """Width of the codec's tables of these classes; None where the classes have no tables."""

    def labels(self, batch: Batch) -> Tensor:
        """Return the labels int64 [B, S, T]. Values in the padding are ignored."""


class Codes:
    """The codec's own codes. All codebooks are targets, including those that quantizer dropout hides from the input."""

    def __init__(self, card: CodecCard) -> None:
        self.sizes = card.row_sizes
        self.width: int | None = card.latent_dim

    def labels(self, batch: Batch) -> Tensor:
        return batch.codes


class Labels:
    """Labels from label folders, one stream or more: clusters of a model's features, or any other labels."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.width: int | None = None

    def labels(self, batch: Batch) -> Tensor:
        assert batch.labels is not None, "the loader was given no label folders"
        return batch.labels


def make_target(config: ObjectiveConfig, card: CodecCard, label_sizes: tuple[int, ...] = ()) -> Target | None:
    """The codes of `card`, or labels, of `label_sizes` classes a stream; None where targets are made while training."""
    if config.target == "online":
        return None
    if config.target == "labels":
        return Labels(label_sizes)
    assert config.target == "codes", f"no class for objective.target {config.target}"
    return Codes(card)
