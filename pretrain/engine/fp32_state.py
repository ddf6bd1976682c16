"""Read and restore the whole fp32 weights and the optimizer's moments of a DeepSpeed engine, at any ZeRO stage.

Every ZeRO stage keeps flat fp32 tensors, of which a rank may have a part. A `ParameterPart` locates a parameter's
values in them. The remaining code is the same for all stages and any number of ranks. DeepSpeed's `safe_get_full_*`
functions support neither engines without ZeRO nor an optimizer state before the first step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.pretrain.engine.optimizer import ADAM_MOMENTS, MUON_MOMENTS, moments_of
from codecssl.tokenize.common.errors import UserError

MOMENTS = (*ADAM_MOMENTS, *MUON_MOMENTS)
"""Keys of the optimizer's state. A weight has AdamW's or Muon's."""


@dataclass(frozen=True)
class ParameterPart:
    """Elements start .. start + length of a flattened parameter are elements at .. at + length of `flat`."""

    flat: Tensor
    at: int
    start: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Return a view of the part in a tensor with the layout of `flat`."""
        return flat.detach().view(-1).narrow(0, self.at, self.length)

    def cut(self, whole: Tensor) -> Tensor:
        """Return the part of a whole parameter."""
        return whole.reshape(-1).narrow(0, self.start, self.length)


def masters(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter in fp32 on the CPU of rank 0, an empty tensor on other ranks. All ranks must exhaust it."""
    for name, parameter in engine.module.named_parameters():
        if name in engine.frozen:
            yield name, engine.frozen[name]
        else:
            part = _part(engine, parameter)
            yield name, _gathered(parameter, part, part.flat if part else None)


def moments(engine: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield `key` (one of MOMENTS) of each trained parameter that has it, in the form of `masters`."""
    state = engine.basic_optimizer.state
    for name, parameter in _trained(engine):
        if key not in moments_of(engine.matrices, name):
            continue
        part = _part(engine, parameter)
        yield name, _gathered(parameter, part, state[part.flat][key] if part else None)


@torch.no_grad()
def restore(engine: Any, exact: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Restore the engine's exact fp32 weights, and the moments of `step` updates (empty for a new run).

    The module must already have the same weights, rounded to the engine's precision. Also discards the update with zero
    gradients that some of DeepSpeed's optimizers do on construction.
    """
    state = engine.basic_optimizer.state
    state.clear()
    for name, parameter in _trained(engine):
        part = _part(engine, parameter)
        if part is None:
            continue
        part.of(part.flat).copy_(part.cut(exact[name]))
        if not step:
            continue
        keys = moments_of(engine.matrices, name)
        if part.flat not in state:
            state[part.flat] = {key: torch.zeros_like(part.flat, requires_grad=False) for key in keys}
            if keys == ADAM_MOMENTS:  # the fused kernel requires the step count on the device of the weights
                state[part.flat]["step"] = torch.tensor(float(step), device=part.flat.device)
        for key in keys:
            part.of(state[part.flat][key]).copy_(part.cut(moments[key][name]))


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], where: object) -> None:
    """Load weights from `masters` into a module. Tied weights occur once. Raises UserError if names do not match."""
    parameters = dict(module.named_parameters())
    if wrong := parameters.keys() ^ weights.keys():
        raise UserError(
            f"{where}: {sorted(wrong)[0]} is in the file or in the model, but not in both; was it saved with a "
            "different config or codecssl version?"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise UserError(
                    f"{where}: {name} is {tuple(weights[name].shape)}, the model's {tuple(parameter.shape)}"
                )
            parameter.copy_(weights[name])


def _trained(engine: Any) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _part(engine: Any, parameter: Any) -> ParameterPart | None:
    """Locate this rank's part of the parameter's fp32 weights; None if it has no part."""
    optimizer = engine.optimizer
    if hasattr(parameter, "ds_id"):  # ZeRO 3
        group, at, length = optimizer.grad_position[parameter.ds_id]
        start = length * torch.distributed.get_rank()
        length = max(0, min(length, parameter.ds_numel - start))  # the last part is padded
        return ParameterPart(optimizer.fp32_partitioned_groups_flat[group], at, start, length) if length else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
        part, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return ParameterPart(flat, part.start, whole.start, part.numel)
    if parameter.dtype == torch.float32:  # fp32 without ZeRO
        return ParameterPart(parameter, 0, 0, parameter.numel())
    for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups):  # bf16 without ZeRO; DeepSpeed's names
        for rounded, exact in zip(low, high):
            if rounded is parameter:
                return ParameterPart(exact, 0, 0, parameter.numel())
    raise AssertionError(f"DeepSpeed keeps no fp32 weights of a parameter {tuple(parameter.shape)}")


def _gathered(parameter: Any, part: ParameterPart | None, flat: Tensor | None) -> Tensor:
    """Gather a tensor whose parts are on several ranks, whole on rank 0."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    whole = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
    if part is not None and flat is not None:
        part.cut(whole).copy_(part.of(flat))
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        torch.distributed.reduce(whole, dst=0)
    return whole.cpu() if torch.distributed.get_rank() == 0 else torch.empty(0)
