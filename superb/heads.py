"""Small heads over a model's states, as SUPERB's: a learned mean of the layers, then linear maps, no more."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.superb.bottleneck import frame_mask

BLANK = 0
"""CTC's label of no label."""


class LayerMean(nn.Module):
    """The weighted mean of S layer-normed states."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(states))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """S tensors [..., D] -> [..., D]"""
        weights = self.scores.softmax(dim=0)
        normed: Tensor = sum(w * F.layer_norm(s, s.shape[-1:]) for w, s in zip(weights, states))  # type: ignore[assignment]
        return normed


class ClassHead(nn.Module):
    """One of C classes for an utterance: projection, mean over time, linear (SUPERB's utterance head)."""

    kind = "class"

    def __init__(self, dim: int, states: int, labels: int, width: int = 256) -> None:
        super().__init__()
        self.mean = LayerMean(states)
        self.projection, self.answer = nn.Linear(dim, width), nn.Linear(width, labels)

    def forward(self, states: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
        """States [B, T, D] -> logits [B, C]."""
        x = self.projection(self.mean(states))
        mask = frame_mask(frames, x.shape[1], x.device)[..., None]
        logits: Tensor = self.answer((x * mask).sum(dim=1) / mask.sum(dim=1))
        return logits

    def loss(self, logits: Tensor, frames: Sequence[int], labels: Sequence[Sequence[int]]) -> Tensor:
        return F.cross_entropy(logits, torch.tensor([label[0] for label in labels], device=logits.device))

    def answers(self, logits: Tensor, frames: Sequence[int]) -> list[list[int]]:
        """The label of each utterance."""
        return [[int(label)] for label in logits.argmax(dim=1)]


class CtcHead(nn.Module):
    """A row of labels for an utterance: projection and a linear map per frame, CTC. Label 0 is the blank."""

    kind = "ctc"

    def __init__(self, dim: int, states: int, labels: int, width: int = 256) -> None:
        super().__init__()
        self.mean = LayerMean(states)
        self.projection, self.answer = nn.Linear(dim, width), nn.Linear(width, labels)

    def forward(self, states: Sequence[Tensor], frames: Sequence[int]) -> Tensor:
        """States [B, T, D] -> log probabilities [B, T, C]."""
        return self.answer(self.projection(self.mean(states))).log_softmax(dim=-1)

    def loss(self, logits: Tensor, frames: Sequence[int], labels: Sequence[Sequence[int]]) -> Tensor:
        flat = torch.tensor([label for row in labels for label in row], device=logits.device)
        lengths = torch.tensor([len(row) for row in labels])
        return F.ctc_loss(logits.transpose(0, 1), flat, torch.tensor(list(frames)), lengths, blank=BLANK)

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
