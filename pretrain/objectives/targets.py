"""Prediction targets: the classes that an objective predicts at masked frames.

An objective (codec2vec.py, encodecmae.py, dinosr.py) is a network with its loss; a target supplies the labels of that
loss. A new target is a class here, an entry of `TARGETS`, and its name in `ObjectiveConfig.target`
(pretrain/objective_config.py). A target that needs files also needs a setting in `DataConfig` (pretrain/config.py), and
`open_data` (pretrain/data/open_data.py) must read them into the batches.
"""

from collections.abc import Callable
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


TARGETS: dict[str, Callable[[CodecCard, tuple[int, ...]], Target] | None] = {
    "codes": lambda card, label_sizes: Codes(card),
    "labels": lambda card, label_sizes: Labels(label_sizes),
    "online": None,  # the clusters of objectives/dinosr.py
}
"""The constructor of each `ObjectiveConfig.target`. Its arguments are those of `make_target`."""


def make_target(config: ObjectiveConfig, card: CodecCard, label_sizes: tuple[int, ...] = ()) -> Target | None:
    """Make the target of a config; None if the objective makes its targets while training.

    card: card of the shards' codec. label_sizes: number of classes of each stream of the label folders.
    """
    make = TARGETS[config.target]
    return None if make is None else make(card, label_sizes)
