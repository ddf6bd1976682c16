"""Ranks from what the launchers really set."""

import pytest

from codecssl.slurm.job import Ranks, find_ranks
from codecssl.tokenize.errors import UserError

SRUN = {
    "SLURM_JOB_ID": "1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (3, 4, 1)),
        (SRUN, (5, 8, 1)),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NUM_TASKS"}, (0, 1, 0)),  # in sbatch, outside srun
        (SRUN | {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, (9, 16, 1)),  # torchrun in every task
    ],
)
def test_ranks(environment, expected):
    assert find_ranks(environment) == Ranks(rank=expected[0], world_size=expected[1], local_rank=expected[2])


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "4"}, "RANK None: must be a whole number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank 4: must be from 0"),
        (SRUN | {"RANK": "1", "WORLD_SIZE": "3"}, "WORLD_SIZE 3 does not fit srun's 8 tasks"),
    ],
)
def test_contradictions_are_refused(environment, says):
    with pytest.raises(UserError, match=says):
        find_ranks(environment)
