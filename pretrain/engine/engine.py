"""The training engine: DeepSpeed, with all settings derived from the run config. One process needs no launcher."""

import ctypes
import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.engine.distributed import quiet_deepspeed, silent
from codecssl.pretrain.engine.fp32_state import restore
from codecssl.pretrain.engine.optimizer import (
    layer_matrices,
    make_optimizer,
    schedule,
    transformer_layers,
    uncompiled,
)
from codecssl.pretrain.engine_config import EngineConfig
from codecssl.pretrain.model.fairseq2_parts import RotaryEncoder
from codecssl.pretrain.objectives.objective import Objective

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of mallopt(3): free memory allowed at the end of the heap (-1: any), and number of blocks that may be
mapped separately."""


def start_engine(
    objective: Objective,
    config: RunConfig,
    *,
    step: int = 0,
    moments: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Any:
    """Build a DeepSpeed engine with model, heads, optimizer and a fairseq2 schedule, after `step` updates.

    The objective must already have the weights of that step. moments: the optimizer's moments, by key and parameter
    name.
    """
    deepspeed = quiet_deepspeed()
    optim = config.optim
    exact = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    prepare_layers(objective, config.engine)
    with silent():  # it prints memory usage at each stage
        engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=make_optimizer(objective, optim),
            lr_scheduler=lambda basic: schedule(optim, basic),
            config=deepspeed_config(config),
            dist_init_required=False,
        )
    engine.uncompiled = partial(uncompiled, optim)
    engine.matrices = frozenset(name for name, _ in layer_matrices(objective)) if optim.name == "muon" else frozenset()
    engine.frozen = {name: exact[name] for name, p in objective.named_parameters() if not p.requires_grad}
    if torch.distributed.get_world_size() == 1 and zero_stage(config) == 0:
        engine.enable_backward_allreduce = False  # it copies all gradients into a buffer and back, needlessly
    restore(engine, exact, moments or {}, step)
    if step:
        # A schedule is a function of the number of updates alone.
        engine.lr_scheduler.last_epoch = step - 1
        engine.lr_scheduler.step()
    restore_buffers(engine.module)
    objective.place(engine.device)
    if engine.device.type == "cpu":
        keep_freed_memory()
    return engine


def keep_freed_memory() -> None:
    """Make the process keep freed memory for later tensors, as CUDA's allocator does.

    glibc maps every block above 32 MiB separately and unmaps it when it is freed. The kernel then zeroes new pages for
    the activations of each step, which takes 7 % of a small model's step on a CPU (LOG.md, 2026-11-21). With another C
    library this function has no effect.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """Build DeepSpeed's config. Learning rate, schedule and batch size are set only in the run config."""
    bf16, stage = config.engine.precision == "bf16", zero_stage(config)
    return {
        # The plan makes the batches, in frames. DeepSpeed requires a number of items, but does not use it.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.engine.accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        # Gradients are summed in fp32 over micro-batches and ranks. bf16 without ZeRO does not support the former.
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and stage == 0 else "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own compiles C++ first
        "steps_per_print": 10**9,
    }


def zero_stage(config: RunConfig) -> int:
    """Return the ZeRO stage: the config's, else 0 in fp32 and 1 in bf16.

    Stage 1 divides the fp32 weights of bf16 training among the ranks.
    """
    chosen = config.engine.zero_stage
    if chosen is not None:
        return chosen
    return 1 if config.engine.precision == "bf16" else 0


def backward(engine: Any, loss: Tensor) -> None:
    """Compute the gradients of this rank's part of the loss.

    The parts of all micro-batches and ranks add up to the global loss. Gradients are therefore not divided by the
    number of micro-batches. DeepSpeed always divides by the number of ranks; the loss is multiplied by it beforehand.
    """
    engine.backward(loss * torch.distributed.get_world_size(), scale_wrt_gas=False)


def take_step(engine: Any, *, want_norm: bool) -> float | None:
    """Step the engine, which updates the weights after the last micro-batch. Returns the norm of the gradient.

    The norm of a non-finite gradient is non-finite. DeepSpeed would skip that update silently.
    """
    norm, skipped = None, engine.skipped_steps
    if not engine.enable_backward_allreduce:
        for parameter in engine.module.parameters():
            if parameter.requires_grad and parameter.grad is None:  # as the all-reduce does
                parameter.grad = torch.zeros_like(parameter)
    if want_norm and not hasattr(engine.optimizer, "_global_grad_norm"):  # a plain fp32 optimizer keeps none
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    with engine.uncompiled():
        engine.step()
    if engine.skipped_steps != skipped:
        return float("inf")
    kept = engine.get_global_grad_norm()
    return norm if kept is None else float(kept)


def after_update(engine: Any, step: int) -> None:
    """Run the objective's `after_update`. Under ZeRO 3 the weights are gathered for it."""
    whole: AbstractContextManager[None] = nullcontext()
    if engine.zero_optimization_partition_weights() and type(engine.module).after_update is not Objective.after_update:
        whole = quiet_deepspeed().zero.GatheredParameters(list(engine.module.parameters()))
    with whole:
        engine.module.after_update(step)


def prepare_layers(objective: Objective, config: EngineConfig) -> None:
    """Enable activation checkpointing and compilation of the layers, as configured."""
    for layer in transformer_layers(objective):
        if config.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if config.compile:
            layer.compile(dynamic=True)


def restore_buffers(module: nn.Module) -> None:
    """Restore the rotary tables after a cast to bf16. They are read as complex numbers, which bf16 does not support."""
    for child in module.modules():
        if isinstance(child, RotaryEncoder) and child.freqs.dtype != torch.float32:
            child.freqs = child.freqs.float()
            child.reset_non_persistent_buffers()
