"""Base of all objectives: the interface, cross-entropy per stream of targets, and further metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from codecssl.pretrain.config import ENCODECMAE_GAMMA
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.model import CodecModel
from codecssl.pretrain.objectives.cross_entropy import summed_cross_entropy
from codecssl.tokenize.common.errors import UserError

PIECES = {"cpu": 1 << 22}
"""Most logits at once by device type: 16 MiB in fp32 on a CPU (LOG.md, 2026-11-30)."""
PIECE = 1 << 26
"""Most logits at once on other devices, where small products leave cores idle: 256 MiB in fp32."""


@dataclass(frozen=True)
class Scores:
    """Sums over frames of one micro-batch, per stream [S]. Divide by `frames` for means."""

    frames: int
    cross_entropy: Tensor
    """Cross-entropy in nats; the only field with a gradient."""
    correct: Tensor | None = None
    """Number of frames whose most likely class is the target."""
    predicted: list[Tensor] | None = None
    """Per stream [V_s]: number of frames at which each class was the most likely."""
    target: list[Tensor] | None = None
    """Per stream [V_s]: number of frames at which each class was the target."""


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch and its components."""

    total: Tensor
    """Contribution to the global batch's loss, which is the sum over all micro-batches and ranks."""
    masked: Scores
    visible: Scores | None


class Objective(nn.Module):
    """Base class of all objectives: the model, its prediction targets, and the loss.

    A subclass sets `model` and `sizes`. State that a bf16 engine must not cast, or that the optimizer does not update
    (a teacher, moving averages), is kept in `extra_state`, outside of the module's parameters and buffers.
    """

    model: CodecModel
    sizes: tuple[int, ...]
    """Number of classes of each predicted stream, [S]."""
    gamma: Tensor
    """Weight of each stream in the loss, float32 [S]."""
    visible_weight: float = 0.0

    def forward(self, batch: Batch, *, detailed: bool = False, score_visible: bool = False) -> Loss:
        """detailed: count accuracy and usage too; score_visible: score visible frames even at weight 0."""
        raise NotImplementedError

    def weighted(self, masked: Mapping[str, list[float]], visible: Mapping[str, list[float]]) -> float:
        """Return the loss of a whole evaluation, from the means in two summaries."""
        means = [
            float(self.gamma.double() @ torch.tensor(part["cross_entropy"]).double()) for part in (masked, visible)
        ]
        return means[0] + self.visible_weight * means[1]

    def after_update(self, step: int) -> None:
        """Update moving averages after the optimizer's update number `step` (1, 2, ...). Called on every rank."""

    def place(self, device: torch.device) -> None:
        """Move the extra state to the device, once, before training."""

    def extra_state(self) -> dict[str, Tensor]:
        """Return the state that a checkpoint must hold in addition to the engine's; the same on every rank."""
        return {}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `extra_state`."""

    def head_parameters(self) -> int:
        """Return the number of weights on top of the model."""
        return 0

    def flops(self, batch: Batch) -> float:
        """Return the floating-point operations of one update on a micro-batch, forward and backward, without padding.

        6 per weight and frame for matrices (Kaplan et al. 2020, section 2.1), 12 D T per layer and frame for
        attention, 6 per head weight at each masked frame.
        """
        front = self.model.front_parameters()
        if self.model.positions is not None:
            front += parameters(self.model.positions)
        heads = 6.0 * self.head_parameters() * len(batch.masked)
        return 6.0 * front * sum(batch.frames) + encoder_flops(self.model.encoder, batch.frames) + heads


def parameters(module: nn.Module) -> int:
    """Return the number of weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def encoder_flops(encoder: nn.Module, frames: Sequence[int]) -> float:
    """Return the operations of Transformer layers, forward and backward, on items with these numbers of frames."""
    layers: Any = encoder.layers
    width = layers[0].self_attn.q_proj.input_dim
    matrices = sum(parameters(layer.self_attn) + parameters(layer.ffn) for layer in layers)
    return sum(6.0 * matrices * t + 12.0 * len(layers) * width * t * t for t in frames)


def score(logits: Tensor, labels: Tensor, sizes: Sequence[int], detailed: bool) -> Scores:
    """Compute the scores of logits [N, sum of V_s], streams concatenated, and labels [N, S] of N frames."""
    entropy = summed_cross_entropy(logits, labels, sizes)
    if not detailed:
        return Scores(len(labels), entropy)
    streams = labels.unbind(1)
    guesses = [part.argmax(1) for part in logits.split(list(sizes), dim=1)]
    return Scores(
        len(labels),
        entropy,
        torch.stack([(guess == y).sum() for guess, y in zip(guesses, streams, strict=True)]),
        [torch.bincount(guess, minlength=size) for guess, size in zip(guesses, sizes, strict=True)],
        [torch.bincount(y, minlength=size) for y, size in zip(streams, sizes, strict=True)],
    )


def score_heads(
    heads: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    sizes: Sequence[int],
    detailed: bool,
    gamma: Tensor,
    frames: int,
) -> tuple[Tensor, Scores]:
    """Score heads on hidden states [N, D] and labels [N, S]; return sum_s gamma_s CE_s / frames and the scores.

    CE_s is the summed cross-entropy of stream s, gamma float32 [S]. The first result has a gradient. More logits than
    PIECES or PIECE never exist at once: longer inputs are cut along N, and each piece's gradient is computed right
    after its logits, so that no product is computed twice (with ZeRO 3, the backward pass computes the logits again).
    """
    gamma = gamma.to(hidden.device)
    rows = max(1, PIECES.get(hidden.device.type, PIECE) // sum(sizes))

    def scored(part: Tensor, own: Tensor) -> Scores:
        return score(heads(part, own), own, sizes, detailed)

    if len(hidden) <= rows:
        whole = scored(hidden, labels)
        return (gamma * whole.cross_entropy).sum() / frames, whole
    trained = [parameter for parameter in heads.parameters() if parameter.requires_grad]
    parts: list[Scores] = []
    divided = any(hasattr(parameter, "ds_id") for parameter in trained)
    if divided:  # by ZeRO 3: weights are whole only within a module's call
        pieces = zip(hidden.split(rows), labels.split(rows), strict=True)
        parts = [checkpoint(scored, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        total = (gamma * torch.stack([part.cross_entropy for part in parts]).sum(0)).sum() / frames
    else:
        total = _InPieces.apply(scored, parts, rows, hidden, labels, gamma / frames, *trained)
    entropy = torch.stack([part.cross_entropy.detach() for part in parts]).sum(0)
    return total, replace(merged(parts) if detailed else parts[0], frames=len(hidden), cross_entropy=entropy)


class _InPieces(torch.autograd.Function):
    """Weighted sum of the cross-entropies of all pieces. The forward pass computes the gradients too.

    The sum is linear in its one outer gradient, which the backward pass multiplies. Gradients of the heads' weights are
    summed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scored: Callable[[Tensor, Tensor], Scores],
        parts: list[Scores],
        rows: int,
        hidden: Tensor,
        labels: Tensor,
        weights: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        into_hidden = torch.empty_like(hidden) if wanted else None
        sums: list[Tensor] = [torch.zeros_like(each, dtype=torch.float32) for each in trained] if wanted else []
        for begin in range(0, len(hidden), rows):
            piece = slice(begin, begin + rows)
            with torch.set_grad_enabled(wanted):
                part = hidden[piece].detach().requires_grad_(wanted)
                found = scored(part, labels[piece])
                total = (weights * found.cross_entropy).sum()
            if into_hidden is not None:
                into_hidden[piece], *own = torch.autograd.grad(total, (part, *trained), materialize_grads=True)
                for whole, each in zip(sums, own, strict=True):
                    whole += each
            parts.append(replace(found, cross_entropy=found.cross_entropy.detach()))
        if into_hidden is not None:
            ctx.save_for_backward(into_hidden, *(total.to(each.dtype) for total, each in zip(sums, trained)))
        return (weights * torch.stack([part.cross_entropy for part in parts]).sum(0)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        into_hidden, *sums = ctx.saved_tensors
        return None, None, None, into_hidden * outer[0], None, None, *(each * outer[0] for each in sums)


def codebook_weights(gamma: str, streams: int) -> Tensor:
    """Return the loss weights float32 [S], sum 1: equal, or EnCodecMAE's first S."""
    if gamma == "uniform":
        return torch.full((streams,), 1.0 / streams)
    if streams > len(ENCODECMAE_GAMMA):
        raise UserError(
            f"objective.gamma: encodecmae has {len(ENCODECMAE_GAMMA)} weights, the target {streams}"
            " streams; use uniform or a smaller data.num_codebooks"
        )
    weights = torch.tensor(ENCODECMAE_GAMMA[:streams])
    return weights / weights.sum()


def merged(parts: Sequence[Scores]) -> Scores:
    """Merge the detailed scores of several micro-batches."""
    return Scores(
        sum(part.frames for part in parts),
        torch.stack([part.cross_entropy.detach() for part in parts]).sum(0),
        torch.stack([part.correct for part in parts if part.correct is not None]).sum(0),
        [torch.stack(counts).sum(0) for counts in zip(*(part.predicted or [] for part in parts), strict=True)],
        [torch.stack(counts).sum(0) for counts in zip(*(part.target or [] for part in parts), strict=True)],
    )


def summary(scores: Scores) -> dict[str, list[float]]:
    """Convert detailed scores to metrics, one number per stream.

    cross_entropy in nats; accuracy in 0..1; perplexity = exp(cross_entropy); predicted_perplexity and
    target_perplexity = exp(entropy) of the histograms of guesses and of targets: 1 is collapse, V full use.
    """
    assert scores.correct is not None, "only detailed scores can be summed up"
    assert scores.predicted is not None
    assert scores.target is not None
    frames = max(scores.frames, 1)
    mean = scores.cross_entropy.detach().double() / frames
    return {
        "cross_entropy": mean.tolist(),
        "accuracy": (scores.correct.double() / frames).tolist(),
        "perplexity": mean.exp().tolist(),
        "predicted_perplexity": histogram_perplexity(scores.predicted),
        "target_perplexity": histogram_perplexity(scores.target),
    }


def histogram_perplexity(counts: Sequence[Tensor]) -> list[float]:
    """Return exp(entropy) of each histogram: 1 if there is a single class, V if all V are equally frequent."""
    shares = [count.double() / count.sum().clamp(min=1) for count in counts]
    return [float(torch.exp(-torch.special.xlogy(share, share).sum())) for share in shares]
