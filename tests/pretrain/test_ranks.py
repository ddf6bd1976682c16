"""Ranks and rendezvous addresses from the variables that real launchers set."""

import socket

import pytest

from codecssl.pretrain.ranks import Ranks, choose_backend, find_meeting, find_ranks, first_host
from codecssl.tokenize.common.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_JOB_NODELIST": "other[1-9]",
    "SLURM_STEP_NODELIST": "localhost",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29400"}
DEEPSPEED = {  # what `deepspeed --num_gpus 2` gives its second process
    "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        (TORCHRUN, (3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        (SRUN, (5, 8, 1)),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NUM_TASKS"}, (0, 1, 0)),  # in sbatch, outside srun
        (SRUN | {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}, (9, 16, 0)),  # torchrun in every task
        (SRUN | {"RANK": "5", "WORLD_SIZE": "8"}, (5, 8, 1)),  # set by hand, in a script under srun
        (DEEPSPEED, (1, 2, 1)),
        (
            SRUN | TORCHRUN | {"RANK": "7", "WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"},
            (7, 8, 1),
        ),  # renumbers the ranks
    ],
)
def test_ranks(environment, expected):
    assert find_ranks(environment) == Ranks(rank=expected[0], world_size=expected[1], local_rank=expected[2])


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "4"}, "RANK None: must be a whole number"),
        ({"RANK": "1"}, "WORLD_SIZE None: must be a whole number"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_RANK None: must be a whole number"),
        ({"RANK": "one", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "RANK 'one': must be a whole number"),
        ({"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "rank 4: must be from 0"),
        (SRUN | {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}, "WORLD_SIZE 3 does not fit srun's 8 tasks"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE 1 does not fit srun's 8 tasks"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "RANK 0: srun calls this process 5 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4: must be from 0 to the rank, 3"),
    ],
)
def test_contradictions_are_refused(environment, says):
    with pytest.raises(UserError, match=says):
        find_ranks(environment)


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        (TORCHRUN, "node7"),
        (SRUN | TORCHRUN, "node7"),
        (SRUN, "localhost"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "cannot.be.resolved.invalid"}, "127.0.0.1"),
        (
            SRUN | {"SLURM_STEP_NODELIST": "cannot.be.resolved.invalid", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.3"},
            "10.0.0.3",
        ),
        ({k: v for k, v in SRUN.items() if "STEP_NODE" not in k}, "other1"),
    ],
)
def test_where_rank_0_is(environment, address):
    assert find_meeting(environment)[0] == address


def test_ports_of_jobs_and_steps_differ_and_are_the_same_on_all_ranks():
    steps = [SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in (7, 8) for step in (0, 1)]
    ports = [find_meeting(step)[1] for step in steps]
    assert len(set(ports)) == 4
    assert ports == [find_meeting(step | {"SLURM_PROCID": "6"})[1] for step in steps]
    assert all(20_000 <= port < 30_000 for port in ports), "ports must lie below Linux's ephemeral range"
    assert find_meeting(TORCHRUN)[1] == 29_400
    assert find_meeting(SRUN | {"MASTER_PORT": "4000"})[1] == 4000


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"MASTER_PORT": "29400"}, "MASTER_ADDR: not set, and not under srun"),
        ({"MASTER_ADDR": "node7"}, "MASTER_PORT: not set, and not under srun"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT '70000': must be a number from 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "a"}, "MASTER_PORT 'a'"),
        (SRUN | {"MASTER_ADDR": "localhost"}, "MASTER_ADDR localhost: each of the step's 4 nodes would connect"),
    ],
)
def test_a_missing_or_invalid_rendezvous_is_a_one_line_error(environment, says):
    with pytest.raises(UserError, match=says):
        find_meeting(environment)


@pytest.mark.parametrize(
    ("gpus", "asked", "backend"),
    [(0, None, "gloo"), (0, "cpu", "gloo"), (8, None, "nccl"), (8, "cuda", "nccl"), (8, "cpu", "gloo")],
)
def test_the_backend_follows_the_gpus_unless_given(gpus, asked, backend):
    assert choose_backend(gpus, {} if asked is None else {"DS_ACCELERATOR": asked}) == backend


def test_asking_for_gpus_that_are_not_there_is_refused():
    with pytest.raises(UserError, match="DS_ACCELERATOR cuda: this process sees no GPU"):
        choose_backend(0, {"DS_ACCELERATOR": "cuda"})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node7", "node7"),
        ("n[1-2]", "n1"),
        ("node[003-006,009],login1", "node003"),
        ("gpu-a,gpu-b", "gpu-a"),
        ("rack[2-3]node[07-09]", "rack2node07"),
        (f"{socket.gethostname()}", socket.gethostname()),
    ],
)
def test_the_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


def test_gpus_that_slurm_allocated_and_torch_does_not_see_are_an_error() -> None:
    with pytest.raises(UserError, match="SLURM_GPUS_ON_NODE 8: this process sees no GPU"):
        choose_backend(0, {"SLURM_GPUS_ON_NODE": "8"})
    assert choose_backend(0, {"SLURM_GPUS_ON_NODE": "8", "DS_ACCELERATOR": "cpu"}) == "gloo"
    assert choose_backend(0, {"SLURM_GPUS_ON_NODE": "0"}) == "gloo"
    assert choose_backend(8, {"SLURM_GPUS_ON_NODE": "8"}) == "nccl"
