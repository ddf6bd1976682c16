"""Reports and sanity checks of a run: model, data, diversity of the targets, and collapse of the predictions."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.loader import Batch, Loader
from codecssl.pretrain.objectives.objective import Objective, histogram_perplexity, parameters
from codecssl.pretrain.objectives.targets import Target
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

_SAMPLED_STEPS = 4
_LEARNING = 200  # steps in which every model predicts only the most common codes
_DEGENERATE = 1.5  # perplexity of targets or predictions below which nearly all frames have one class


def check_targets(train: Loader, target: Target | None) -> list[Tensor]:
    """Return the histogram int64 [V_s] of each stream's targets over the first batches.

    Returns an empty list if targets are made while training. Raises UserError if a stream is (nearly) constant. With
    constant labels the loss goes to zero, which looks like success.
    """
    if target is None:
        return []
    counts = [torch.zeros(size, dtype=torch.int64) for size in target.sizes]
    for step in range(min(_SAMPLED_STEPS, train.plan.steps_per_epoch)):
        for batch in train.step(step):
            for labels, count in zip(target.labels(batch), counts, strict=True):
                count += torch.bincount(labels, minlength=len(count))
    perplexities = histogram_perplexity(counts)
    for stream, (perplexity, count) in enumerate(zip(perplexities, counts, strict=True)):
        if perplexity < _DEGENERATE:
            raise UserError(
                f"targets: stream {stream} is (nearly) constant: class {int(count.argmax())} has"
                f" {100.0 * float(count.max()) / float(count.sum()):.1f} % of {int(count.sum())} frames"
                f" (perplexity {perplexity:.2f} of {len(count)}); check the data that was tokenized, or data.labels"
            )
    return counts


def collapse(
    step: int, steps: int, predicted_perplexity: Sequence[float], target_perplexity: Sequence[float]
) -> str | None:
    """Return a warning about collapse, or None.

    The predictions have collapsed if a model, after the first steps, predicts one class for (nearly) every frame.
    Targets that are made while training have collapsed if a stream has become one class.
    """
    if step <= max(_LEARNING, steps // 4):
        return None
    least, most = min(target_perplexity), max(predicted_perplexity)
    if least < _DEGENERATE:
        return (
            f"step {step}: the targets of stream {list(target_perplexity).index(least)} are (nearly) one class"
            f" (perplexity {least:.2f}): the teacher has collapsed; raise online.ema_start or lower optim.lr"
        )
    if most >= _DEGENERATE:
        return None
    return (
        f"step {step}: the model predicts (nearly) one code for every frame (perplexity {most:.2f});"
        " lower optim.lr or look at the data"
    )


def model_report(objective: Objective, card: CodecCard, device: Any) -> str:
    """Return one line about the model and the objective."""
    model, config = parameters(objective.model), objective.model.config
    return (
        f"model: {model / 1e6:.2f} M parameters ({config.layers} layers of {config.dim}, {config.norm}-norm,"
        f" {config.positions} positions) + heads {objective.head_parameters() / 1e6:.2f} M; on {device};"
        f" codec {card.name}, {card.num_codebooks} codebooks, {float(card.frame_rate):g} frames/s"
    )


def data_report(train: Loader, valid: Loader | None, config: RunConfig, targets: list[Tensor]) -> str:
    """Return lines about the data and the length of training. targets: histograms of `check_targets`."""
    plan, card, steps = train.plan, train.corpus.card, config.optim.steps
    hours = plan.frames_per_epoch / float(card.frame_rate) / 3600
    lines = [
        f"data: {hours:.2f} h an epoch = {plan.pieces_per_epoch} pieces = {plan.frames_per_epoch} frames ="
        f" {plan.frames_per_epoch * card.num_codebooks / 1e6:.2f} M codes; {plan.steps_per_epoch} steps of"
        f" {plan.frames_per_epoch // plan.steps_per_epoch} frames an epoch; {steps} steps ="
        f" {steps / plan.steps_per_epoch:.1f} epochs",
        f"validation: {valid.plan.frames_per_epoch} frames held out" if valid else "validation: none",
        targets_report(targets),
    ]
    return "\n".join(lines)


def targets_report(targets: list[Tensor]) -> str:
    """Return one line about the histograms of the targets."""
    if not targets:
        return "targets: made while training"
    perplexities = histogram_perplexity(targets)
    columns = (
        ("entropy in bits", [f"{math.log2(value):.2f}" for value in perplexities]),
        ("perplexity", [f"{value:.0f} of {len(count)}" for value, count in zip(perplexities, targets, strict=True)]),
        ("% in the most frequent class", [f"{100.0 * float(count.max() / count.sum()):.1f}" for count in targets]),
    )
    return "targets: " + "; ".join(f"{name} {', '.join(values)}" for name, values in columns)


def training_flops(objective: Objective, batches: list[Batch]) -> float:
    """Return the floating-point operations of one update on these batches, forward and backward."""
    return sum(objective.flops(batch) for batch in batches)
