import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from codecssl.pretrain.build import build
from codecssl.pretrain.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, RunConfig
from codecssl.pretrain.data.corpus import TokenCorpus
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.engine import engine
from codecssl.pretrain.engine.distributed import join_ranks
from codecssl.pretrain.engine.engine import deepspeed_config
from codecssl.pretrain.engine.optimizer import schedule
from codecssl.pretrain.ranks import Ranks
from codecssl.tokenize.common.errors import UserError


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
    """The phases are DinoSR's: 3, 47 and 50 % of the steps."""
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


@pytest.mark.parametrize(
    ("chosen", "precision", "stage"), [(None, "fp32", 0), (None, "bf16", 1), (0, "bf16", 0), (3, "fp32", 3)]
)
def test_the_zero_stage(chosen: int | None, precision: Literal["fp32", "bf16"], stage: int) -> None:
    config = RunConfig(engine=EngineConfig(zero_stage=chosen, precision=precision))
    assert deepspeed_config(config)["zero_optimization"] == {"stage": stage}


@pytest.mark.parametrize("stage", [-1, 4])
def test_an_unknown_zero_stage_is_refused(stage: int) -> None:
    with pytest.raises(UserError, match=f"engine.zero_stage: {stage}, must be 0, 1, 2 or 3"):
        EngineConfig(zero_stage=stage)


@pytest.mark.parametrize(("precision", "stage", "fits"), [("fp32", 1, 0), ("bf16", 0, 1), ("bf16", 2, 1)])
def test_muon_refuses_other_zero_stages(precision: Literal["fp32", "bf16"], stage: int, fits: int) -> None:
    with pytest.raises(UserError, match=f"engine.zero_stage: {stage}, but with optim.name muon it must be {fits} in"):
        RunConfig(optim=OptimConfig(name="muon"), engine=EngineConfig(precision=precision, zero_stage=stage))


def test_ranks_that_contradict_each_other_are_refused_before_anything_is_joined() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE None"):
        join_ranks({"RANK": "1"})


def test_data_that_cannot_fill_all_ranks_are_refused(make_shards: Callable[..., Path]) -> None:
    config = RunConfig(
        model=ModelConfig(dim=32, layers=1, heads=2, embedding_init="random"),
        data=DataConfig(dirs=(str(make_shards(count=3)),), batch_frames=400, crop_frames=60),
    )
    with pytest.raises(UserError, match=r"do not fill 64 part\(s\).*use fewer parts \(ranks x engine.accumulation\)"):
        open_data(config, Ranks(rank=0, world_size=64, local_rank=0))


def test_compile_compiles_every_layer_for_any_length(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself is replaced. It is part of torch and takes a minute."""
    config = small_config(make_shards(), engine={"compile": True}, model={"norm": "pre"})
    objective = build(config, TokenCorpus(config.data.dirs), fresh=True)
    compiled: list[tuple[object, dict[str, object]]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    engine.prepare_layers(objective, config.engine)
    assert compiled == [(layer, {"dynamic": True}) for layer in objective.model.encoder.layers]


def test_freed_memory_is_kept() -> None:
    """A large tensor reuses the pages of a freed one, and the kernel need not zero new pages.

    The first reuse may come late: an allocation between two tensors may take the start of a freed one.
    """
    script = """
import platform, resource, torch
from codecssl.pretrain.engine.engine import keep_freed_memory
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = min(new_pages() for _ in range(3))
keep_freed_memory()
print(platform.libc_ver()[0], usual, min(new_pages() for _ in range(12)))
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    if printed[0] != "glibc":
        pytest.skip("the C library is not glibc")
    usual, kept = map(int, printed[1:])
    assert kept < usual / 10
