"""`codecssl-pretrain peers`: pretraining on tokens, on log-mels and on samples, for the same processor time.

    OUTPUT/ours/            CONFIG as it is, on the token shards
    OUTPUT/logmel_hubert/   HuBERT's objective on the stored log-mel plane: the same encoder, no convolutional front end
    OUTPUT/hubert/          a waveform HuBERT of transformers with the same encoder
    OUTPUT/peers.json       steps, processor time and seconds of audio of each

The two HuBERTs predict the labels that CONFIG predicts. If it predicts none, they predict 100 clusters of cepstra, as
HuBERT's first iteration does. Every folder is a model that `codecssl-superb probe --upstream` takes (hubert as
hf:OUTPUT/hubert). Existing folders are kept, which resumes the comparison after a stop.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from codecssl.configs.load import to_yaml
from codecssl.pretrain.bench import step_cpu_seconds
from codecssl.pretrain.config import MaskConfig, ObjectiveConfig, RunConfig
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.pretrain.labels.label import LabelConfig, label
from codecssl.pretrain.peers import hubert
from codecssl.pretrain.ranks import Ranks
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import write_atomic
from codecssl.tokenize.shards import Shards

CLUSTERS = 100
"""Classes of HuBERT's first iteration (arXiv 2106.07447, section IV-B)."""


def compare(
    config: RunConfig, output: Path, *, cpu_seconds: float, audio: Path | None = None, conv_dim: int = 512,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Train the three models for `cpu_seconds` of processor time each, one after the other; return peers.json.

    config: the recipe on tokens, with one data folder that has a log-mel plane. audio: folder to which the paths in the
    shards are relative. conv_dim: channels of the waveform HuBERT's front end. Raises UserError, before anything is
    written, for data that one of the three cannot read.
    """
    if len(config.data.dirs) != 1:
        raise UserError(f"--data: {len(config.data.dirs)} folders, but the comparison needs one")
    if not 0 < cpu_seconds < float("inf"):
        raise UserError(f"--cpu-seconds {cpu_seconds}: must be above 0 and finite")
    data = Shards(Path(config.data.dirs[0]))
    hubert.check(data, audio)
    *_, corpus = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))  # what a training would refuse
    labels = Path(config.data.labels[0]) if config.data.labels else output / "labels"
    [classes] = corpus.label_sizes or (CLUSTERS,)
    output.mkdir(parents=True, exist_ok=True)
    if not config.data.labels:
        label(LabelConfig(source="mfcc", data=(data.path,), output=labels, clusters=classes), say)
    found: dict[str, Any] = {}
    for name, variant in {"ours": config, "logmel_hubert": logmel_hubert(config, labels)}.items():
        train = partial(_run, variant, output, name, cpu_seconds, say)
        found[name] = _kept(output / name, train, say)
    found["hubert"] = _kept(
        output / "hubert",
        lambda: _hubert(config, data, Shards(labels), audio, classes, output / "hubert", cpu_seconds, conv_dim, say),
        say,
    )
    write_atomic(output / "peers.json", json.dumps(found, indent=1).encode())
    return found


def logmel_hubert(config: RunConfig, labels: Path) -> RunConfig:
    """Return the config of a HuBERT on log-mels: the encoder, optimizer, crops and batch of `config`."""
    return replace(
        config,
        model=replace(config.model, input="mel", positions="conv"),
        mask=MaskConfig(kind="spans"),
        data=replace(config.data, labels=(str(labels),)),
        objective=ObjectiveConfig(name="codec2vec", target="labels", quantizer_dropout=0.0),
    )


def _kept(folder: Path, train: Callable[[], dict[str, float]], say: Callable[[str], None]) -> dict[str, float]:
    """Return the figures of a training that has ended, or train."""
    record = folder / "peer.json"
    if not record.exists():
        say(f"{folder.name}: training")
        write_atomic(record, json.dumps(train()).encode())
    figures: dict[str, float] = json.loads(record.read_text())
    return figures


def _run(
    config: RunConfig, output: Path, name: str, cpu_seconds: float, say: Callable[[str], None]
) -> dict[str, float]:
    """Train by `codecssl-pretrain run` in a process of its own, and export."""
    step = step_cpu_seconds(config)
    steps = max(1, round(cpu_seconds / step))
    say(f"{name}: {step:.2f} s of processor time a step, {steps} steps")
    config = replace(config, optim=replace(config.optim, steps=steps))
    recipe, run = output / f"{name}.yaml", output / f"{name}.run"
    write_atomic(recipe, to_yaml(config).encode())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _command("run", recipe, run)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    _command("export", run, output / name)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = steps * at_frame_rate(config, Shards(Path(config.data.dirs[0])).card.frame_rate).data.batch_seconds
    return {"steps": steps, "cpu_seconds": round(spent, 1), "audio_seconds": round(seconds, 1)}


def _command(name: str, source: Path, output: Path) -> None:
    """Run a command of `codecssl-pretrain`. Raises UserError if it fails; its own error is on stderr."""
    command = [name, str(source), "--output", str(output)]
    code = subprocess.run([sys.executable, "-m", "codecssl.pretrain", *command], check=False).returncode
    if code:
        raise UserError(f"codecssl-pretrain {' '.join(command)}: exit status {code}; its error is above")


def _hubert(
    config: RunConfig, data: Shards, labels: Shards, audio: Path | None, classes: int, output: Path,
    cpu_seconds: float, conv_dim: int, say: Callable[[str], None],
) -> dict[str, float]:  # fmt: skip
    spans = at_frame_rate(replace(config, mask=MaskConfig(kind="spans")), data.card.frame_rate)
    recordings = hubert.read_recordings(data, labels, audio)
    made = hubert.train(spans, recordings, classes, output, cpu_seconds=cpu_seconds, conv_dim=conv_dim, say=say)
    return {
        "steps": made.steps, "cpu_seconds": round(made.cpu_seconds, 1), "audio_seconds": round(made.audio_seconds, 1)
    }  # fmt: skip
