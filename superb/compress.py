"""`codecssl-superb compress`: a pretrained model and a task in, a codec below 200 bit/s out."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from codecssl.pretrain.export import load_pretrained
from codecssl.pretrain.model import CodecModel
from codecssl.superb import compressed as codec_folder
from codecssl.superb import results
from codecssl.superb.bottleneck import Bottleneck, Rate, check_layer, choose_rate
from codecssl.superb.code_rates import Codes
from codecssl.superb.compress_data import SPOKEN, Examples, examples, open_shards, refuse_too_slow
from codecssl.superb.compress_settings import TrainConfig
from codecssl.superb.compress_source import Kept, Source, base_codes, quantised, whole_model
from codecssl.superb.compress_train import Training, error_rate, load_state, save_state
from codecssl.superb.compressed import Compressed
from codecssl.superb.heads import HEADS
from codecssl.superb.rvq import RvqConfig
from codecssl.tokenize.errors import UserError
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.weights import local

FRAME_RATE = {True: 25.0, False: 12.5}
"""Hz, of the codes, where none is given: 25 for pr and none, 12.5 for classes."""
OWN_FILES = {"config.json", "model.safetensors", "README.md", "metrics.jsonl", "work"}


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """What was asked for."""

    upstream: Path
    data: Path
    output: Path
    layer: int
    task: str = "none"
    rate_bps: float = 200.0
    """Nominal, at most."""
    frame_rate: float | None = None
    """Hz, about; None is the task's (`FRAME_RATE`)."""
    codebook_dim: int = 16
    probes: str = "probes"
    device: str = "cpu"
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run works on."""

    model: CodecModel
    shards: Shards
    found: Examples
    rate: Rate
    source: Source
    """States L, L + 1, ... of the model as it is."""


def load_upstream(path: Path) -> CodecModel:
    """An exported model; its codec's weights by their absolute path, so that they are found from anywhere."""
    model = load_pretrained(path)
    if model.card.segment_samples:
        raise UserError(f"upstream {path}: its codec {model.card.name} works in segments with scales; it has no 25 Hz")
    model.card = replace(model.card, weights=local(model.card.weights))
    return model.requires_grad_(False)


def prepare(config: CompressConfig) -> Prepared:
    """Everything that can be refused is refused here."""
    model = load_upstream(config.upstream)
    check_layer(model, config.layer)
    spoken = config.task in (*SPOKEN, "none")
    rate = choose_rate(config.rate_bps, model.card, config.frame_rate or FRAME_RATE[spoken])
    shards = open_shards(config.data, model.card, config.output / "work", config.device)
    found = examples(shards, config.task, config.probes, config.train.seed)
    found = refuse_too_slow(found, [-(-int(n) // rate.pool) for n in shards.frames], rate)
    model = model.to(config.device)
    source = Kept(whole_model(model, shards, config.layer, config.device))
    return Prepared(model=model, shards=shards, found=found, rate=rate, source=source)


def compress(config: CompressConfig, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and write the codec; returns its config.json. Goes on where a killed run stopped.

    UserError for what cannot be, and for a folder that holds something else.
    """
    _refuse_foreign(config.output)
    ready = prepare(config)
    identity = _identity(config, ready)
    if (config.output / "config.json").is_file():
        done = codec_folder.read_config(config.output)
        if done["training"]["identity"] != identity:
            raise UserError(f"{config.output}: holds a codec made with other settings or data; give another --output")
        report(f"{config.output}: finished before")
        return done
    training = _trained(config, ready, identity, report)
    compressed = Compressed(ready.model, config.layer, training.bottleneck, training.head, ready.found.names).eval()
    measured = _measure(compressed, ready, training, config)
    more = {"training": {"identity": identity, **measured, "settings": _plain(config), "rate": str(ready.rate)}}
    results.write_text(config.output / "README.md", _readme(config, ready, measured))
    codec_folder.save(compressed, config.output, ready.rate, more)
    return codec_folder.read_config(config.output)


def _refuse_foreign(output: Path) -> None:
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if foreign := sorted(name for name in found - OWN_FILES if not name.startswith(".")):
        raise UserError(f"{output}: holds {foreign[0]}, which is none of compress; give a new folder as --output")


def _plain(config: CompressConfig) -> dict[str, Any]:
    values = asdict(config)
    return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


def _identity(config: CompressConfig, ready: Prepared) -> str:
    settings = {k: v for k, v in _plain(config).items() if k not in ("upstream", "data", "output", "device")}
    weights = hashlib.sha256((config.upstream / "model.safetensors").read_bytes()).hexdigest()
    parts = [settings, weights, ready.shards.fingerprint, ready.found.names, ready.found.parts]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def build(config: CompressConfig, ready: Prepared) -> tuple[Bottleneck, Any]:
    """A fresh bottleneck and head, weights from the seed."""
    rate, dim, found = ready.rate, ready.model.config.dim, ready.found
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        sizes = RvqConfig(
            num_codebooks=rate.num_codebooks, codebook_size=1 << rate.bits, codebook_dim=min(config.codebook_dim, dim)
        )
        bottleneck = Bottleneck(dim, rate.pool, sizes)
        states = ready.model.config.layers - config.layer + 1
        head = None if found.kind == "none" else HEADS[found.kind](dim, states, len(found.names))
    return bottleneck.to(config.device), None if head is None else head.to(config.device)


def _trained(config: CompressConfig, ready: Prepared, identity: str, report: Callable[[str], None]) -> Training:
    bottleneck, head = build(config, ready)
    training = Training(ready.model, config.layer, bottleneck, head, ready.found, ready.source, config.train)
    path = config.output / "work" / "state.pt"
    if (state := load_state(path, identity)) is not None:
        training.load(state)
        report(f"goes on at stage {training.stage}, step {training.step}")
    config.output.mkdir(parents=True, exist_ok=True)
    with (config.output / "metrics.jsonl").open("a", encoding="utf-8") as file:

        def log(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            report("  ".join(f"{key} {value}" for key, value in row.items()))

        training.run(log, lambda: save_state(path, identity, training.state()))
    return training


def _measure(compressed: Compressed, ready: Prepared, training: Training, config: CompressConfig) -> dict[str, Any]:
    """Use of the codebooks, and the test part's error rates: of the model as it is, and by codebooks kept."""
    found, books = ready.found, compressed.bottleneck.rvq.config
    codes = codes_of(compressed, ready.shards, found.parts["train"], config.device)
    used = [len(entries_in_use(codes, k)) for k in range(books.num_codebooks)]
    measured: dict[str, Any] = {
        "kind": found.kind,
        "parts": {part: len(rows) for part, rows in found.parts.items()},
        "apart": found.apart,
        "entries": books.codebook_size,
        "used_entries": used,
        "dead_entries": [books.codebook_size - n for n in used],
        "revived": training.revived,
        **training.report,
    }
    if compressed.head is None:
        return measured
    by_count = [
        error_rate(compressed.head, quantised(compressed, ready.shards, k, config.device), found, "test")
        for k in range(1, books.num_codebooks + 1)
    ]
    reference = HEADS[found.kind](ready.model.config.dim, len(compressed.head.mean.scores), len(found.names))
    reference.load_state_dict(training.reference["head"])
    unquantised = error_rate(reference.to(config.device), ready.source, found, "test")
    return measured | {"test_error_by_codebooks": by_count, "test_error_unquantised": unquantised}


def codes_of(compressed: Compressed, shards: Shards, rows: Sequence[int], device: str) -> list[Codes]:
    """Codes [K, T'] of utterances."""
    return [compressed.codes(base_codes(shards, i, device)).cpu().numpy() for i in rows]


def entries_in_use(codes: Sequence[Codes], k: int) -> set[int]:
    """The entries of codebook k that occur."""
    return {int(code) for utterance in codes for code in utterance[k]}


def _readme(config: CompressConfig, ready: Prepared, measured: dict[str, Any]) -> str:
    """A card for people."""
    model, found = config.upstream.resolve().name, ready.found
    lines = [
        f"# Codes for a machine: {config.task}",
        "",
        f"Layer {config.layer} of `{model}` (which reads {ready.model.card.name}), quantised at {ready.rate}, nominal.",
        f"Entries in use on the training part, by codebook: {measured['used_entries']} of {measured['entries']}.",
        f"Utterances: {', '.join(f'{n} {part}' for part, n in measured['parts'].items())}"
        + (f"; test has no {found.apart} of train." if found.apart else "."),
    ]
    if "test_error_unquantised" in measured:
        what = "phone error rate" if found.kind == "ctc" else "error rate"
        kept = [f"{100 * error:.2f} % with {k}" for k, error in enumerate(measured["test_error_by_codebooks"], 1)]
        whole = f"{100 * measured['test_error_unquantised']:.2f} %"
        lines.append(f"Test {what}: {', '.join(kept)} codebooks kept; the model as it is, its head alone: {whole}.")
    lines += [
        "",
        "`codecssl-tokenize run SOURCE... --codec FOLDER --output DIR` writes its codes; no sound comes back.",
    ]
    return "\n".join(lines) + "\n"
