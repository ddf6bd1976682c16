"""Lengths of a config in seconds, at codecs of any frame rate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from codecssl.configs.load import from_dict
from codecssl.pretrain.cli import main
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.pretrain.ranks import Ranks
from codecssl.pretrain.run import run
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.write_codes import write_shards

ALONE = Ranks(rank=0, world_size=1, local_rank=0)
SMALL: dict[str, Any] = {
    "model": {"dim": 16, "layers": 1, "heads": 2, "ffn_dim": 16, "conv_kernel": 4, "conv_groups": 4,
              "embedding_init": "random"},
    "data": {"batch_seconds": 30.0, "crop_seconds": 5.0, "valid_fraction": 0.0},
    "optim": {"steps": 2},
}  # fmt: skip


def shards_at(folder: Path, rate: float, seconds: list[float]) -> Path:
    """Random codes of utterances of these lengths, at `rate` frames per second."""
    card = CodecCard(
        name="synthetic", weights="none", weights_sha256="0" * 64, sample_rate=24_000, hop_length=int(24_000 / rate),
        codebook_sizes=(16, 16), codes_per_frame=(1, 1), latent_dim=4,
    )  # fmt: skip
    random = np.random.default_rng(0)
    frames = [round(rate * each) for each in seconds]
    items = ((f"u{i}", random.integers(0, 16, (2, count)).astype(np.uint16), {}) for i, count in enumerate(frames))
    write_shards(folder, card, items)
    return folder


def test_at_50_hz_the_defaults_are_huberts() -> None:
    config = at_frame_rate(RunConfig(), 50)
    assert (config.data.batch_frames, config.data.crop_frames, config.data.min_frames) == (140_000, 780, 20)
    assert (config.mask.span_frames, config.mask.start_probability) == (10, 0.08)
    assert at_frame_rate(config, 50) == config


@pytest.mark.parametrize("rate", [12.5, 75.0])
def test_as_much_is_masked_at_any_rate(rate: float, tmp_path: Path) -> None:
    shards = shards_at(tmp_path / "shards", rate, [10.0] * 200)
    config = from_dict(RunConfig, {**SMALL, "data": {**SMALL["data"], "dirs": [str(shards)], "batch_seconds": 2000.0}})
    train, _, _ = open_data(config, ALONE)
    [batch] = train.step(0)
    assert max(batch.frames) == round(5 * rate), "crops must have 5 s"
    assert float(batch.mask.float().mean()) == pytest.approx(1 - 0.92**10, abs=0.04), (
        "must mask as many frames as HuBERT"
    )


def test_at_12_hz_no_utterance_of_half_a_second_vanishes(tmp_path: Path, capsys: Any) -> None:
    seconds = [0.5, 1.0, 1.5] * 20 + [0.2] * 7
    shards = shards_at(tmp_path / "shards", 12.5, seconds)
    config = from_dict(RunConfig, {**SMALL, "data": {**SMALL["data"], "dirs": [str(shards)]}})
    train, _, _ = open_data(config, ALONE)
    assert train.plan.pieces_per_epoch == 60
    run(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "data.min_seconds 0.40 (5 frames at 12.5 a second) leaves out 7 of 67 utterances, 1.1 s of audio" in printed


def test_lengths_in_frames_are_kept() -> None:
    given = from_dict(RunConfig, {"data": {"crop_frames": 300, "min_frames": 30}, "mask": {"span_frames": 15}})
    config = at_frame_rate(given, 12.5)
    assert (config.data.crop_frames, config.data.min_frames, config.mask.span_frames) == (300, 30, 15)
    assert config.data.crop_seconds == 24.0
    assert at_frame_rate(given, 75).data.crop_seconds == 4.0


def test_what_the_command_line_says_wins_over_the_file(tmp_path: Path, capsys: Any) -> None:
    shards_at(tmp_path / "shards", 12.5, [1.0])
    (tmp_path / "frames.yaml").write_text("data: {crop_frames: 300}\n")
    for words, crop in (
        (["codec2vec_tiny_codes", "--data.crop_frames", "60"], 60),
        ([str(tmp_path / "frames.yaml"), "--data.crop_seconds", "4"], 50),
        ([str(tmp_path / "frames.yaml")], 300),
    ):
        assert main(["run", *words, "--print_config"]) == 0
        config = from_dict(RunConfig, yaml.safe_load(capsys.readouterr().out))
        assert at_frame_rate(config, 12.5).data.crop_frames == crop


def test_a_run_of_an_earlier_release_states_frames_and_resumes(tmp_path: Path) -> None:
    shards = shards_at(tmp_path / "shards", 50, [4.0] * 30)
    frames = {"batch_frames": 1500, "crop_frames": 250, "min_frames": 20, "valid_frames": 60_000}
    mask = {"span_frames": 10, "start_probability": 0.08}
    old = {**SMALL, "data": {**frames, "dirs": [str(shards)], "valid_fraction": 0.0}, "mask": mask}
    run(from_dict(RunConfig, old), tmp_path / "run")
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for section in ("data", "mask"):
        stored[section] = {key: value for key, value in stored[section].items() if "second" not in key}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(stored))
    new = {**SMALL, "data": {**SMALL["data"], "dirs": [str(shards)]}, "optim": {"steps": 3}}
    run(from_dict(RunConfig, new), tmp_path / "run")
    assert "step-00000003" in [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    other = {**new, "data": {**new["data"], "crop_seconds": 4.0}}
    with pytest.raises(UserError, match=r"data.crop_seconds 5.0, this run has 4.0|data.crop_frames 250"):
        run(from_dict(RunConfig, other), tmp_path / "run")
