"""Checkpoints on disk: whole or not there, the newest kept, damage found."""

import json
import resource
from pathlib import Path

import pytest
import torch

from codecssl.pretrain.engine import checkpoint
from codecssl.pretrain.engine.checkpoint import Saved
from codecssl.tokenize.common.errors import UserError


def saved(step: int) -> Saved:
    weights = {
        "model.a": torch.full((3, 5), float(step)),
        "heads.b": torch.arange(4.0),
        "model.tiny": torch.tensor(1e-42),
    }
    moments = {
        key: {name: factor * value for name, value in weights.items()}
        for key, factor in (("exp_avg", 3.0), ("exp_avg_sq", 7.0))
    }
    extra = {"counts": torch.arange(6).reshape(2, 3).t(), "teacher/w": torch.ones(2, dtype=torch.float64)}
    return Saved({"format": checkpoint.FORMAT, "step": step, "losses": [0.1, 1 / 3]}, weights, moments, extra)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path) -> None:
    """One bit of the last byte: the size stays."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = saved(7)
    loaded = checkpoint.load(checkpoint.save(made, tmp_path, keep=1))
    assert loaded.state == made.state
    assert loaded.step == 7
    for left, right in (
        (made.weights, loaded.weights), (made.extra, loaded.extra),
        *((made.moments[key], loaded.moments[key]) for key in ("exp_avg", "exp_avg_sq")),
    ):  # fmt: skip
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert torch.equal(value, right[name]), name
            assert value.dtype == right[name].dtype


def test_the_newest_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.partial").mkdir()
    for step in (1, 2, 3, 4):
        checkpoint.save(saved(step), tmp_path, keep=2)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").resolve().name == "step-00000004"


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.json"])
def test_a_corrupt_checkpoint_is_found_and_set_aside(tmp_path: Path, file: str) -> None:
    for step in (1, 2, 3):
        checkpoint.save(saved(step), tmp_path, keep=3)
    flip(tmp_path / "step-00000003" / file)
    (tmp_path / "step-00000002" / file).unlink()
    found, corrupt = checkpoint.newest_intact(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert corrupt == [tmp_path / "step-00000003", tmp_path / "step-00000002"]
    assert [checkpoint.damage(path) for path in corrupt] == [file, file]
    checkpoint.set_aside(corrupt[0])
    checkpoint.save(saved(2), tmp_path, keep=2)  # the corrupt one must not count
    assert names(tmp_path) == ["corrupt-step-00000003", "latest", "step-00000001", "step-00000002"]


def test_where_all_are_corrupt_the_run_does_not_silently_begin_again(tmp_path: Path) -> None:
    assert checkpoint.newest_intact(tmp_path / "none yet") == (None, [])
    flip(checkpoint.save(saved(1), tmp_path, keep=1) / "model.safetensors")
    with pytest.raises(UserError, match=r"step-00000001: model.safetensors is corrupt, and there is no older"):
        checkpoint.newest_intact(tmp_path)


@pytest.mark.parametrize("room", [0, 400])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path, room: int) -> None:
    checkpoint.save(saved(1), tmp_path, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(
            UserError, match="could not be written.*make room.*step-00000001 is the last good"
        ) as reported:
            checkpoint.save(saved(2), tmp_path, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(reported.value)
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert checkpoint.newest_intact(tmp_path) == (tmp_path / "step-00000001", [])


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    broken = saved(2)
    broken.weights["heads.b"][2] = float("nan")
    with pytest.raises(UserError, match="step 2: heads.b is not finite; lower optim.lr"):
        checkpoint.save(broken, tmp_path, keep=1)
    assert names(tmp_path) == []


def test_checkpoints_of_another_format_are_refused(tmp_path: Path) -> None:
    state = checkpoint.save(saved(2), tmp_path, keep=1) / "state.json"
    state.write_text(json.dumps({"format": 99, "step": 2}))
    with pytest.raises(UserError, match="has format 99, this version reads 2"):
        checkpoint.load(state.parent)
    (tmp_path / "step-00000001" / "engine").mkdir(parents=True)
    with pytest.raises(UserError, match="step-00000001: uses DeepSpeed's checkpoint format"):
        checkpoint.newest_intact(tmp_path)
