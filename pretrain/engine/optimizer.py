"""Optimizers: AdamW for all weights, or Muon for the matrices of the Transformer layers and AdamW for the others."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from codecssl.pretrain.config import OptimConfig
from codecssl.pretrain.engine.distributed import quiet_deepspeed
from codecssl.pretrain.model.fairseq2_parts import PolynomialDecayLR, TriStageLR

ADAM_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
"""Keys of an optimizer's state of each weight, in AdamW's and in Muon's groups."""


def make_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the config's optimizer of the trained weights of a module.

    With `optim.name` muon, the result is DeepSpeed's MuonWithAuxAdam, whose groups have the field `use_muon`. Its own
    step of a matrix W [A, B] is lr sqrt(max(1, A / B)) O, with O about orthogonal. Here the learning rate of a group is
    0.2 sqrt(B) optim.lr, so that a step is 0.2 sqrt(max(A, B)) optim.lr O and its root mean square is near that of
    AdamW's (Liu et al. 2025, arXiv 2502.16982, equation 4). Learning rate and weight decay then mean the same for both.
    """
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(trained, **adam, weight_decay=config.weight_decay, fused=True)
    quiet_deepspeed()
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    matrices = {id(matrix): matrix for _, matrix in layer_matrices(module)}
    others = [parameter for parameter in trained if id(parameter) not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": others, **adam, "weight_decay": config.weight_decay, "use_muon": False},
    ]
    for width in sorted({matrix.shape[1] for matrix in matrices.values()}):
        ratio = 0.2 * width**0.5
        groups.append(
            {
                "params": [matrix for matrix in matrices.values() if matrix.shape[1] == width],
                "lr": ratio * config.lr,
                "momentum": config.momentum,
                "weight_decay": config.weight_decay / ratio,  # DeepSpeed multiplies it by the group's rate
                "ns_method": "standard",
                "use_muon": True,
            }
        )
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(
        groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True}
    )
    return optimizer


def layer_matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, matrix) of each trained matrix of the Transformer layers, which Muon steps."""
    own = {id(parameter) for layer in transformer_layers(module) for parameter in layer.parameters()}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.ndim == 2 and id(parameter) in own:
            yield name, parameter


def transformer_layers(module: nn.Module) -> Iterator[Any]:
    """Yield the layers of every encoder and decoder in the module."""
    for child in module.modules():
        if isinstance(layers := getattr(child, "layers", None), nn.ModuleList):
            yield from layers


def moments_of(matrices: frozenset[str], name: str) -> tuple[str, ...]:
    """Return the keys of the state of a weight. matrices: names of those that Muon steps."""
    return MUON_MOMENTS if name in matrices else ADAM_MOMENTS


def uncompiled(config: OptimConfig) -> AbstractContextManager[Any]:
    """Return a context in which Muon's step is not compiled: torch.compile would require a C++ compiler for it."""
    return torch.compiler.set_stance("force_eager") if config.name == "muon" else nullcontext()


def schedule(config: OptimConfig, optimizer: torch.optim.Optimizer) -> Any:
    """Build the config's fairseq2 schedule, which is stepped once per update."""
    warmup, hold = config.warmup_fraction, config.hold_fraction
    if config.schedule == "polynomial":
        rates = [group["lr"] for group in optimizer.param_groups]
        return PolynomialDecayLR(
            optimizer,
            config.steps,
            min(int(warmup * config.steps), config.steps - 1),
            start_lr=[0.01 * rate for rate in rates],
            final_lr=[config.final_scale * rate for rate in rates],
        )
    if config.schedule == "constant":
        return TriStageLR(optimizer, config.steps, (warmup, 1.0 - warmup, 0.0), final_lr_scale=1.0)
    stages = (warmup, hold, 1.0 - warmup - hold)
    return TriStageLR(optimizer, config.steps, stages, final_lr_scale=config.final_scale)
