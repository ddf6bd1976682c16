"""First steps of every objective against stored losses, to detect accidental changes of the numbers.

After an intended change, `python tests/pretrain/monitor/test_reference_curves.py` writes the losses again.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codecssl.configs.load import from_dict
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.labels.label import LabelConfig, label
from codecssl.pretrain.monitor import reference_curves
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.pretrain.run import run
from codecssl.pretrain.run_folder import read_config
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.write_codes import write_shards

STORED = Path(__file__).with_name("expected_losses.json")
SIZES = (16, 12, 8)
MAE = {
    "objective": {"name": "encodecmae", "gamma": "encodecmae", "quantizer_dropout": 0.0},
    "model": {"norm": "residual", "positions": "sinusoidal", "activation": "relu", "tie_ffn": True},
    "mask": {"kind": "exact", "span_frames": 5},
}
# Fractions of 50 steps that give the schedules of the first record, which has the defaults' fractions of 15 steps.
ONLINE = {"objective": {"target": "online"}}
OBJECTIVES: dict[str, dict[str, dict[str, Any]]] = {
    "codes": {},
    "labels": {"objective": {"target": "labels"}},
    "online_dinosr": {**ONLINE, "online": {"top_layers": 2, "clusters": 16, "ema_start": 0.9, "ema_end": 0.99,
                                           "ema_fraction": 0.0225, "freeze_fraction": 0.15}},
    "online_spidr": {**ONLINE, "online": {"variant": "spidr", "top_layers": 2, "clusters": 16, "ema_start": 0.9}},
    "encodecmae": MAE,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "conv_kernel": 8, "conv_groups": 4, "dropout": 0.0,
              "input_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "embedding_init": "random",
              "embedding_dim": 12},
    "data": {"batch_frames": 400, "crop_frames": 60, "valid_fraction": 0.0},
    "optim": {"steps": 50, "lr": 3e-3, "clip_norm": 1.0, "schedule": "constant", "warmup_fraction": 0.024},
    "log": {"log_every": 1},
}  # fmt: skip


def losses(name: str, folder: Path) -> list[float]:
    """Training losses of an objective, on codes made here."""
    shards = folder / "shards"
    if not shards.exists():
        write_shards(shards, CARD, utterances())
    config = {key: {**SMALL.get(key, {}), **OBJECTIVES[name].get(key, {})} for key in {*SMALL, *OBJECTIVES[name]}}
    config["data"] = {**config["data"], "dirs": [str(shards)]}
    if name == "labels":
        ready = folder / "ready.jsonl"
        rows = ({"id": id, "labels": (codes[0] % 5).tolist()} for id, codes, _ in utterances())
        ready.write_text("".join(json.dumps(row) + "\n" for row in rows))
        label(LabelConfig(source=str(ready), data=(shards,), output=folder / "labels"))
        config["data"]["labels"] = [str(folder / "labels")]
    run(from_dict(RunConfig, config), folder / "runs" / name)
    return [row["loss"] for row in read_rows(folder / "runs" / name / "metrics.jsonl")]


CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0" * 64, sample_rate=16_000, hop_length=320,
    codebook_sizes=SIZES, codes_per_frame=(1,) * len(SIZES), latent_dim=12,
)  # fmt: skip


def utterances() -> Any:
    """Integers from a recurrence, so that no library's generator can change them."""
    state = 1
    for number in range(40):
        frames, held = 20 + 7 * number % 90, []
        for _ in range(frames // 4 + 1):
            state = (1_103_515_245 * state + 12_345) % 2**31
            held += [state >> 20] * 4
        codes = np.outer(np.arange(1, 4), np.array(held[:frames]) % 8) % np.array(SIZES)[:, None]
        yield f"u{number:02d}", codes.astype(np.uint16), {}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_first_losses_are_the_stored_ones(name: str, tmp_path: Path) -> None:
    """50 steps in fp32, equal to 1e-5.

    The first 15 were recorded on 2026-11-21, before batches were packed, and the others were added on 2026-11-30. The
    record is written by running this file. AVX2 instead of AVX-512 changes the losses by up to 2e-7.
    """
    stored = json.loads(STORED.read_text())[name]
    found = losses(name, tmp_path)
    assert len(stored) == 50
    assert found == pytest.approx(stored, rel=1e-5)
    assert sum(found[-3:]) < sum(found[:3]), "the stored losses must be those of a model that learns"


def test_a_run_that_is_stored_finds_its_curve_and_another_does_not(tmp_path: Path) -> None:
    store = tmp_path / "expected.jsonl"
    losses("codes", tmp_path)
    finished = tmp_path / "runs" / "codes"
    frames = sum(codes.shape[1] for _, codes, _ in utterances())
    curve = reference_curves.add(finished, "the test's", frames, store)
    assert reference_curves.add(finished, "again", frames, store).losses == curve.losses
    assert len(store.read_text().splitlines()) == 1, "the same run must be stored once"
    assert curve.losses["train"] == [
        [row["step"], round(row["loss"], 4)] for row in read_rows(finished / "metrics.jsonl")
    ]
    config = read_config(finished)
    key = reference_curves.curve_key(config, CARD.weights_sha256, frames)
    assert reference_curves.find(key, store) is not None
    assert reference_curves.find(reference_curves.curve_key(config, CARD.weights_sha256, frames + 1), store) is None
    slower = replace(config, optim=replace(config.optim, lr=1e-3), log=replace(config.log, log_every=2))
    assert reference_curves.find(reference_curves.curve_key(slower, CARD.weights_sha256, frames), store) is None
    spoken = replace(config, log=replace(config.log, log_every=2))
    assert reference_curves.curve_key(spoken, CARD.weights_sha256, frames) == key
    assert reference_curves.verdict(curve, [(2, 9.0), (99, 1.0)], "train") == (
        f"expected at step 2: train loss {curve.losses['train'][1][1]:.4f} (the test's); this run 9.0000"
    )
    assert reference_curves.verdict(curve, [(99, 1.0)], "train") is None


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        STORED.write_text(json.dumps({name: losses(name, Path(scratch)) for name in OBJECTIVES}, indent=1) + "\n")
