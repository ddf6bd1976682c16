"""Prediction targets: the classes that an objective predicts at masked frames.

An objective (codec2vec.py, encodecmae.py, dinosr.py) is a network with its loss; a target supplies the labels of that
loss. A new target is a class here, an entry of `TARGETS`, and its name in `ObjectiveConfig.target`
(pretrain/objective_config.py). A target that needs files also needs a setting in `DataConfig` (pretrain/config.py), and
`open_data` (pretrain/data/open_data.py) must read them into the batches.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from codecssl.pretrain.config import ObjectiveConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError


class Target(Protocol):
    """S streams of classes, one prediction head each."""

    sizes: tuple[int, ...]
    """Classes of each stream."""
    width: int | None
    """Width of the codec's tables of these classes; None where the classes have no tables."""

    def labels(self, batch: Batch) -> Tensor:
        """Return the labels int64 [S, N]."""


class Codes:
    """The codec's own codes. All codebooks are targets, including those that quantizer dropout hides from the input."""

    def __init__(self, card: CodecCard) -> None:
        self.sizes = card.row_sizes
        self.width: int | None = card.latent_dim

    def labels(self, batch: Batch) -> Tensor:
        return batch.codes

    def tables(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Return the class vectors [V_s, width] of each stream, given the codec's tables."""
        return list(tables)

    def counts(self, counts: Sequence[Tensor]) -> list[Tensor]:
        """Return the histogram [V_s] of each stream, given those of the codes."""
        return list(counts)


class Digits:
    """The code of a finite scalar quantizer as one stream per channel: its digits, the least significant first.

    With independent heads log p(code | h) = sum over i of log p(digit_i | h). With conditional heads
    (`objective.head_context`) it is the chain rule.
    """

    def __init__(self, card: CodecCard) -> None:
        if card.fsq_levels is None:
            raise UserError(
                f"objective.fsq: digits, but the codes of {card.name} are not those of a finite scalar quantizer; use "
                "auto"
            )
        self.levels, self.channels = card.fsq_levels, card.latent_dim
        self.sizes = (self.levels,) * self.channels
        self.width: int | None = card.latent_dim

    def labels(self, batch: Batch) -> Tensor:
        basis = self.levels ** torch.arange(self.channels, device=batch.codes.device)
        return batch.codes // basis[:, None] % self.levels

    def tables(self, tables: Sequence[Tensor]) -> list[Tensor]:
        """Return the main effects [levels, width] of the digits on the table [V, width] of codes.

        They sum to the table if it is a sum of functions of the digits, as those of finite scalar quantizers are.
        """
        table = tables[0]
        return [found - (1.0 - 1.0 / self.channels) * table.mean(0) for found in self._by_digit(table, torch.mean)]

    def counts(self, counts: Sequence[Tensor]) -> list[Tensor]:
        return [found[:, 0] for found in self._by_digit(counts[0][:, None], torch.sum)]

    def _by_digit(self, values: Tensor, reduce: Callable[..., Tensor]) -> list[Tensor]:
        """Reduce values [V, W] of codes over all digits but one: [levels, W] for each digit."""
        grid = values.unflatten(0, (self.levels,) * self.channels)  # the first digit is the last of these dimensions
        dims = range(self.channels)
        return [reduce(grid, dim=[d for d in dims if d != self.channels - 1 - digit]) for digit in dims]


class Labels:
    """Labels from label folders, one stream or more: clusters of a model's features, or any other labels."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.sizes = sizes
        self.width: int | None = None

    def labels(self, batch: Batch) -> Tensor:
        assert batch.labels is not None, "the loader was given no label folders"
        return batch.labels


def make_codes(config: ObjectiveConfig, card: CodecCard) -> Codes | Digits:
    """Make the target of the codes of a codec, or their digits (`ObjectiveConfig.fsq`)."""
    digits = config.fsq == "digits" or (config.fsq == "auto" and card.fsq_levels is not None)
    return Digits(card) if digits else Codes(card)


TARGETS: dict[str, Callable[[ObjectiveConfig, CodecCard, tuple[int, ...]], Target] | None] = {
    "codes": lambda config, card, label_sizes: make_codes(config, card),
    "labels": lambda config, card, label_sizes: Labels(label_sizes),
    "online": None,  # the clusters of objectives/dinosr.py
}
"""The constructor of each `ObjectiveConfig.target`. Its arguments are those of `make_target`."""


def make_target(config: ObjectiveConfig, card: CodecCard, label_sizes: tuple[int, ...] = ()) -> Target | None:
    """Make the target of a config; None if the objective makes its targets while training.

    card: card of the shards' codec. label_sizes: number of classes of each stream of the label folders.
    """
    make = TARGETS[config.target]
    return None if make is None else make(config, card, label_sizes)
