"""The training engine: DeepSpeed, every setting derived from our config; one process needs no launcher."""

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.pretrain.config import OptimConfig, RunConfig
from codecssl.pretrain.fs2 import PolynomialDecayLR, RotaryEncoder, TriStageLR
from codecssl.pretrain.objective import Objective
from codecssl.slurm.job import Ranks, find_ranks
from codecssl.tokenize.errors import UserError


def join_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Join the process group that the environment describes (`find_ranks`), or be alone.

    Must come before the first import of deepspeed, which decides then which accelerator it uses.
    """
    ranks = find_ranks(os.environ if environment is None else environment)
    if ranks.world_size != 1:
        raise UserError(f"WORLD_SIZE: {ranks.world_size}, but training runs in one process; start one, or unset it")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not torch.distributed.is_initialized():
        # A store in this process's memory: a lone process needs no port, and leaves nothing in the
        # environment for its children to stumble over.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        _quiet_deepspeed().init_distributed(dist_backend=backend, verbose=False)
    return ranks


def start_engine(objective: Objective, config: RunConfig) -> Any:
    """A DeepSpeed engine around model, heads, torch's AdamW and a fairseq2 schedule."""
    deepspeed = _quiet_deepspeed()
    optim = config.optim
    optimizer = torch.optim.AdamW(
        objective.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    exact = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=objective,
        optimizer=optimizer,
        lr_scheduler=lambda basic: schedule(optim, basic),
        config=deepspeed_config(config),
        dist_init_required=False,
    )
    if config.engine.precision == "bf16":
        _restore_fp32(engine.module, exact)
    return engine


def deepspeed_config(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's dictionary. Learning rate, schedule and batch have their one home in our config."""
    bf16 = config.engine.precision == "bf16"
    return {
        # The plan makes the batches, in frames; DeepSpeed only insists on some number of items.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.engine.accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "bf16": {"enabled": bf16},
        # Stage 1 is the one whose bf16 optimizer adds gradients up in fp32 and lets its fp32 weights be read.
        "zero_optimization": {"stage": 1 if bf16 else 0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own compiles C++ first
        "steps_per_print": 10**9,
    }


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


def take_step(engine: Any, *, want_norm: bool) -> float | None:
    """Let the engine step; an update happens after the last micro-batch. Returns the norm of the gradient."""
    norm = None
    if want_norm and not hasattr(engine.optimizer, "_global_grad_norm"):  # a plain fp32 optimizer keeps none
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))
    engine.step()
    kept = engine.get_global_grad_norm()
    return norm if kept is None else float(kept)


def fp32_weights(module: nn.Module) -> dict[str, Tensor]:
    """The module's weights in fp32 on the CPU: the optimizer's master copy where the engine has one."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        value = parameter if master is None else master
        weights[name] = value.detach().to("cpu", torch.float32).clone()
    return weights


def _quiet_deepspeed() -> Any:
    """deepspeed, imported late (seconds) and told to speak of errors only."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A lone process exchanges nothing, so the C++ all-reduce, half a minute of compiling at the first start,
    # is not built.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _restore_fp32(module: nn.Module, exact: Mapping[str, Tensor]) -> None:
    """Undo what casting a module to bf16 breaks: its master weights start rounded, and so do its buffers.

    The codec's embeddings are exact only in fp32; rotary tables are read as complex numbers, which bf16 has
    not.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in module.named_parameters():
        safe_set_full_fp32_param(parameter, exact[name].to(parameter.device))
    for child in module.modules():
        if isinstance(child, RotaryEncoder):
            child.freqs = child.freqs.float()
            child.reset_non_persistent_buffers()
