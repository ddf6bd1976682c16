"""Whole runs: they learn, repeat and resume bit for bit, and refuse contradictory settings."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_codec
from safetensors.torch import load_file

from codecssl.pretrain import build as build_module
from codecssl.pretrain.build import build
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.corpus import TokenCorpus
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.engine import checkpoint
from codecssl.pretrain.engine.distributed import PREEMPTED
from codecssl.pretrain.engine.optimizer import schedule
from codecssl.pretrain.export.export import export, load_pretrained
from codecssl.pretrain.export.pretrained import from_pretrained
from codecssl.pretrain.export.sources import seen_sources
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.pretrain.ranks import Ranks
from codecssl.pretrain.run import run
from codecssl.pretrain.training import Training
from codecssl.tokenize.common import files
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.write_codes import write_shards

MACHINE = {
    "frames_per_second",
    "audio_hours_per_hour",
    "step_seconds",
    "data_wait_percent",
    "seconds_left",
    "memory_gib",
    "tflops",
}

Make = Callable[..., Path]
Config = Callable[..., RunConfig]


def rows(path: Path) -> list[dict[str, object]]:
    """The metrics that do not depend on the machine's speed."""
    return [{k: v for k, v in row.items() if k not in MACHINE} for row in read_rows(path / "metrics.jsonl")]


def tensors(checkpoint: Path | None) -> dict[str, torch.Tensor]:
    """Weights and optimizer."""
    assert checkpoint is not None
    files = (checkpoint / "model.safetensors", checkpoint / "training.safetensors")
    return {name: value.clone() for file in files for name, value in load_file(file).items()}  # no maps of the files


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors are equal bit for bit."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def forget_after(path: Path, step: int, into: Path) -> Path:
    """A copy of a run as a crash after checkpoint `step` leaves it: later rows are still in the metrics."""
    shutil.copytree(path, into, symlinks=True)
    for found in checkpoint.whole(into / "checkpoints"):
        if int(found.name.removeprefix("step-")) > step:
            shutil.rmtree(found)
    return into


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_equals_uninterrupted_bit_for_bit(
    make_shards: Make, small_config: Config, tmp_path: Path, precision: str
) -> None:
    """A run resumed at step 10 of 20, before an epoch boundary, has equal weights, optimizer, schedule and metrics."""
    dirs = make_shards(count=50)
    config = small_config(dirs, engine={"precision": precision, "accumulation": 2})
    steps_per_epoch = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))[0].plan.steps_per_epoch
    assert any(10 < boundary < 20 for boundary in range(0, 20, steps_per_epoch)), (
        "an epoch must end in the resumed part"
    )
    run(config, tmp_path / "whole")
    resumed = forget_after(tmp_path / "whole", 10, tmp_path / "resumed")
    run(config, resumed)
    ends = [path / "checkpoints" / "step-00000020" for path in (tmp_path / "whole", resumed)]
    assert_same(*map(tensors, ends))
    assert rows(tmp_path / "whole") == rows(resumed)
    steps = [row["step"] for row in rows(resumed) if row["split"] == "train"]
    assert steps == [3, 6, 9, 12, 15, 18, 20], "each logged step must occur once"


def test_a_short_run_learns_and_repeats_bit_for_bit(make_shards: Make, small_config: Config, tmp_path: Path) -> None:
    config = small_config(make_shards(count=50))
    torch.manual_seed(1)  # the caller's generator must not matter
    run(config, tmp_path / "a")
    torch.manual_seed(2)
    run(config, tmp_path / "b")
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    ends = [checkpoint.newest(tmp_path / name / "checkpoints") for name in "ab"]
    assert_same(*map(tensors, ends))
    losses = {
        split: [row["loss"] for row in rows(tmp_path / "a") if row["split"] == split] for split in ("train", "valid")
    }
    guess = np.mean([np.log(size) for size in (16, 12, 8)])
    assert losses["train"][0] == pytest.approx(guess, rel=0.05), "an untrained model must be at chance level"
    assert losses["train"][-1] < losses["train"][0] - 0.1
    assert losses["valid"][-1] < losses["valid"][0]
    for name in ("curves.png", "config.yaml", "versions.json", "tensorboard", "checkpoints/latest"):
        assert (tmp_path / "a" / name).exists(), name


def test_the_engine_matches_a_plain_torch_loop(make_shards: Make, small_config: Config, tmp_path: Path) -> None:
    """DeepSpeed, accumulation, clipping and schedule against torch.optim.AdamW on whole batches, by hand."""
    config = small_config(
        make_shards(count=50), engine={"accumulation": 3},
        model={"positions": "rotary", "dropout": 0.0, "input_dropout": 0.0, "attention_dropout": 0.0,
               "layerdrop": 0.0},
        optim={"steps": 6, "clip_norm": 0.05}, log={"checkpoint_every": 6},
    )  # fmt: skip
    run(config, tmp_path / "run")
    train = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))[0]
    whole = build(config, train.corpus, fresh=True).train()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=3e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    scheduler = schedule(config.optim, optimizer)
    for step in range(6):
        loss = sum(whole(batch).total for batch in train.step(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.05)
        assert norm > 0.05, "clipping must be at work"
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    trained = load_file(found / "model.safetensors")
    for name, parameter in whole.model.named_parameters():
        assert torch.allclose(trained[name], parameter, atol=2e-5), name


def test_muon_matches_torch_muon(make_shards: Make, small_config: Config, tmp_path: Path) -> None:
    """DeepSpeed's Muon with our scale against torch.optim.Muon with Liu et al.'s, and AdamW for the other weights."""
    config = small_config(
        make_shards(count=50), model={"dropout": 0.0, "input_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0},
        optim={"name": "muon", "steps": 6, "clip_norm": 0.0, "weight_decay": 10.0, "lr": 1e-2},
        log={"checkpoint_every": 6},
    )  # fmt: skip
    run(config, tmp_path / "run")
    train = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))[0]
    whole = build(config, train.corpus, fresh=True).train()
    start = {name: parameter.detach().clone() for name, parameter in whole.model.named_parameters()}
    inner = {name: p for name, p in whole.named_parameters() if ".layers." in name and p.ndim == 2}
    assert {p.shape for p in inner.values()} == {(32, 32), (48, 32), (32, 48)}
    others = [p for name, p in whole.named_parameters() if name not in inner]
    pair: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=10.0),
        torch.optim.Muon(
            list(inner.values()), lr=1e-2, momentum=0.95, weight_decay=10.0, adjust_lr_fn="match_rms_adamw"
        ),
    ]
    schedulers = [schedule(config.optim, optimizer) for optimizer in pair]
    for step in range(6):
        sum(whole(batch).total for batch in train.step(step)).backward()
        for one in (*pair, *schedulers):
            one.step()
        whole.zero_grad()
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    trained = load_file(found / "model.safetensors")
    for name, parameter in whole.model.named_parameters():
        moved = float((parameter - start[name]).norm())
        assert moved > 0.0, name
        # the iteration is in bf16: small singular values of a gradient come back with the noise of rounding
        assert float((trained[name] - parameter).norm()) < 0.1 * moved + 1e-6, name


def test_export_loads_without_deepspeed_and_is_the_checkpoint(
    make_shards: Make, small_config: Config, tmp_path: Path
) -> None:
    config = small_config(make_shards(), engine={"precision": "bf16"}, optim={"steps": 4})
    run(config, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    model = load_pretrained(tmp_path / "model")
    assert model.config == config.model
    assert model.card.codebook_sizes == (16, 12, 8)
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    saved = load_file(found / "model.safetensors")
    assert_same(dict(model.named_parameters()), saved)
    rounded = sum(int((value != value.bfloat16().float()).sum()) for value in saved.values())
    assert rounded > 1000, "the fp32 master weights must be exported, not their bf16 copies"
    states = model.extract(torch.zeros(1, 3, 9, dtype=torch.int64), [9])
    assert [tuple(state.shape) for state in states] == [(1, 9, 32)] * 3
    summary = json.loads((tmp_path / "model" / "config.json").read_text())["training"]
    assert summary["step"] == 4
    assert summary["metrics"]["train"]["step"] == 4
    card = (tmp_path / "model" / "README.md").read_text()
    loss = summary["metrics"]["train"]["loss"]
    for part in ("| `shards` | 40 |", "| train | 4 | " + f"{loss:.4f}", "`engine.precision`: bf16", "(16 12 8)"):
        assert part in card, part
    assert (tmp_path / "model" / "curves.png").read_bytes() == (tmp_path / "run" / "curves.png").read_bytes()
    heard = [utterance.source_sha256 for utterance in Shards(config.data.dirs[0]).utterances()]
    reported = seen_sources(tmp_path / "model")
    assert reported is not None
    assert reported.count([*heard, "0" * 64]) == (40, 41)
    first = (tmp_path / "model" / "config.json").read_bytes()
    (tmp_path / "model" / ".config.json.0a1b.tmp").touch()  # of an export that was killed
    export(tmp_path / "run", tmp_path / "model")  # again: replaced by the same
    assert (tmp_path / "model" / "config.json").read_bytes() == first
    (tmp_path / "model" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty and no earlier export"):
        export(tmp_path / "run", tmp_path / "model")
    with pytest.raises(UserError, match="not an exported model"):
        load_pretrained(tmp_path / "run" / "checkpoints")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors is missing or damaged.*export it again"):
        load_pretrained(tmp_path / "model")


def test_a_start_that_was_killed_before_its_config_was_written(
    make_shards: Make, small_config: Config, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for left in ("data.json", ".versions.json.0a1b.tmp"):
        (tmp_path / "run" / left).write_text("{}")
    config = small_config(make_shards(), optim={"steps": 1})
    run(config, tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="other: has files in it but is not a run folder"):
        run(config, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]


def test_a_run_that_is_started_twice_trains_once(
    make_shards: Make, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PATIENCE", {"here": 0.3, "elsewhere": 0.3})
    config = small_config(make_shards(), optim={"steps": 1})
    with (
        files.alone_in(tmp_path / "run"),
        pytest.raises(UserError, match=r"run: process \d+ on .* is at work there; wait for it"),
    ):
        run(config, tmp_path / "run")
    run(config, tmp_path / "run")
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


WITHOUT = """
import sys, types
sys.modules["deepspeed"] = None
sys.modules["fairseq2n"] = types.ModuleType("fairseq2n")  # as where its native part does not fit the installed torch
sys.modules["fairseq2n"].__dict__.update(DOC_MODE=True, IS_STUB=True, __version__="0.8.1")
import torch
from codecssl.pretrain.export.pretrained import from_pretrained
torch.save(from_pretrained(sys.argv[1])(torch.arange(24).view(1, 3, 8) % 8).last_hidden_state, sys.argv[2])
"""


def test_a_model_needs_neither_deepspeed_nor_fairseq2s_native_part(
    make_shards: Make, small_config: Config, tmp_path: Path
) -> None:
    run(small_config(make_shards(), optim={"steps": 1}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    state = tmp_path / "state.pt"
    subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path / "model"), str(state)], check=True, cwd="/")
    expected = from_pretrained(tmp_path / "model")(torch.arange(24).view(1, 3, 8) % 8).last_hidden_state
    assert torch.equal(torch.load(state), expected)


def test_from_pretrained_matches_the_model(make_shards: Make, small_config: Config, tmp_path: Path) -> None:
    run(small_config(make_shards(), optim={"steps": 1}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    model, codes = from_pretrained(tmp_path / "model"), torch.randint(0, 8, (2, 3, 11))
    expected = load_pretrained(tmp_path / "model").extract(codes, [11, 7])
    output = model(codes, [11, 7], output_hidden_states=True)
    assert output.hidden_states is not None
    assert all(torch.equal(one, other) for one, other in zip(output.hidden_states, expected, strict=True))
    assert torch.equal(model(codes, [11, 7]).last_hidden_state, expected[-1])
    assert model(codes).hidden_states is None
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match=r"shape \(2, 2, 11\), must be \[B, 3, T\]"):
        model(codes[:, :2])
    with pytest.raises(UserError, match="codes: from 9 to 9"):
        model(torch.full((1, 3, 4), 9))  # the third codebook has 8


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_embeddings_start_from_the_codec_of_the_shards(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    codec = random_codec(seed=0)
    random = np.random.default_rng(0)
    items = ((f"u{i}", random.integers(0, 1024, (8, 80)).astype(np.uint16), {}) for i in range(20))
    write_shards(tmp_path / "shards", codec.card, items)
    asked = []

    def load(card: object, weights: str | None) -> object:
        asked.append(weights)
        return codec

    monkeypatch.setattr(build_module, "load_codec_for", load)
    config = small_config(
        tmp_path / "shards", model={"embedding_init": "codec"}, data={"codec_weights": "there"},
        optim={"steps": 1, "lr": 1e-9}, engine={"precision": precision},
    )  # fmt: skip
    run(config, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    codes = torch.from_numpy(random.integers(0, 1024, (8, 50)))
    ours = load_pretrained(tmp_path / "model").embedding(codes)
    assert (ours.T - codec.latents(codes)).abs().max() < 1e-5
    assert asked == ["there"]


def test_raw_embeddings_are_the_codebooks_as_stored(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = random_codec(seed=0)
    entries = [torch.full((1024, 8), float(k)) for k in range(8)]
    monkeypatch.setattr(codec, "entries", lambda: entries, raising=False)
    monkeypatch.setattr(build_module, "load_codec_for", lambda card, weights: codec)
    write_shards(tmp_path / "shards", codec.card, [("u", np.zeros((8, 400), np.uint16), {})])
    corpus = TokenCorpus([tmp_path / "shards"])
    raw = build(small_config(tmp_path, model={"embedding_init": "raw", "embedding_dim": 8}), corpus, fresh=True)
    assert torch.equal(raw.model.embedding.weight[:-1], torch.cat(entries))
    with pytest.raises(UserError, match=r"codec embeddings: \(8192, 8\), the model has \(8192, 4\)"):
        build(small_config(tmp_path, model={"embedding_init": "raw", "embedding_dim": 4}), corpus, fresh=True)
    with pytest.raises(UserError, match="embedding_dim: null, must be given"):
        small_config(tmp_path, model={"embedding_init": "raw"})


def test_a_run_starts_from_an_exported_model(make_shards: Make, small_config: Config, tmp_path: Path) -> None:
    dirs = make_shards()
    run(small_config(dirs, optim={"steps": 2}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    start = {"steps": 2, "start_from": str(tmp_path / "model")}
    config = small_config(dirs, model={"dropout": 0.0}, optim=start)  # what changes no weight's meaning may differ
    first = build(config, TokenCorpus([dirs]), fresh=True).model.state_dict()
    assert_same(first, dict(load_pretrained(tmp_path / "model").state_dict()))
    run(config, tmp_path / "more")
    shutil.rmtree(tmp_path / "model")
    run(config, tmp_path / "more")  # a run that is under way needs it no more
    export(tmp_path / "run", tmp_path / "model")
    with pytest.raises(UserError, match=r"has model.heads 2, this run 4; make them equal"):
        build(small_config(dirs, model={"heads": 4}, optim=start), TokenCorpus([dirs]), fresh=True)
    other = TokenCorpus([make_shards("other", codec="another")])
    with pytest.raises(UserError, match="was trained on codec synthetic, the data is of another"):
        build(small_config(tmp_path / "other", optim=start), other, fresh=True)
    with pytest.raises(UserError, match="is not an exported model"):
        build(small_config(dirs, optim={"start_from": str(tmp_path / "run")}), TokenCorpus([dirs]), fresh=True)


def test_another_config_or_other_data_is_refused(make_shards: Make, small_config: Config, tmp_path: Path) -> None:
    dirs = make_shards()
    run(small_config(dirs, optim={"steps": 2}), tmp_path / "run")
    run(
        small_config(dirs, optim={"steps": 2}, log={"log_every": 1}), tmp_path / "run"
    )  # how often it speaks may change
    with pytest.raises(UserError, match=r"was made with optim.eps 1e-06, this run has 0.1"):
        run(small_config(dirs, optim={"steps": 2, "eps": 0.1}), tmp_path / "run")
    with pytest.raises(UserError, match="other train shards"):
        run(small_config(make_shards("other", seed=5), optim={"steps": 2}), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not a run folder"):
        run(small_config(dirs), tmp_path / "mine")


def test_a_start_that_failed_does_not_keep_its_folder(make_shards: Make, small_config: Config, tmp_path: Path) -> None:
    """Nothing was trained, so a wrong config may be corrected with the same --output."""
    wrong = small_config(make_shards(), model={"embedding_init": "codec"}, optim={"steps": 2})
    with pytest.raises(UserError, match="synthetic"):  # no such codec
        run(wrong, tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").exists()
    right = small_config(make_shards("other"), optim={"steps": 2}, log={"log_every": 1, "checkpoint_every": 2})
    run(right, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # the logged steps count too
    with pytest.raises(UserError, match="was made with optim.eps 1e-06"):
        run(small_config(tmp_path / "other", optim={"steps": 2, "eps": 0.1}), tmp_path / "run")


@pytest.mark.parametrize("file", ["config.yaml", "data.json", "versions.json"])
def test_damaged_papers_of_a_run_are_one_line(
    make_shards: Make, small_config: Config, tmp_path: Path, file: str
) -> None:
    run(small_config(make_shards(), optim={"steps": 1}), tmp_path / "run")
    text = (tmp_path / "run" / file).read_text()
    (tmp_path / "run" / file).write_text(text[: len(text) // 2] + ": [")
    with pytest.raises(UserError, match=f"{file}: .*damaged") as reported:
        export(tmp_path / "run", tmp_path / "model")
    assert "\n" not in str(reported.value)


def test_frozen_embeddings_stay(make_shards: Make, small_config: Config, tmp_path: Path) -> None:
    dirs = make_shards()
    ends = {}
    for frozen in (True, False):
        config = small_config(dirs, model={"freeze_embedding": frozen}, optim={"steps": 2})
        run(config, tmp_path / str(frozen))
        first = build(config, TokenCorpus([dirs]), fresh=True).model.embedding.weight
        end = tensors(checkpoint.newest(tmp_path / str(frozen) / "checkpoints"))
        ends[frozen] = torch.equal(end["embedding.weight"], first)
    assert ends == {True: True, False: False}


def test_constant_targets_are_refused_before_anything_is_written(
    make_shards: Make, small_config: Config, tmp_path: Path
) -> None:
    card = Shards(make_shards("lively")).card
    codes = np.stack([np.arange(100) % 16, np.full(100, 7), np.arange(100) % 8]).astype(np.uint16)
    write_shards(tmp_path / "flat", card, ((f"u{i}", codes, {}) for i in range(30)))
    with pytest.raises(UserError, match=r"stream 1 is \(nearly\) constant: class 7 has 100.0 %"):
        run(small_config(tmp_path / "flat"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_a_number_stops_the_run(make_shards: Make, small_config: Config, tmp_path: Path) -> None:
    config = small_config(make_shards(), optim={"lr": 1e30, "clip_norm": 0.0, "warmup_fraction": 0.0})
    with pytest.raises(UserError, match=r"step \d+: the loss is (nan|inf); lower optim.lr"):
        run(config, tmp_path / "run")
    assert not checkpoint.whole(tmp_path / "run" / "checkpoints"), "no broken model may be saved"


def test_torn_checkpoints_are_passed_over_and_the_newest_kept(
    make_shards: Make, small_config: Config, tmp_path: Path
) -> None:
    config = small_config(make_shards(), optim={"steps": 8}, log={"checkpoint_every": 2, "keep_checkpoints": 3})
    run(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoint.whole(folder)] == [
        "step-00000004",
        "step-00000006",
        "step-00000008",
    ]
    assert (folder / "latest").resolve() == (folder / "step-00000008").resolve()
    before = rows(tmp_path / "run")
    states = folder / "step-00000008" / "training.safetensors"
    states.write_bytes(states.read_bytes()[:-100])
    (folder / ".step-00000009.partial").mkdir()
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.name == "step-00000006"
    run(config, tmp_path / "run")
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.name == "step-00000008"
    assert rows(tmp_path / "run") == before


def test_a_corrupt_checkpoint_is_warned_of_and_the_one_before_taken(
    make_shards: Make, small_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(make_shards(), optim={"steps": 4}, log={"checkpoint_every": 2, "valid_every": 4})
    run(config, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    before, model = tensors(folder / "step-00000004"), folder / "step-00000004" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    export(tmp_path / "run", tmp_path / "model")
    assert "step-00000004: model.safetensors is corrupt; an older checkpoint is used" in capsys.readouterr().err
    assert json.loads((tmp_path / "model" / "config.json").read_text())["training"]["step"] == 2
    run(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "warning: step-00000004: model.safetensors is corrupt; the run resumes from step-00000002" in printed
    assert_same(before, tensors(folder / "step-00000004"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_and_ends_with_75(
    make_shards: Make, small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = small_config(make_shards(), optim={"steps": 4}, log={"checkpoint_every": 4})
    update, handlers = Training.update, [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2)]

    def signalled(self: Training, step: int, *args: Any, **kwargs: Any) -> Any:
        if step == 2:
            signal.raise_signal(number)
        return update(self, step, *args, **kwargs)

    monkeypatch.setattr(Training, "update", signalled)
    with pytest.raises(SystemExit) as ended:
        run(config, tmp_path / "run")
    assert ended.value.code == PREEMPTED == 75
    assert f"stopped by {number.name} after step 3; the same command resumes from there" in capsys.readouterr().out
    assert [path.name for path in checkpoint.whole(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2)] == handlers
    run(config, tmp_path / "run")
    assert [path.name for path in checkpoint.whole(tmp_path / "run" / "checkpoints")] == [
        "step-00000003",
        "step-00000004",
    ]


@pytest.mark.parametrize("stage", [0, 3])
def test_layers_may_be_computed_twice(make_shards: Make, small_config: Config, tmp_path: Path, stage: int) -> None:
    """Activation checkpointing changes no bit, dropout included; and how a run is computed may change half-way."""
    dirs, steps = make_shards(), {"steps": 4, "clip_norm": 0.1}
    names, often = ("kept", "twice"), {"checkpoint_every": 2}
    for name in names:
        engine = {"activation_checkpointing": name == "twice", "zero_stage": stage}
        run(small_config(dirs, engine=engine, optim=steps, log=often), tmp_path / name)
    ends = [tmp_path / name / "checkpoints" / "step-00000004" for name in names]
    assert_same(*map(tensors, ends))
    assert rows(tmp_path / "kept") == rows(tmp_path / "twice")
    shutil.rmtree(ends[0])
    run(small_config(dirs, engine={"activation_checkpointing": True}, optim=steps, log=often), tmp_path / "kept")
    for name, value in tensors(ends[0]).items():
        assert torch.allclose(value, tensors(ends[1])[name], atol=1e-4), name


def test_a_profile_shows_some_steps(
    make_shards: Make, small_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(make_shards(), optim={"steps": 10}, log={"log_every": 10})
    run(config, tmp_path / "run", profile=True)
    printed = capsys.readouterr().out
    assert re.search(r"step      5 \| estimated time for the other 5 steps: 0:0\d:\d\d", printed)
    assert "no trace" not in printed
    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 4
    run(small_config(tmp_path / "shards", optim={"steps": 3}), tmp_path / "short", profile=True)
    assert "--profile: no trace, it needs 9 steps" in capsys.readouterr().out
    assert "addmm" in (tmp_path / "run" / "profile" / "table.txt").read_text()


def test_a_run_that_is_stuck_ends_with_one_line() -> None:
    code = (
        "import sys, time; from codecssl.tokenize.common.process import Watchdog\n"
        "with Watchdog(0.3 / 60, rank=int(sys.argv[1]), hint='go on') as watch:\n"
        "    for _ in range(5): time.sleep(0.1); watch.report('waiting for data')\n"
        "    print('alive', flush=True); time.sleep(20)"
    )
    for rank, name in (("0", ""), ("3", "rank 3: ")):
        done = subprocess.run([sys.executable, "-c", code, rank], capture_output=True, text=True, cwd="/")
        assert (done.returncode, done.stdout) == (76, "alive\n")
        assert done.stderr == f"error: {name}stuck for 0.005 minutes while waiting for data; go on\n"
