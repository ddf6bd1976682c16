"""Cross-entropy of many classes, computed in cache-sized pieces."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 18  # elements computed at once: a megabyte of fp32 stays in a core's cache


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
        parts = zip(logits.split(list(sizes), dim=1), labels.unbind(1), strict=True)
        norms, sums = [], []
        for part, label in parts:
            rows = max(1, _PIECE // part.shape[1])
            norm = torch.cat([piece.float().logsumexp(1) for piece in part.split(rows)])
            at_label = part.gather(1, label[:, None])[:, 0].float()
            norms.append(norm)
            sums.append((norm - at_label).sum())
        ctx.save_for_backward(logits, labels, torch.stack(norms))
        ctx.sizes = list(sizes)
        return torch.stack(sums)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, norms = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        streams = zip(
            logits.split(ctx.sizes, 1), gradient.split(ctx.sizes, 1), labels.unbind(1), norms, outer[0], strict=True
        )
        for part, out, label, norm, weight in streams:
            rows = max(1, _PIECE // part.shape[1])
            for begin in range(0, len(part), rows):
                piece = slice(begin, begin + rows)
                probability = part[piece].float().sub_(norm[piece, None]).exp_()
                probability.scatter_add_(1, label[piece, None], probability.new_full((len(probability), 1), -1.0))
                out[piece] = probability.mul_(weight)
        return gradient, None, None


def summed_cross_entropy(logits: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Compute the summed cross-entropy of S streams, in nats, float32 [S].

    logits: [N, sum of V_s], the streams concatenated. labels: int64 [N, S]. The result equals
    `F.cross_entropy(part.float(), label, reduction="sum")` for each stream. Logits of any float type are exponentiated
    and summed in fp32. No fp32 copy of all logits is made, neither forward nor backward. For 3,000 frames and
    8 x 1,024 classes on one core with AMX, this and the product before it take 0.17 s instead of 0.82 s (LOG.md).
    """
    result: Tensor = _SummedCrossEntropy.apply(logits, labels, tuple(sizes))
    return result
