"""Train heads on any input by one procedure: the same steps and batches, keeping the best weights on validation.

All random choices are determined by (seed, stage, step).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from codecssl.superb.task_codec.config import BottleneckTrainConfig
from codecssl.superb.task_codec.examples import Examples
from codecssl.superb.task_codec.heads import Head, errors
from codecssl.superb.task_codec.states import CACHE_BYTES, Batched

STAGES = ("head", "a", "b")
BATCH = 32
"""Utterances per batch of evaluation."""


def draw(found: Examples, config: BottleneckTrainConfig, stage: int, step: int) -> list[int]:
    """Utterances of a batch."""
    rows = found.parts["train"]
    random = np.random.default_rng([config.seed, stage, step])
    return [rows[i] for i in random.choice(len(rows), min(config.batch_size, len(rows)), replace=False)]


def steps_of(config: BottleneckTrainConfig, stage: int) -> int:
    return int(getattr(config, f"{STAGES[stage]}_steps"))


def lr_at(config: BottleneckTrainConfig, stage: int, step: int) -> float:
    """Return the learning rate of a step."""
    return float(getattr(config, f"{STAGES[stage]}_learning_rate")) * (1 - step / steps_of(config, stage))


def evaluates(config: BottleneckTrainConfig, stage: int, step: int) -> bool:
    """True if the validation part is evaluated after this step."""
    steps = steps_of(config, stage)
    return step % max(1, steps // config.evaluations) == 0 or step == steps


class Best:
    """The weights with the fewest errors on the validation part. The later ones win a tie."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state or {}

    def offer(self, wrong: float, modules: dict[str, nn.Module]) -> None:
        if not self.state or wrong <= self.state["error"]:
            weights = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in modules.items()}
            self.state = {"error": wrong, "weights": weights}

    def restore(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items() if self.state else ():
            module.load_state_dict(self.state["weights"][name])


class Summaries:
    """Head summaries of utterances, computed once and cached within a memory limit.

    states: maps utterances to their states [B, T, D] and frames.
    """

    def __init__(self, head: Head, states: Batched, most_bytes: int = CACHE_BYTES) -> None:
        self.head, self.states, self.left = head, states, most_bytes
        self.known: dict[int, Tensor] = {}

    def __call__(self, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Summaries [B, S, T, D] and the frames of each utterance."""
        fresh: dict[int, Tensor] = {}
        missing = sorted({index for index in rows if index not in self.known})
        for first in range(0, len(missing), BATCH):
            fresh |= self._compute(missing[first : first + BATCH])
        found = [self.known[index] if index in self.known else fresh[index] for index in rows]
        for index, one in fresh.items():
            if one.nbytes <= self.left:
                self.left -= one.nbytes
                self.known[index] = one
        return nn.utils.rnn.pad_sequence(found, batch_first=True).transpose(1, 2), [len(one) for one in found]

    @torch.no_grad()
    def _compute(self, rows: Sequence[int]) -> dict[int, Tensor]:
        states, frames = self.states(rows)
        summary = self.head.summary(states, frames).transpose(1, 2)  # [B, T or 1, S, D]
        return {index: one[:count].clone() for index, one, count in zip(rows, summary, frames, strict=True)}


@torch.no_grad()
def count_errors(head: Any, summaries: Summaries, found: Examples, part: str) -> tuple[int, int]:
    """Number of errors and labels of a part. Errors are wrong utterances for classes, edits for CTC."""
    wrong, labels, rows = 0, 0, found.parts[part]
    for first in range(0, len(rows), BATCH):
        chosen = rows[first : first + BATCH]
        summary, frames = summaries(chosen)
        edits, count = errors(head.answers(head.read(summary), frames), [found.labels[i] for i in chosen])
        wrong, labels = wrong + edits, labels + count
    return wrong, labels


def error_rate(head: Any, summaries: Summaries, found: Examples, part: str) -> float:
    """1 - accuracy for classes, phone error rate for CTC."""
    wrong, labels = count_errors(head, summaries, found, part)
    return wrong / max(labels, 1)


def train_head(head: Any, summaries: Summaries, found: Examples, config: BottleneckTrainConfig, stage: int) -> None:
    """Train a head alone for one stage and keep its best weights. In stage B they may be the initial ones."""
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=config.weight_decay)
    best = Best()
    if STAGES[stage] == "b":
        best.offer(error_rate(head, summaries, found, "valid"), {"head": head})
    for step in range(steps_of(config, stage)):
        optimizer.param_groups[0]["lr"] = lr_at(config, stage, step)
        rows = draw(found, config, stage, step)
        summary, frames = summaries(rows)
        update(optimizer, head.loss(head.read(summary), frames, [found.labels[i] for i in rows]))
        if evaluates(config, stage, step + 1):
            best.offer(error_rate(head, summaries, found, "valid"), {"head": head})
    best.restore({"head": head})


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 5.0)
    optimizer.step()
