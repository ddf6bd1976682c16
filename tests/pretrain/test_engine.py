import math

import pytest
import torch

from codecssl.pretrain.config import OptimConfig, RunConfig
from codecssl.pretrain.engine import deepspeed_config, join_ranks, schedule
from codecssl.tokenize.errors import UserError


def rates(config: OptimConfig) -> list[float]:
    """The learning rate of each update."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler, seen = schedule(config, optimizer), []
    for _ in range(config.steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_polynomial_rises_linearly_and_falls_linearly() -> None:
    seen = rates(OptimConfig(steps=100, lr=1.0, warmup_fraction=0.2, hold_fraction=0.0, final_scale=0.1))
    for step in range(100):
        up, down = 0.01 + 0.99 * step / 20, 0.1 + 0.9 * (100 - step) / 80
        assert seen[step] == pytest.approx(up if step < 20 else down)


def test_tri_stage_warms_up_holds_and_decays_exponentially() -> None:
    """DinoSR's 3/47/50 %."""
    config = OptimConfig(
        steps=100, lr=2.0, schedule="tri_stage", warmup_fraction=0.03, hold_fraction=0.47, final_scale=0.05
    )
    seen = rates(config)
    assert seen[:3] == pytest.approx([0.02 + 1.98 * step / 3 for step in range(3)])
    assert seen[3:50] == pytest.approx([2.0] * 47)
    assert seen[50:] == pytest.approx([2.0 * math.exp(math.log(0.05) * step / 50) for step in range(50)])


def test_constant_is_constant_after_the_warm_up() -> None:
    seen = rates(OptimConfig(steps=33, lr=0.5, schedule="constant", warmup_fraction=0.1))
    assert seen[0] < 0.01
    assert seen[3:] == pytest.approx([0.5] * 30)


def test_a_run_of_one_step_has_a_schedule() -> None:
    for kind in ("polynomial", "tri_stage", "constant"):
        assert len(rates(OptimConfig(steps=1, schedule=kind))) == 1


def test_the_deepspeed_dictionary_repeats_nothing_of_the_optimizer() -> None:
    made = deepspeed_config(RunConfig(optim=OptimConfig(clip_norm=3.0)))
    assert made["gradient_clipping"] == 3.0
    assert "optimizer" not in made
    assert "scheduler" not in made


def test_more_processes_are_refused() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE: 2"):
        join_ranks({"RANK": "0", "WORLD_SIZE": "2"})
