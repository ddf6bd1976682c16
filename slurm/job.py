"""Who this process is among its peers: from torchrun or DeepSpeed, from srun, or alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from codecssl.tokenize.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    """Among the processes of this node."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank}: must be from 0 to world size - 1, which is {self.world_size - 1}")


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read RANK, WORLD_SIZE and LOCAL_RANK (torchrun, DeepSpeed), else srun's variables, else be alone.

    Inside sbatch but outside srun a process is alone, however many tasks the job has: only a step has peers.
    Raises UserError when launcher and srun contradict each other.
    """
    launched = "WORLD_SIZE" in environment
    step_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if launched:
        ranks = _read(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        if step_tasks > 1 and ranks.world_size not in (step_tasks, 1) and ranks.world_size % step_tasks:
            raise UserError(
                f"WORLD_SIZE {ranks.world_size} does not fit srun's {step_tasks} tasks; start one torchrun per task, "
                "or unset WORLD_SIZE and let srun start every process"
            )
        return ranks
    if step_tasks > 1:
        return _read(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return Ranks(rank=0, world_size=1, local_rank=0)


def _read(environment: Mapping[str, str], rank: str, world_size: str, local_rank: str) -> Ranks:
    values = []
    for name, default in ((rank, None), (world_size, None), (local_rank, "0")):
        text = environment.get(name, default)
        if text is None or not text.isdigit():
            raise UserError(
                f"{name} {text!r}: must be a whole number; the launcher sets {rank} and {world_size} together"
            )
        values.append(int(text))
    return Ranks(rank=values[0], world_size=values[1], local_rank=values[2])
