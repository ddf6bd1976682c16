"""Whole runs, both ways: s3prl's own upstream or ours, the token cache or none; and s3prl's own runner with ours."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from codecssl.superb import tasks
from codecssl.superb.runner import run as running
from codecssl.superb.runner.run import Machine, Run, configure, run_one
from codecssl.superb.upstreams.feature_cache import PooledUpstream
from codecssl.superb.upstreams.names import parse

FEW = tasks.Budget(name="few", divisor=10**6, least=8, evaluations=2)


def ks(root: Path, output: Path, upstream: str) -> Run:
    return Run(
        upstream=parse(upstream),
        task="ks",
        learning_rate=1e-2,
        budget=FEW,
        seed=0,
        data="tones",
        root=root,
        output=output,
    )


def test_fbank_on_our_runner_equals_fbank_on_s3prls(corpus: Path, tmp_path: Path) -> None:
    """Losses, layer weights and test accuracy are equal bit for bit."""
    from codecssl.superb.corpora.corpus import open_corpus
    from codecssl.superb.runner.csvs import write_csvs
    from codecssl.superb.runner.outcome import outcome
    from codecssl.superb.runner.problems import make_problem

    ours = run_one(ks(corpus, tmp_path / "ours", "fbank"), Machine(feature_cache_gib=0))
    task, run = tasks.TASKS["ks"], ks(corpus, tmp_path / "theirs", "fbank")
    config = configure(run, Machine())
    config["build_upstream"] = {"name": "fbank"}  # of s3prl's hub, not the one that we put there
    run.folder.mkdir(parents=True)
    data = open_corpus(corpus)
    make_problem(task, write_csvs(task, data.select(task).splits, run.folder, data)).run(**config)
    theirs = outcome(run.folder, task)
    assert theirs["curves"]["train-loss"] == ours["curves"]["train-loss"]
    assert len(ours["curves"]["train-loss"]) == 8
    assert theirs["values"] == ours["values"]


def test_a_cached_run_is_the_uncached_one_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    """Keyword spotting on tiny_16khz: equal losses, value and trained head. The row counts the codes by origin."""
    import torch

    from codecssl.superb.corpora.corpus import open_corpus
    from codecssl.superb.runner.prefill import fill_all, jobs

    run = ks(corpus, tmp_path / "live", "codes:tiny_16khz")
    plain = Machine(feature_cache_gib=0)
    live = run_one(run, plain)
    from rich.console import Console

    cache, task = tmp_path / "cache", tasks.TASKS["ks"]
    fill_all(list(jobs([run.upstream], [task], open_corpus(corpus), cache)), Console(quiet=True))
    other = replace(run, output=tmp_path / "cached")
    cached = run_one(other, replace(plain, cache=str(cache)))
    assert cached["curves"] == live["curves"]
    assert cached["value"] == live["value"]
    heads = [torch.load(r.folder / "train" / "valid_best" / "model" / "state_dict.pt") for r in (run, other)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert live["codes"]["cached"] == 0
    assert live["codes"]["live"] >= 40
    assert cached["codes"]["cached"] > 100
    assert cached["codes"]["live"] <= 2  # what s3prl measures an upstream's width with


DOWNSTREAM = """
runner:
  total_steps: 2
  gradient_clipping: 1
  gradient_accumulate_steps: 1
  log_step: 1
  eval_step: 2
  save_step: 2
  max_keep: 1
  eval_dataloaders: [test]
optimizer:
  name: TorchOptim
  torch_optim_name: Adam
  lr: 1.0e-3
downstream_expert:
  datarc:
    num_workers: 0
    train_batch_size: 4
    eval_batch_size: 4
    file_path: {root}
    meta_data: {root}
    max_timestep: 16000
    batch_size: 4
    speech_commands_root: {root}/train
    speech_commands_test_root: {root}/test
  modelrc:
    projector_dim: 16
    select: UtteranceLevel
    UtteranceLevel:
      pooling: MeanPooling
"""


@pytest.fixture
def commands_tree(tmp_path: Path) -> Path:
    """Speech Commands in its own layout, a few clips of noise."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(0)
    for word in ("yes", "no", "bed"):
        for part in ("train", "test"):
            folder = tmp_path / part / word.replace("bed", "bed" if part == "train" else "_unknown_")
            folder.mkdir(parents=True)
            for i in range(4 if part == "train" else 1):
                soundfile.write(folder / f"{i:08x}_nohash_{i}.wav", 0.1 * rng.standard_normal(5000), 16_000)
    (tmp_path / "train" / "_background_noise_").mkdir()
    soundfile.write(tmp_path / "train" / "_background_noise_" / "hum.wav", 0.1 * rng.standard_normal(32_000), 16_000)
    return tmp_path


def test_s3prls_own_runner_trains_on_an_exported_model(commands_tree: Path) -> None:
    """`-u codecssl -k MODEL`, as a plain user of s3prl runs it, with the shipped codec."""
    import dataclasses

    from safetensors.torch import save_file

    from codecssl.pretrain.config import ModelConfig
    from codecssl.pretrain.export.export import FORMAT, VERSION
    from codecssl.pretrain.model.model import untrained
    from codecssl.tokenize.registry import load_codec

    codec = load_codec("tiny_16khz")
    config = ModelConfig(dim=32, layers=2, heads=2, ffn_dim=64, conv_kernel=8, conv_groups=4)
    model = commands_tree / "model"
    model.mkdir()
    save_file(untrained(config, codec.card, codec.embeddings(), seed=7).state_dict(), model / "model.safetensors")
    description = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(config), "training": {}}
    (model / "config.json").write_text(json.dumps({**description, "codec": codec.card.to_dict()}))
    (commands_tree / "ks.yaml").write_text(DOWNSTREAM.format(root=commands_tree))
    command = [sys.executable, "-W", "ignore", "-m", "codecssl.superb.hubconf", "-m", "train", "-u", "codecssl"]
    command += ["-k", str(model), "-d", "speech_commands", "-c", "ks.yaml", "-p", "out", "--device", "cpu"]
    done = subprocess.run(command, cwd=commands_tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (checkpoint,) = (commands_tree / "out").glob("states-*.ckpt")
    assert checkpoint.name == "states-2.ckpt"

    import torch

    from codecssl.superb.patches import import_patches

    import_patches.install()
    states = torch.load(checkpoint)
    assert states["Step"] == 2
    assert len(states["Featurizer"]["weights"]) == 3


@pytest.mark.parametrize("upstream", ["codes:tiny_16khz", "logmel"])
def test_means_of_states_give_the_results_of_all_frames(
    upstream: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of mean pooling is trained on one mean per wave, and on all frames: equal losses and figures."""
    means = []
    forward = PooledUpstream.forward

    def counted(self: PooledUpstream, wavs: Tensor, wavs_len: Tensor) -> Any:
        means.append(len(wavs))
        return forward(self, wavs, wavs_len)

    monkeypatch.setattr(PooledUpstream, "forward", counted)
    pooled = run_one(ks(corpus, tmp_path / "pooled", upstream), Machine())
    assert means, "the run must use the means"
    means.clear()
    monkeypatch.setattr(running, "_pooled", lambda task, upstream: False)
    running._build.cache_clear()
    frames = run_one(ks(corpus, tmp_path / "frames", upstream), Machine())
    assert not means
    assert pooled["values"] == frames["values"]
    for (step, one), (same, other) in zip(pooled["curves"]["train-loss"], frames["curves"]["train-loss"], strict=True):
        assert step == same
        assert one == pytest.approx(other, rel=1e-4)
