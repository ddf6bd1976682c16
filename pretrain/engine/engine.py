"""The training engine: DeepSpeed, every setting derived from our config; one process needs no launcher."""

import ctypes
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codecssl.pretrain.config import OptimConfig, RunConfig
from codecssl.pretrain.engine.distributed import quiet_deepspeed, silent
from codecssl.pretrain.engine.fp32_state import restore
from codecssl.pretrain.model.fairseq2_parts import PolynomialDecayLR, RotaryEncoder, TriStageLR
from codecssl.pretrain.objectives.objective import Objective

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of mallopt(3): how much free memory the heap's end may have (-1: any), and how many blocks may be mapped alone."""


def start_engine(
    objective: Objective,
    config: RunConfig,
    *,
    step: int = 0,
    moments: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Any:
    """A DeepSpeed engine around model, heads, torch's AdamW and a fairseq2 schedule, after `step` updates.

    The objective has the weights of that step already; `moments` are AdamW's, by key and name of the parameter.
    """
    deepspeed = quiet_deepspeed()
    optim = config.optim
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    exact = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    _prepare_layers(objective, config)
    with silent():  # it prints how much memory is in use, step by step
        engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=torch.optim.AdamW(
                trained, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
            ),
            lr_scheduler=lambda basic: schedule(optim, basic),
            config=deepspeed_config(config),
            dist_init_required=False,
        )
    engine.frozen = {name: exact[name] for name, p in objective.named_parameters() if not p.requires_grad}
    if torch.distributed.get_world_size() == 1 and zero_stage(config) == 0:
        engine.enable_backward_allreduce = False  # it copies all gradients into one buffer and back, to add nothing
    restore(engine, exact, moments or {}, step)
    if step:
        # A schedule is a function of the number of updates alone.
        engine.lr_scheduler.last_epoch = step - 1
        engine.lr_scheduler.step()
    _restore_buffers(engine.module)
    objective.place(engine.device)
    if engine.device.type == "cpu":
        keep_freed_memory()
    return engine


def keep_freed_memory() -> None:
    """From here on this process keeps what its tensors free, as CUDA's allocator does.

    glibc maps every block above 32 MiB alone and unmaps it when it is freed, so that the kernel hands each step its
    activations as new pages, zeroed one by one: 7 % of a small model's step on a CPU (LOG.md, 2026-11-21).
    With another C library nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's dictionary. Learning rate, schedule and batch have their one home in our config."""
    bf16, stage = config.engine.precision == "bf16", zero_stage(config)
    return {
        # The plan makes the batches, in frames; DeepSpeed only insists on some number of items.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.engine.accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        # Sums of gradients, over micro-batches and over ranks, in fp32. bf16 without ZeRO cannot do the former.
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and stage == 0 else "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own compiles C++ first
        "steps_per_print": 10**9,
    }


def zero_stage(config: RunConfig) -> int:
    """The ZeRO stage: the config's, or 0 in fp32 and 1 in bf16 (whose fp32 weights it divides among the ranks)."""
    chosen = config.engine.zero_stage
    if chosen is not None:
        return chosen
    return 1 if config.engine.precision == "bf16" else 0


def schedule(config: OptimConfig, optimizer: torch.optim.Optimizer) -> Any:
    """The fairseq2 schedule that the config names; it is stepped once per update."""
    warmup, hold = config.warmup_fraction, config.hold_fraction
    if config.schedule == "polynomial":
        return PolynomialDecayLR(
            optimizer,
            config.steps,
            min(int(warmup * config.steps), config.steps - 1),
            start_lr=0.01 * config.lr,
            final_lr=config.final_scale * config.lr,
        )
    if config.schedule == "constant":
        return TriStageLR(optimizer, config.steps, (warmup, 1.0 - warmup, 0.0), final_lr_scale=1.0)
    stages = (warmup, hold, 1.0 - warmup - hold)
    return TriStageLR(optimizer, config.steps, stages, final_lr_scale=config.final_scale)


def backward(engine: Any, loss: Tensor) -> None:
    """Gradients of this rank's part of the loss.

    The parts of all micro-batches and ranks add up already: no division by the number of micro-batches, and the
    division by the number of ranks, which DeepSpeed does not leave out, is undone beforehand.
    """
    engine.backward(loss * torch.distributed.get_world_size(), scale_wrt_gas=False)


def take_step(engine: Any, *, want_norm: bool) -> float | None:
    """Let the engine step; an update happens after the last micro-batch. Returns the norm of the gradient.

    A gradient that is not finite gives a norm that is not: DeepSpeed would skip that update in silence.
    """
    norm, skipped = None, engine.skipped_steps
    if not engine.enable_backward_allreduce:
        for parameter in engine.module.parameters():
            if parameter.requires_grad and parameter.grad is None:  # as the all-reduce does
                parameter.grad = torch.zeros_like(parameter)
    if want_norm and not hasattr(engine.optimizer, "_global_grad_norm"):  # a plain fp32 optimizer keeps none
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    engine.step()
    if engine.skipped_steps != skipped:
        return float("inf")
    kept = engine.get_global_grad_norm()
    return norm if kept is None else float(kept)


def after_update(engine: Any, step: int) -> None:
    """The objective's own work after an update; it sees whole weights where ZeRO 3 divides them."""
    whole: AbstractContextManager[None] = nullcontext()
    if engine.zero_optimization_partition_weights() and type(engine.module).after_update is not Objective.after_update:
        whole = quiet_deepspeed().zero.GatheredParameters(list(engine.module.parameters()))
    with whole:
        engine.module.after_update(step)


def _prepare_layers(objective: Objective, config: RunConfig) -> None:
    """Recompute the layers' activations, compile the layers, where the config says so."""
    for layer in _layers(objective):
        if config.engine.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if config.engine.compile:
            layer.compile(dynamic=True)


def _layers(module: nn.Module) -> Iterator[Any]:
    """The layers of every encoder and decoder in it."""
    for child in module.modules():
        if isinstance(layers := getattr(child, "layers", None), nn.ModuleList):
            yield from layers


def _restore_buffers(module: nn.Module) -> None:
    """Undo what a cast to bf16 breaks: rotary tables are read as complex numbers, which bf16 has not."""
    for child in module.modules():
        if isinstance(child, RotaryEncoder) and child.freqs.dtype != torch.float32:
            child.freqs = child.freqs.float()
            child.reset_non_persistent_buffers()
