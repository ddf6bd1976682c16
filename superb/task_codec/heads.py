"""Small heads over a model's states, as SUPERB's: a learned mean of the layers, then linear maps, no more.

What a head learns from is the `summary` of an utterance's states, which has no weights: it is computed once.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.pretrain.model.lengths import lengths_to_mask

BLANK = 0
"""CTC's label of no label."""


class Head(Protocol):
    """States to answers."""

    kind: str

    def summary(self, states: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
        """S states [B, T, D] -> what the head needs of them, [B, S, T or 1, D]: layer-normed."""

    def read(self, summary: Tensor) -> Tensor:
        """The answers' logits."""

    def loss(self, logits: Tensor, frames: Sequence[int], labels: Sequence[Sequence[int]]) -> Tensor:
        """Scalar; frames are those that each item's logits have."""

    def divergence(self, logits: Tensor, teacher: Tensor, frames: Sequence[int]) -> Tensor:
        """Scalar: of another head's answers [B, T, C] or [B, C] from these."""

    def directions(self) -> Tensor:
        """The maps [C, D] of a layer-normed state that its answers are means of."""

    def answers(self, logits: Tensor, frames: Sequence[int]) -> list[list[int]]:
        """Labels of each utterance."""


class _Linear(nn.Module):
    """Learned mean of S states, projection, linear map."""

    def __init__(self, dim: int, states: int, labels: int, width: int = 256) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(states))
        self.projection, self.answer = nn.Linear(dim, width), nn.Linear(width, labels)

    def summary(self, states: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
        return torch.stack([F.layer_norm(state, state.shape[-1:]) for state in states], dim=1)

    def read(self, summary: Tensor) -> Tensor:
        mean = torch.einsum("s,bstd->btd", self.scores.softmax(dim=0), summary)
        found: Tensor = self.answer(self.projection(mean))
        return found

    def forward(self, states: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
        return self.read(self.summary(states, frames))

    @torch.no_grad()
    def directions(self) -> Tensor:
        return self.answer.weight @ self.projection.weight


class ClassHead(_Linear):
    """One of C classes for an utterance (SUPERB's utterance head). Its maps are linear, so that the mean over time
    may come before them: the summary is [B, S, 1, D]. Logits are [B, C].
    """

    kind = "class"

    def summary(self, states: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
        normed = super().summary(states, frames)
        mask = lengths_to_mask(frames, normed.shape[2], normed.device)[:, None, :, None]
        return (normed * mask).sum(dim=2, keepdim=True) / mask.sum(dim=2, keepdim=True)

    def read(self, summary: Tensor) -> Tensor:
        return super().read(summary)[:, 0]

    def loss(self, logits: Tensor, frames: Sequence[int], labels: Sequence[Sequence[int]]) -> Tensor:
        return F.cross_entropy(logits, torch.tensor([label[0] for label in labels], device=logits.device))

    def divergence(self, logits: Tensor, teacher: Tensor, frames: Sequence[int]) -> Tensor:
        return _divergence(logits, teacher).mean()

    def answers(self, logits: Tensor, frames: Sequence[int]) -> list[list[int]]:
        return [[int(label)] for label in logits.argmax(dim=1)]


def _divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Kullback-Leibler, [..., C] -> [...]"""
    pair = logits.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return F.kl_div(*pair, log_target=True, reduction="none").sum(dim=-1)


class CtcHead(_Linear):
    """A row of labels for an utterance, CTC; label 0 is the blank. Logits are log probabilities [B, T, C]."""

    kind = "ctc"

    def read(self, summary: Tensor) -> Tensor:
        return super().read(summary).log_softmax(dim=-1)

    def loss(self, logits: Tensor, frames: Sequence[int], labels: Sequence[Sequence[int]]) -> Tensor:
        flat = torch.tensor([label for row in labels for label in row], device=logits.device)
        lengths = torch.tensor([len(row) for row in labels])
        return F.ctc_loss(logits.transpose(0, 1), flat, torch.tensor(list(frames)), lengths, blank=BLANK)

    def divergence(self, logits: Tensor, teacher: Tensor, frames: Sequence[int]) -> Tensor:
        length = min(logits.shape[1], teacher.shape[1])
        mask = lengths_to_mask(frames, length, logits.device)
        return (_divergence(logits[:, :length], teacher[:, :length]) * mask).sum() / mask.sum()

    def answers(self, logits: Tensor, frames: Sequence[int]) -> list[list[int]]:
        """The likeliest label of each frame, repeats and blanks taken out."""
        best = logits.argmax(dim=2)
        rows = [row[:n].unique_consecutive().tolist() for row, n in zip(best, frames)]
        return [[label for label in row if label != BLANK] for row in rows]


HEADS: dict[str, Any] = {"class": ClassHead, "ctc": CtcHead}


def errors(answers: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Edits that turn answers into labels, and labels: for classes the wrong ones and all of them."""
    from torchaudio.functional import edit_distance

    edits = sum(edit_distance(list(a), list(b)) for a, b in zip(answers, labels, strict=True))
    return edits, sum(len(row) for row in labels)
