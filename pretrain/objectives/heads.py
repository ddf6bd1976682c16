"""Prediction heads: hidden states to one set of logits per stream of targets."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.pretrain.config import ObjectiveConfig
from codecssl.pretrain.model.fairseq2_parts import Linear, init_bert_projection
from codecssl.tokenize.common.errors import UserError


class LinearHeads(Linear):  # type: ignore[misc]  # final; a wrapper would rename the weights of earlier checkpoints
    """One matrix for all streams: hidden states [N, D] -> logits [N, sum of sizes]."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(hidden)


class CosineHeads(nn.Module):
    """Cosine heads (HuBERT, arXiv 2106.07447, equation 3): hidden states [N, D] -> logits [N, sum of sizes].

    Logits of stream s are the cosines of a projection A_s h with the stream's class embeddings, divided by the
    temperature.
    """

    def __init__(self, dim: int, sizes: Sequence[int], width: int, temperature: float) -> None:
        super().__init__()
        self.sizes, self.temperature = list(sizes), temperature
        self.projection = Linear(dim, len(sizes) * width, bias=True)
        self.classes = nn.Parameter(torch.empty(sum(sizes), width).uniform_())  # as HuBERT's label_embs_concat

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        projected = F.normalize(self.projection(hidden).float().unflatten(1, (len(self.sizes), -1)), dim=2)
        classes = F.normalize(self.classes.float(), dim=1).split(self.sizes)
        cosines = [projected[:, stream] @ own.t() for stream, own in enumerate(classes)]
        return torch.cat(cosines, dim=1) / self.temperature


class CodebookHeads(nn.Module):
    """Logits from inner products with the codec's own codebooks.

    Hidden states [N, D] and, with `context`, labels [N, S] -> logits [N, sum of sizes]. For stream k:

        logits_k = exp(s_k) E_k (A_k h + a_k + C_k c_k) / sqrt(W) + b_k,    c_k = sum over j < k of F_j[q_j]

    E_k [V_k, W] starts as the codebook, divided by its root mean square, and is trained; F_k keeps it. A_k, a_k and C_k
    start at zero, b_k at the log of the unigram, so that the first loss is the targets' order-0 entropy. With `context`
    the loss is that of p(q_k | h, q_1 .. q_{k-1}), in the order in which a residual quantiser codes, as in AudioLM's
    fine stage (arXiv 2209.03143, section 3.2): it is not comparable with the loss of independent heads.
    """

    def __init__(self, dim: int, sizes: Sequence[int], width: int, *, context: bool) -> None:
        super().__init__()
        self.sizes, self.width, self.context = list(sizes), width, context
        self.projection = Linear(dim, len(sizes) * width, bias=True)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]
        self.classes = nn.Parameter(torch.randn(sum(sizes), width))
        self.log_scale = nn.Parameter(torch.zeros(len(sizes)))
        self.bias = nn.Parameter(torch.zeros(sum(sizes)))
        if context:
            self.known = nn.Parameter(self.classes.detach().clone(), requires_grad=False)
            self.from_context = nn.Parameter(torch.zeros(len(sizes), width, width))

    def start(self, tables: Sequence[Tensor], log_unigram: Tensor) -> None:
        """Initialise classes from the codec's S tables [V_k, W], and the bias from log-probabilities [sum of V_k]."""
        with torch.no_grad():
            for own, table in zip(self.classes.split(self.sizes), tables, strict=True):
                own.copy_(table / table.square().mean().sqrt().clamp(min=1e-12))
            if self.context:  # all by one scale: later stages of a residual quantiser are smaller
                self.known.copy_(torch.cat(list(tables)) / tables[0].square().mean().sqrt().clamp(min=1e-12))
            self.bias.copy_(log_unigram)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        query = self.projection(hidden).unflatten(1, (len(self.sizes), self.width)).transpose(0, 1)  # [S, N, W]
        if self.context:
            assert labels is not None, "codebook heads with context need the labels"
            query = torch.baddbmm(query, self._context(labels).to(query.dtype), self.from_context.to(query.dtype))
        scale = self.log_scale.exp() / self.width**0.5
        biases = self.bias.split(self.sizes)
        logits = [
            torch.addmm(biases[k].to(query.dtype), query[k], (own * scale[k]).to(query.dtype).t())
            for k, own in enumerate(self.classes.split(self.sizes))
        ]
        return torch.cat(logits, dim=1)

    def _context(self, labels: Tensor) -> Tensor:
        """Return the de-quantised sum of the streams before each: labels [N, S] -> [S, N, W]."""
        known = self.known.split(self.sizes)
        vectors = torch.stack([table[labels[:, k]] for k, table in enumerate(known)]).float()
        return vectors.cumsum(0) - vectors


def make_heads(config: ObjectiveConfig, dim: int, sizes: Sequence[int], width: int | None = None) -> nn.Module:
    """Build the config's heads, with forward(hidden [N, D], labels [N, S]) -> logits [N, sum of sizes].

    width: width of the codec's tables, for codebook heads.
    """
    if config.head == "cosine":
        return CosineHeads(dim, sizes, config.head_dim, config.temperature)
    if config.head == "codebook":
        if width is None:
            raise UserError("objective.head: codebook, which needs objective.target codes")
        return CodebookHeads(dim, sizes, width, context=config.head_context)
    return LinearHeads(dim, sum(sizes), bias=True, init_fn=init_bert_projection)


def log_unigram(counts: Sequence[Any]) -> Tensor:
    """Return log-probabilities float32 [sum of V_s] of histograms [V_s], each count plus 0.5 (Jeffreys' prior)."""
    return torch.cat([torch.log_softmax((torch.as_tensor(c).double() + 0.5).log(), 0) for c in counts]).float()
