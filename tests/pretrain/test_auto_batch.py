"""--data.batch_frames auto: the largest micro-batch that fits, the same global batch, the same choice on a resume."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from codecssl.configs.load import to_yaml
from codecssl.pretrain import auto_batch as module
from codecssl.pretrain.auto_batch import dry_run, saved_bytes, smallest_accumulation
from codecssl.pretrain.bench import SYNTHETIC, make_objective
from codecssl.pretrain.cli import main
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.random_batch import random_batch
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.tokenize.common.errors import UserError

Config = Callable[..., RunConfig]
Make = Callable[..., Path]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"]


def test_the_batch_is_halved_after_each_out_of_memory(
    small_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model runs out of memory in its backward pass above a number of frames."""
    config = at_frame_rate(small_config(tmp_path, data={"batch_frames": 6400, "crop_frames": 100}), 50)
    objective = make_objective(config, SYNTHETIC)
    forward, tried = type(objective).forward, []

    def scarce(self: Any, batch: Any, **options: Any) -> Any:
        tried.append(sum(batch.frames))
        loss = forward(self, batch, **options)
        if sum(batch.frames) > 2000:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return loss

    monkeypatch.setattr(type(objective), "forward", scarce)

    def fits(items: int) -> bool:
        return dry_run(objective, random_batch(config, SYNTHETIC, items, 100, label_sizes=()))

    assert smallest_accumulation(config, 1, 100, fits) == 4
    assert tried == [6500, 3300, 1700], "must try a share plus the piece by which shares differ"
    tried.clear()
    assert smallest_accumulation(config, 2, 100, fits) == 2, "each of two ranks must have half of the batch"
    with pytest.raises(UserError, match="a micro-batch of 100 frames, one piece, does not fit into memory"):
        smallest_accumulation(config, 1, 100, lambda items: False)


def test_what_a_step_saves_is_counted_without_the_weights(small_config: Config, tmp_path: Path) -> None:
    config = at_frame_rate(small_config(tmp_path), 50)
    objective = make_objective(config, SYNTHETIC)
    one, two, four = (
        saved_bytes(objective, partial(objective, random_batch(config, SYNTHETIC, items, 50, label_sizes=())))
        for items in (1, 2, 4)
    )
    frames, dim, layers = 50, config.model.dim, config.model.layers
    assert one > 4 * frames * dim * layers * 6, "must count at least six activations per layer"
    assert four - two == pytest.approx(2 * (two - one), rel=0.2)
    weights = sum(4 * parameter.numel() for parameter in objective.parameters())
    assert one < weights, "must not count the embeddings and heads of 12 x 1024 entries"


def test_a_run_writes_its_choice_and_a_resume_keeps_it(
    make_shards: Make, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = small_config(make_shards(), optim={"steps": 6}, log={"log_every": 1, "checkpoint_every": 3})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = ["run", str(tmp_path / "config.yaml"), "--output"]
    auto = [*command, str(tmp_path / "auto"), "--data.batch_frames", "auto"]
    monkeypatch.setattr(module, "saved_bytes", lambda objective, batch: 1 << 20)  # a MiB a piece of 60 frames
    monkeypatch.setattr(module, "_optimizer_bytes", lambda *_: 0)
    monkeypatch.setattr(module, "free_memory", lambda: 9 << 20)  # of which half holds 4 pieces: 100 frames + a piece
    assert main([*auto, "--optim.steps=3"]) == 0
    line = "data.batch_frames auto: micro-batches of 100 frames (the largest that fits), engine.accumulation 4"
    assert line in capsys.readouterr().out
    written = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    assert (written["engine"]["accumulation"], written["data"]["batch_frames"]) == (4, 400)
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 40)
    assert main([*auto, "--optim.steps=6"]) == 0
    assert "micro-batches of 100 frames (as before), engine.accumulation 4" in capsys.readouterr().out
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 10)
    assert main([*command, str(tmp_path / "none"), "--data.batch_frames", "auto"]) == 1
    assert "does not fit into memory; lower data.crop_frames (60)" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "given"), "--engine.accumulation=4", "--optim.steps=3"]) == 0
    assert main([*command, str(tmp_path / "given"), "--engine.accumulation=4", "--optim.steps=6"]) == 0
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")
