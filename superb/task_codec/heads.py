"""Small heads over a model's states, like SUPERB's: a learned mean of the layers, then linear maps.

A head learns from the `summary` of an utterance's states. The summary has no weights and is computed once.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.pretrain.model.lengths import lengths_to_mask

BLANK = 0
"""Label of CTC's blank."""


class Head(Protocol):
    """Protocol of heads: states to answers."""

    kind: str

    def summary(self, states: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
        """S states [B, T, D] -> the layer-normed input of the head [B, S, T or 1, D]."""

    def read(self, summary: Tensor) -> Tensor:
        """Summary -> logits of the answers."""

    def loss(self, logits: Tensor, frames: Sequence[int], labels: Sequence[Sequence[int]]) -> Tensor:
        """Scalar loss. frames: frames of each item's logits."""

    def divergence(self, logits: Tensor, teacher: Tensor, frames: Sequence[int]) -> Tensor:
        """Scalar Kullback-Leibler divergence of another head's answers [B, T, C] or [B, C] from these."""

    def directions(self) -> Tensor:
        """Linear maps [C, D] of a layer-normed state whose means are the answers."""

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
    """One of C classes per utterance (SUPERB's utterance head). Logits are [B, C].

    The maps are linear, and the mean over time can therefore come first: the summary is [B, S, 1, D].
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
    """Kullback-Leibler divergence, [..., C] -> [...]."""
    pair = logits.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return F.kl_div(*pair, log_target=True, reduction="none").sum(dim=-1)


class CtcHead(_Linear):
    """A sequence of labels per utterance (CTC); label 0 is the blank. Logits are log probabilities [B, T, C]."""

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
        """Decode the most likely label of each frame, without repeats and blanks."""
        best = logits.argmax(dim=2)
        rows = [row[:n].unique_consecutive().tolist() for row, n in zip(best, frames)]
        return [[label for label in row if label != BLANK] for row in rows]


HEADS: dict[str, Any] = {"class": ClassHead, "ctc": CtcHead}


def errors(answers: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Number of edits from answers to labels, and number of labels. An edit of classes is a wrong answer."""
    from torchaudio.functional import edit_distance

    edits = sum(edit_distance(list(a), list(b)) for a, b in zip(answers, labels, strict=True))
    return edits, sum(len(row) for row in labels)
