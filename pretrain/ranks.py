"""Rank of this process and the rendezvous address, from torchrun, DeepSpeed or srun, or of a single process."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from codecssl.tokenize.common.errors import UserError

_FIRST_PORT, _PORTS = 20_000, 10_000
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Rank of this process and size of the process group."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this node."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank {self.rank}: must be from 0 to world size - 1, which is {self.world_size - 1}")
        if not 0 <= self.local_rank <= self.rank:
            raise UserError(
                f"local rank {self.local_rank}: must be from 0 to the rank, {self.rank}; let one launcher set both"
            )


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read RANK, WORLD_SIZE and LOCAL_RANK (torchrun, DeepSpeed), else srun's variables, else return a single rank.

    A process inside sbatch but outside srun is a single rank, regardless of the number of tasks of the job. Only a job
    step has several ranks. Raises UserError for contradictory variables of the launcher and srun.
    """
    step_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "WORLD_SIZE" in environment or "RANK" in environment:
        ranks = _read(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        if ranks.world_size % step_tasks:
            raise UserError(
                f"WORLD_SIZE {ranks.world_size} does not fit srun's {step_tasks} tasks; start one torchrun per task, "
                "or unset RANK and WORLD_SIZE and let srun start every process"
            )
        _refuse_a_frozen_rank(ranks, step_tasks, environment)
        return ranks
    if step_tasks > 1:
        return _read(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return Ranks(rank=0, world_size=1, local_rank=0)


def find_meeting(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return (address, port) of rank 0: MASTER_ADDR and MASTER_PORT (torchrun, DeepSpeed), else from srun's variables.

    Under srun rank 0 is on the first node of the step. The port is derived from the job and the step; two steps on one
    node therefore have different ports. Raises UserError if no variable gives the address.
    """
    port = environment.get("MASTER_PORT") or str(_slurm_port(environment))
    if not port.isdigit() or not 0 < int(port) < 65_536:
        raise UserError(f"MASTER_PORT {port!r}: must be a number from 1 to 65535; set it, or let the launcher do it")
    address = environment.get("MASTER_ADDR") or _slurm_address(environment)
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    if environment.get("MASTER_ADDR") in _LOOPBACK and nodes > 1:
        raise UserError(f"MASTER_ADDR {address}: each of the step's {nodes} nodes would connect to itself; unset it")
    return address, int(port)


def choose_backend(gpus: int, environment: Mapping[str, str] = os.environ) -> str:
    """Return nccl if this process sees GPUs, else gloo. DS_ACCELERATOR=cpu selects gloo in either case.

    Raises UserError if DS_ACCELERATOR requests GPUs and there are none, or if Slurm allocated GPUs that torch does not
    see. Otherwise a driver or a container without CUDA would silently train on the CPUs for days.
    """
    asked = environment.get("DS_ACCELERATOR")
    if asked == "cuda" and not gpus:
        raise UserError("DS_ACCELERATOR cuda: this process sees no GPU; ask for some (--gpus-per-node), or unset it")
    given = environment.get("SLURM_GPUS_ON_NODE", "0")
    if given not in ("", "0") and not gpus and asked != "cpu":
        raise UserError(
            f"SLURM_GPUS_ON_NODE {given}: this process sees no GPU; check the driver, torch's CUDA build and the"
            " container's --nv, or set DS_ACCELERATOR=cpu to train on CPUs"
        )
    return "nccl" if gpus and asked != "cpu" else "gloo"


def first_host(nodelist: str) -> str:
    """Return the first name of a Slurm node list: node003 for node[003-006,009],login1."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def _refuse_a_frozen_rank(ranks: Ranks, step_tasks: int, environment: Mapping[str, str]) -> None:
    """Raise UserError for a RANK exported before srun, which has the same value in all tasks.

    Processes of torchrun are exempt, because torchrun assigns its own ranks.
    """
    own = environment.get("SLURM_PROCID", "")
    if "TORCHELASTIC_RUN_ID" in environment or step_tasks == 1 or ranks.world_size != step_tasks:
        return
    if own.isdigit() and int(own) != ranks.rank:
        raise UserError(
            f"RANK {ranks.rank}: srun calls this process {own} of {step_tasks}; unset RANK and WORLD_SIZE and let srun"
            " number them"
        )


def _slurm_address(environment: Mapping[str, str]) -> str:
    if environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_JOB_NUM_NODES")) == "1":
        return "127.0.0.1"  # works where a node cannot resolve its own name
    nodelist = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodelist is None:
        raise UserError("MASTER_ADDR: not set, and not under srun; start with torchrun, deepspeed or srun, or set it")
    host, other = first_host(nodelist), environment.get("SLURM_LAUNCH_NODE_IPADDR")
    if other is not None and not _resolves(host):
        return other  # right where srun was called in the batch script, which runs on the first node
    return host


def _slurm_port(environment: Mapping[str, str]) -> int:
    job, step = environment.get("SLURM_JOB_ID"), environment.get("SLURM_STEP_ID", "0")
    if job is None or not job.isdigit():
        raise UserError("MASTER_PORT: not set, and not under srun; start with torchrun, deepspeed or srun, or set it")
    return _FIRST_PORT + (int(job) * 31 + (int(step) if step.isdigit() else 0)) % _PORTS


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def _read(environment: Mapping[str, str], rank: str, world_size: str, local_rank: str) -> Ranks:
    values = []
    alone = environment.get(world_size) == "1"
    for name, default in ((rank, None), (world_size, None), (local_rank, environment.get("SLURM_LOCALID"))):
        text = environment.get(name, "0" if alone and name == local_rank else default)
        if text is None or not text.isdigit():
            raise UserError(
                f"{name} {text!r}: must be a whole number; the launcher sets {rank}, {world_size} and {local_rank}"
                " together: set all of them or none"
            )
        values.append(int(text))
    return Ranks(rank=values[0], world_size=values[1], local_rank=values[2])
