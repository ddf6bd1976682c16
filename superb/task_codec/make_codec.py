"""`codecssl-superb task-codec`: train a codec below 200 bit/s from a pretrained model and a task."""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codecssl.pretrain.export.export import load_pretrained
from codecssl.pretrain.model.model import CodecModel
from codecssl.superb import results
from codecssl.superb.task_codec import codec_folder
from codecssl.superb.task_codec.bottleneck import BitRate, Bottleneck, check_layer, choose_bit_rate
from codecssl.superb.task_codec.codec_folder import QuantisedModel
from codecssl.superb.task_codec.config import BottleneckTrainConfig
from codecssl.superb.task_codec.examples import SPOKEN, Examples, examples, open_shards, refuse_too_few_frames
from codecssl.superb.task_codec.head_training import STAGES, Summaries, error_rate, train_head
from codecssl.superb.task_codec.heads import HEADS
from codecssl.superb.task_codec.rvq import RvqConfig
from codecssl.superb.task_codec.states import CachedStates, Source, after, batched, whole_model
from codecssl.superb.task_codec.training import BottleneckTraining, load_state, save_state
from codecssl.tokenize.backends.parts.weights import local
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import refuse_links_out
from codecssl.tokenize.shards import Shards

FRAME_RATE = {True: 25.0, False: 12.5}
"""Default frame rate of the codes in Hz: 25 for pr and `none`, 12.5 for classes."""
OWN_FILES = {"config.json", "model.safetensors", "README.md", "metrics.jsonl", "work"}


@dataclass(frozen=True, kw_only=True)
class TaskCodecConfig:
    """Settings of `codecssl-superb task-codec`."""

    upstream: Path
    data: Path
    output: Path
    layer: int
    task: str = "none"
    rate_bps: float = 200.0
    """Largest nominal bit rate."""
    frame_rate: float | None = None
    """Approximate frame rate in Hz. None selects the task's default (`FRAME_RATE`)."""
    codebook_dim: int = 32
    probes: str = "probes"
    device: str = "cpu"
    train: BottleneckTrainConfig = field(default_factory=BottleneckTrainConfig)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data and features shared by runs on one model and one data set."""

    model: CodecModel
    shards: Shards
    states: Source
    """All states of the unmodified model, cached."""


def load_upstream(path: Path) -> CodecModel:
    """Load an exported model. The path of its codec's weights is made absolute."""
    model = load_pretrained(path)
    if model.mel_spec is not None:
        raise UserError(f"upstream {path}: reads a log-mel plane too; task-codec takes models with model.input codes")
    if model.card.segment_samples:
        raise UserError(f"upstream {path}: its codec {model.card.name} works in segments with scales; it has no 25 Hz")
    model.card = replace(model.card, weights=local(model.card.weights))
    return model.requires_grad_(False)


def prepare(upstream: Path, data: Path, work: Path, device: str) -> Prepared:
    """Load the model and open the data. Missing tokens are written to `work` first."""
    model = load_upstream(upstream)
    shards = open_shards(data, model.card, work, device)
    model = model.to(device)
    return Prepared(model=model, shards=shards, states=CachedStates(whole_model(model, shards, device)))


def settle(config: TaskCodecConfig, ready: Prepared, fold: int = 0) -> tuple[Examples, BitRate]:
    """Return the task's utterances and the rate. Raises UserError for impossible settings."""
    check_layer(ready.model, config.layer)
    spoken = config.task in (*SPOKEN, "none")
    bit_rate = choose_bit_rate(config.rate_bps, ready.model.card, config.frame_rate or FRAME_RATE[spoken])
    found = examples(ready.shards, config.task, config.probes, config.train.seed, fold)
    return refuse_too_few_frames(found, [-(-int(n) // bit_rate.pool) for n in ready.shards.frames], bit_rate), bit_rate


def make_task_codec(config: TaskCodecConfig, on_progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and write the codec. Return its config.json. A killed run is resumed.

    Raises UserError for impossible settings, and for a folder with other contents.
    """
    _refuse_foreign(config.output)
    refuse_links_out(config.output)
    ready = prepare(config.upstream, config.data, config.output / "work", config.device)
    found, bit_rate = settle(config, ready)
    identity = _identity(config, ready, found)
    if (config.output / "config.json").is_file():
        done = codec_folder.read_config(config.output)
        if done["training"]["identity"] != identity:
            raise UserError(f"{config.output}: holds a codec made with other settings or data; give another --output")
        on_progress(f"{config.output}: finished before")
        return done
    training = build(config, ready, found, bit_rate, first_head(config, ready, found))
    _run(training, config.output, identity, on_progress)
    quantised = QuantisedModel(ready.model, config.layer, training.bottleneck, training.head, found.names).eval()
    measured = _measure(training, config)
    more = {"training": {"identity": identity, **measured, "settings": _plain(config), "rate": str(bit_rate)}}
    results.write_text(config.output / "README.md", _readme(config, ready, bit_rate, measured))
    codec_folder.save(quantised, config.output, bit_rate, more)
    return codec_folder.read_config(config.output)


def _refuse_foreign(output: Path) -> None:
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if foreign := sorted(name for name in found - OWN_FILES if not name.startswith(".")):
        raise UserError(
            f"{output}: holds {foreign[0]}, which codecssl-superb task-codec did not write; give a new --output"
        )


def _plain(config: TaskCodecConfig) -> dict[str, Any]:
    values = asdict(config)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _identity(config: TaskCodecConfig, ready: Prepared, found: Examples) -> str:
    settings = {k: v for k, v in _plain(config).items() if k not in ("upstream", "data", "output", "device")}
    weights = hashlib.sha256((config.upstream / "model.safetensors").read_bytes()).hexdigest()
    parts = [settings, weights, ready.shards.fingerprint, found.names, found.parts]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def first_head(config: TaskCodecConfig, ready: Prepared, found: Examples) -> Any:
    """Train the head on the unmodified states of the model. None without labels."""
    if found.kind == "none":
        return None
    head = new_head(config, found, ready.model.config.dim, ready.model.config.layers - config.layer + 1)
    train_head(head, Summaries(head, batched(after(ready.states, config.layer))), found, config.train, 0)
    return head


def build(
    config: TaskCodecConfig, ready: Prepared, found: Examples, bit_rate: BitRate, head: Any
) -> BottleneckTraining:
    """Make a bottleneck initialized from the seed, and its training with a copy of `first_head`."""
    dim = ready.model.config.dim
    sizes = RvqConfig(
        num_codebooks=bit_rate.num_codebooks,
        codebook_size=1 << bit_rate.bits,
        codebook_dim=min(config.codebook_dim, dim),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        bottleneck = Bottleneck(dim, bit_rate.pool, sizes).to(config.device)
    source = after(ready.states, config.layer)
    return BottleneckTraining(ready.model, config.layer, bottleneck, head, found, source, config.train)


def new_head(config: TaskCodecConfig, found: Examples, dim: int, states: int) -> Any:
    """Make a head for S states [B, T, D], initialized from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return HEADS[found.kind](dim, states, len(found.names)).to(config.device)


def _run(training: BottleneckTraining, output: Path, identity: str, on_progress: Callable[[str], None]) -> None:
    path = output / "work" / "state.pt"
    if (state := load_state(path, identity)) is not None:
        training.load(state)
        on_progress(f"resumes at stage {training.stage}, step {training.step}")
    output.mkdir(parents=True, exist_ok=True)
    with (output / "metrics.jsonl").open("a", encoding="utf-8") as file:

        def log(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            on_progress("  ".join(f"{key} {value}" for key, value in row.items()))

        training.run(log, lambda: save_state(path, identity, training.state()))


def _measure(training: BottleneckTraining, config: TaskCodecConfig) -> dict[str, Any]:
    """Codebook usage and error rates on the test part, per number of codebooks and for the unmodified model."""
    found, bottleneck, source = training.found, training.bottleneck, training.source
    books = bottleneck.rvq.config
    codes = np.concatenate([bottleneck.encode(source(i)[0]).cpu().numpy() for i in found.parts["train"]], axis=1)
    used = [len(np.unique(row)) for row in codes]
    measured: dict[str, Any] = {
        "kind": found.kind,
        "parts": {part: len(rows) for part, rows in found.parts.items()},
        "apart": found.apart,
        "entries": books.codebook_size,
        "used_entries": used,
        "dead_entries": [books.codebook_size - n for n in used],
        "revived": training.revived,
    }
    if training.head is None:
        return measured
    by_count = [error_rate(training.head, training.summaries(k), found, "test") for k in range(1, len(used) + 1)]
    reference = copy.deepcopy(training.teacher)
    summaries = Summaries(reference, batched(source))
    train_head(reference, summaries, found, config.train, STAGES.index("b"))
    whole = error_rate(reference, summaries, found, "test")
    return measured | {"test_error_by_codebooks": by_count, "test_error_unquantised": whole}


def _readme(config: TaskCodecConfig, ready: Prepared, bit_rate: BitRate, measured: dict[str, Any]) -> str:
    """Human-readable card of the codec."""
    model = config.upstream.resolve().name
    lines = [
        f"# Task codec: {config.task}",
        "",
        f"Layer {config.layer} of `{model}` (which reads {ready.model.card.name}), quantised at {bit_rate}, nominal.",
        f"Entries in use on the training part, by codebook: {measured['used_entries']} of {measured['entries']}.",
        f"Utterances: {', '.join(f'{n} {part}' for part, n in measured['parts'].items())}"
        + (f"; test has no {measured['apart']} of train." if measured["apart"] else "."),
    ]
    if "test_error_unquantised" in measured:
        what = "phone error rate" if measured["kind"] == "ctc" else "error rate"
        kept = [f"{100 * error:.2f} % with {k}" for k, error in enumerate(measured["test_error_by_codebooks"], 1)]
        whole = f"{100 * measured['test_error_unquantised']:.2f} %"
        lines.append(f"Test {what}: {', '.join(kept)} codebooks kept; the model as it is, its head alone: {whole}.")
    lines += [
        "",
        "`codecssl-tokenize run SOURCE... --codec FOLDER --output DIR` writes its codes. They do not decode to audio.",
    ]
    return "\n".join(lines) + "\n"
