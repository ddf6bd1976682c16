"""The largest micro-batch that fits into memory (`--data.batch_frames auto`).

The global batch stays `data.batch_frames`; `engine.accumulation` is doubled until a share of it fits. On a GPU a share
fits if a forward and a backward pass of the longest bucket succeed next to memory set aside for the optimizer. On a CPU
it fits if the tensors saved for the backward pass take at most half of the free memory, divided by the ranks.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.pretrain import run_folder
from codecssl.pretrain.build import build_objective
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.corpus import TokenCorpus
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.data.random_batch import random_batch
from codecssl.pretrain.engine.distributed import ProcessGroup
from codecssl.pretrain.engine.engine import prepare_layers, restore_buffers, zero_stage
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.objectives.objective import Objective
from codecssl.tokenize.common.errors import UserError

_HEADROOM = 0.1
"""Fraction of a GPU's memory that is left for communication buffers and fragmentation."""
_CPU_SHARE = 0.5
"""Fraction of the free memory of a machine that the saved tensors of all its ranks may take."""


def fit_batch(config: RunConfig, corpus: TokenCorpus, output: Path, group: ProcessGroup) -> tuple[RunConfig, str]:
    """Return the config with the `engine.accumulation` that fits every rank, and a line for the user.

    A run that has begun keeps its choice, so that a resume is bit-exact; it is measured again with another number of
    ranks or another device. Raises UserError if not even one piece of data.crop_frames fits.
    """
    before = group.once(lambda: recorded(config, output, group))
    accumulation = before or int(group.largest(group.together(lambda: _measure(config, corpus, group)))[0])
    frames = config.data.batch_frames // (group.world_size * accumulation)
    how = "as before" if before else "the largest that fits"
    line = f"data.batch_frames auto: micro-batches of {frames} frames ({how}), engine.accumulation {accumulation}"
    return replace(config, engine=replace(config.engine, accumulation=accumulation)), line


def device_name(device: torch.device) -> str:
    """Return the model of a GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def recorded(config: RunConfig, output: Path, group: ProcessGroup) -> int | None:
    """Return the choice of an earlier start with the same batch, ranks and device, or None."""
    if not run_folder.has_begun(output):
        return None
    before, data = run_folder.read_config(output), run_folder.read_data(output)
    same = before.data.auto_batch and before.data.batch_frames == config.data.batch_frames
    place = {"world_size": group.world_size, "device": device_name(group.device)}
    return before.engine.accumulation if same and data.get("ranks") == place else None


def smallest_accumulation(config: RunConfig, world_size: int, longest: int, fits: Callable[[int], bool]) -> int:
    """Double `engine.accumulation` until a share of the global batch fits.

    longest: frames of the longest piece. fits(items): True if a micro-batch of so many longest pieces fits.
    """
    accumulation = config.engine.accumulation
    while (share := config.data.batch_frames / (world_size * accumulation)) > longest:
        if fits(int(-(-share // longest)) + 1):  # shares differ by at most one piece
            return accumulation
        accumulation *= 2
    raise UserError(
        f"data.batch_frames auto: a micro-batch of {longest} frames, one piece, does not fit into memory; lower"
        f" data.crop_frames ({config.data.crop_frames}) or the model, or set engine.precision bf16,"
        " engine.activation_checkpointing true or engine.zero_stage 2"
    )


def _measure(config: RunConfig, corpus: TokenCorpus, group: ProcessGroup) -> int:
    mel = corpus.require_mel(config.model.input)
    model = untrained(config.model, corpus.card, None, config.seed, mel)
    objective = build_objective(config, model, corpus.label_sizes).train()
    prepare_layers(objective, replace(config.engine, compile=False))
    longest = min(int(corpus.frames.max()), config.data.crop_frames)

    def batch(items: int) -> Batch:
        return random_batch(config, corpus.card, items, longest, label_sizes=corpus.label_sizes, mel=mel)

    if group.device.type == "cpu":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", group.world_size))
        room = _CPU_SHARE * free_memory() / ranks - _optimizer_bytes(objective, config, group.world_size)
        each = saved_bytes(objective, lambda: objective(batch(1)))
        return smallest_accumulation(config, group.world_size, longest, lambda items: items * each <= room)
    return _measure_on_gpu(config, objective, batch, longest, group)


def _measure_on_gpu(
    config: RunConfig, objective: Objective, batch: Callable[[int], Batch], longest: int, group: ProcessGroup
) -> int:
    device = group.device
    aside = int(_HEADROOM * torch.cuda.mem_get_info(device)[1])
    aside += _optimizer_bytes(objective, config, group.world_size)
    objective.to(device, torch.bfloat16 if config.engine.precision == "bf16" else torch.float32)
    restore_buffers(objective)
    objective.place(device)
    try:
        kept: Tensor | None = torch.empty(aside, dtype=torch.uint8, device=device)
        return smallest_accumulation(
            config, group.world_size, longest, lambda n: dry_run(objective, batch(n).to(device))
        )
    except torch.OutOfMemoryError as error:
        raise UserError(f"engine: the optimizer's {aside >> 20} MiB do not fit; raise engine.zero_stage") from error
    finally:
        kept = None  # noqa: F841
        objective.to("meta")
        torch.cuda.empty_cache()


def dry_run(objective: Objective, batch: Batch) -> bool:
    """Return False if a forward and a backward pass run out of memory. The gradients stay, as in a real step."""
    try:
        objective(batch).total.backward()
    except torch.OutOfMemoryError:
        pass
    else:
        return True
    objective.zero_grad(set_to_none=True)  # outside of the handler, whose traceback holds the activations
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def saved_bytes(module: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that a forward pass saves for the backward pass, without the weights of the module."""
    sizes: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(sizes.values())


def free_memory() -> int:
    """Return the bytes of memory that processes of this machine may still take."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _optimizer_bytes(objective: Objective, config: RunConfig, ranks: int) -> int:
    """Return the bytes of fp32 weights, moments and gradients of the engine that a plain backward pass lacks."""
    half = config.engine.precision == "bf16"
    total = {
        0: 18.0 if half else 16.0,
        1: (6 if half else 8) + 12 / ranks,
        2: (2 if half else 4) + 16 / ranks,
        3: (18 if half else 20) / ranks,
    }[zero_stage(config)]
    return int(max(0.0, total - (4 if half else 8)) * sum(p.numel() for p in objective.parameters() if p.requires_grad))
