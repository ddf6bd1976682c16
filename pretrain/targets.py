"""What is to be predicted. A new target is one class here, and its name in `ObjectiveConfig.target`."""

from typing import Protocol

from torch import Tensor

from codecssl.pretrain.config import ObjectiveConfig
from codecssl.pretrain.loader import Batch
from codecssl.tokenize.codec import CodecCard


class Target(Protocol):
    """S streams of classes, one prediction head each."""

    sizes: tuple[int, ...]
    """Classes of each stream."""

    def labels(self, batch: Batch) -> Tensor:
        """int64 [B, S, T]; values in the padding are not looked at."""


class Codes:
    """The codec's own codes, all of them, also where quantizer dropout hides some from the input."""

    def __init__(self, card: CodecCard) -> None:
        self.sizes = card.codebook_sizes

    def labels(self, batch: Batch) -> Tensor:
        return batch.codes


def make_target(config: ObjectiveConfig, card: CodecCard) -> Target:
    """The target that the config names."""
    return {"codes": Codes}[config.target](card)
