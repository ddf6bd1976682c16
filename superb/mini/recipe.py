"""Sizes of mini-SUPERB, and facts about the sources that are not in a manifest."""

from dataclasses import dataclass, field

from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Sizes of the tasks. Counts are upper bounds; triples are train, valid, test.

    The default sizes keep every task's audio under about an hour. A quick run fits two cores.
    """

    shares: tuple[float, float, float] = (0.6, 0.2, 0.2)
    """Shares of the material of speakers or utterances."""
    asr_utterances: tuple[int, int, int] = (400, 80, 80)
    pr_utterances: tuple[int, int, int] = (400, 80, 80)
    sid_least: int = 8
    """Minimum number of utterances of a speaker to be a class of sid."""
    sid_most: int = 30
    asv_least: int = 4
    asv_most: int = 20
    asv_share: float = 0.65
    """Share of the speakers' material for training. Trials use the rest."""
    asv_trials: int = 400
    """Number of trials of the same speaker, and of different speakers."""
    ks_per_word: tuple[int, int, int] = (60, 20, 20)
    """Clips of a keyword, of `_unknown_` and of `_silence_`."""
    sd_mixtures: tuple[int, int, int] = (40, 10, 10)
    sd_overlap: float = 0.7
    """Probability that the next speaker starts before the last one ends."""
    ic_least: int = 0
    """Minimum number of sentences; with fewer, ic is built from words."""
    ic_commands: tuple[int, int, int] = (300, 90, 150)
    sf_commands: tuple[int, int, int] = (120, 40, 40)
    qbe_queries: int = 2
    """Queries per term, in each of valid and test."""
    qbe_documents: int = 3
    """Documents that contain a term, per term in each of valid and test."""
    qbe_distractors: int = 16
    slot_order: list[list[str]] = field(default_factory=list)
    """Slots in spoken order, for intents without a transcript. Slots of one inner list may come in any order. A row
    with two of them is left out of sf."""

    def __post_init__(self) -> None:
        if min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"shares {self.shares}: must be positive and sum to 1; correct the recipe")
        if not 0 < self.asv_share < 1:
            raise UserError(f"asv_share {self.asv_share}: must be between 0 and 1; correct the recipe")
        if not 0 <= self.sd_overlap <= 1:
            raise UserError(f"sd_overlap {self.sd_overlap}: must be between 0 and 1; correct the recipe")
