"""`make gpu`: check codecssl on one GPU and measure it; writes gpu.json and gpu.md.

    python tests/gpu/gpu_checks.py --output gpu                      # on a GPU, full sizes
    python tests/gpu/gpu_checks.py --output gpu --device cpu --tiny  # the same code at tiny sizes, for a smoke test

Every check yields rows: `what`, the figures, and `ok` where there is a bound. The exit code is 1 if any row is not ok.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS / "tokenize", TESTS / "tokenize" / "backends"):  # random weights of every codec
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

Row = dict[str, Any]
FLIPS = 0.02
"""Largest share of a codebook's codes that may differ between devices: rounding decides near-ties differently."""
CLOSE = {"fp32": (1e-4, 1e-2), "bf16": (2e-2, 5e-2)}
"""Bounds of the relative errors of the loss and of the whole gradient against the CPU in fp32."""


@dataclass(frozen=True)
class Setting:
    """device: cpu or cuda. tiny: sizes for a smoke test. folder: scratch."""

    device: str
    tiny: bool
    folder: Path


# ---------------------------------------------------------------- tokenize


def random_codecs(folder: Path, tiny: bool) -> Iterator[tuple[str, str]]:
    """Yield (name, --codec) of each codec with narrow random weights. At tiny sizes two of them."""
    import random_weights

    yield "tiny_16khz", "tiny_16khz"
    names = ["dac_16khz"] if tiny else list(random_weights.WRITERS)
    for name in names:
        (folder / name).mkdir()
        yield name, f"{name}@{random_weights.WRITERS[name](folder / name)}"


def encodec_24khz() -> Any:
    """transformers' EnCodec of the published size with random weights and spread codebooks."""
    import transformers

    torch.manual_seed(0)
    model = transformers.EncodecModel(transformers.EncodecConfig()).eval().requires_grad_(False)
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_(std=0.02)
    return model


def dac_16khz() -> Any:
    """DAC at 16 kHz of the published size with random weights."""
    import random_models

    return random_models.dac_model(num_codebooks=12, width=64)


def codecs(setting: Setting) -> Iterator[Row]:
    """Compare batched, single and chunked codes on the device, and the device with the CPU, per codebook."""
    from codecssl.tokenize.measure.check_codec import check_codec, differing, synthetic_waves
    from codecssl.tokenize.registry import load_codec

    for name, path in random_codecs(setting.folder, setting.tiny):
        on_cpu, codec = load_codec(path), load_codec(path, device=setting.device)
        waves = synthetic_waves(codec.card)[: 6 if setting.tiny else None]
        found = check_codec(codec, waves)["differing"]
        alone = [[each.encode([wave])[0].codes.cpu() for wave in waves] for each in (on_cpu, codec)]
        against = differing(*alone)
        exact = not any(found["batched"]) and not any(found["chunked"])
        row = {key: f"{max(found[key]):.4%}" for key in ("batched", "chunked")}
        yield {
            "what": name,
            **row,
            "against the CPU, by codebook": " ".join(f"{share:.3%}" for share in against),
            "ok": exact and max(against) <= FLIPS,
        }


def tokenize_speed(setting: Setting) -> Iterator[Row]:
    """Multiples of real time, and the share of the time in which the codec waits for audio."""
    import soundfile

    from codecssl.tokenize.encode import Device, encode_inputs
    from codecssl.tokenize.sources.sources import read_sources

    audio = setting.folder / "audio"
    audio.mkdir()
    files, seconds = (3, 1.0) if setting.tiny else (256, 15.0)
    random = np.random.default_rng(0)
    for number in range(files):
        wave = random.standard_normal(int(seconds * 24_000)).astype("f4") * 0.1
        soundfile.write(audio / f"{number:04d}.wav", wave, 24_000)
    models = {"encodec_24khz": encodec_24khz, "dac_16khz": dac_16khz}
    for name in ("tiny_16khz",) if setting.tiny else models:
        path = name
        if name in models:
            path = str(setting.folder / f"{name}_full")
            models[name]().save_pretrained(path)
        device = Device(codec=path, num_codebooks=8, device=setting.device)
        codec, busy = device.load(), [0.0]
        encode = codec.encode

        def timed(waves: Any, encode: Any = encode, busy: Any = busy) -> Any:
            began = time.perf_counter()
            found = encode(waves)
            synchronise()
            busy[0] += time.perf_counter() - began
            return found

        codec.encode = timed  # type: ignore[method-assign]
        items = list(read_sources([str(audio)]))
        list(encode_inputs(device, codec, items[:2], 0))  # kernels are chosen, libraries load
        busy[0], began = 0.0, time.perf_counter()
        results = list(encode_inputs(device, codec, items, 0 if setting.tiny else 12))
        took = time.perf_counter() - began
        yield {
            "what": f"{name}, 8 codebooks",
            "x real time": round(files * seconds / took),
            "x real time, codec alone": round(files * seconds / busy[0]),
            "waits %": round(100 * max(0.0, 1 - busy[0] / took), 1),
            "ok": len(results) == files,
        }


# ---------------------------------------------------------------- pretrain


def config_of(name: str, setting: Setting, **sections: dict[str, Any]) -> Any:
    """A config by its name; at tiny sizes with a narrow model."""
    from codecssl.configs.load import load_config
    from codecssl.pretrain.config import RunConfig

    overrides = {"model.embedding_init": "random"}
    if setting.tiny:
        overrides |= {"model.dim": 32, "model.layers": 2, "model.heads": 2, "model.ffn_dim": 48}
    overrides |= {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return load_config(RunConfig, "pretrain", name, [f"--{key}={value}" for key, value in overrides.items()])


STILL = {"dropout": 0.0, "input_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}


def steps(setting: Setting) -> Iterator[Row]:
    """Loss and gradients of one step against the CPU in fp32, from the same weights, without dropout."""
    from codecssl.pretrain.bench import SYNTHETIC, make_batch, make_objective
    from codecssl.pretrain.engine.engine import restore_buffers
    from codecssl.pretrain.frame_rate import at_frame_rate

    for name in ("codec2vec_base_codes", "encodecmae_base"):
        card = replace(SYNTHETIC, codebook_sizes=(1024,) * 8, codes_per_frame=(1,) * 8)
        config = at_frame_rate(config_of(name, setting, model=STILL), card.frame_rate)
        batch = make_batch(config, card, 4.0, 2.0)
        reference = make_objective(config, card)
        weights = {key: value.clone() for key, value in reference.state_dict().items()}
        loss, gradient = loss_and_gradient(reference, batch)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            objective = make_objective(config, card)
            objective.load_state_dict(weights)
            objective.to(setting.device, dtype)
            restore_buffers(objective)
            objective.place(torch.device(setting.device))
            other, theirs = loss_and_gradient(objective, batch.to(torch.device(setting.device)))
            errors = abs(other - loss) / abs(loss), float((theirs - gradient).norm() / gradient.norm())
            yield {
                "what": f"{name}, {precision}",
                "loss": round(other, 5),
                "CPU fp32": round(loss, 5),
                "error of the loss": f"{errors[0]:.1e}",
                "error of the gradient": f"{errors[1]:.1e}",
                "ok": all(error <= bound for error, bound in zip(errors, CLOSE[precision], strict=True)),
            }


def loss_and_gradient(objective: Any, batch: Any) -> tuple[float, torch.Tensor]:
    """Return the loss and the whole gradient as one vector, on the CPU in float64."""
    loss = objective(batch).total
    loss.backward()
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in objective.parameters() if p.requires_grad]
    return float(loss.detach()), torch.cat([part.flatten().cpu().double() for part in parts])


def resume(setting: Setting) -> Iterator[Row]:
    """A run that stops and resumes equals one that does not, bit for bit; also with ZeRO 1 on one rank."""
    from codecssl.pretrain.monitor.telemetry import read_rows
    from codecssl.pretrain.run import run

    shards = write_shards(setting, "resume", 200)
    count = 6 if setting.tiny else 40
    small = {"batch_frames": 2000, "crop_frames": 100, "dirs": f"[{shards}]"}
    for stage, precision in ((0, "fp32"), (1, "bf16")):
        if setting.tiny and stage == 0:
            continue
        config = config_of(
            "codec2vec_tiny_codes", setting, data=small, optim={"steps": count}, model={"dropout": 0.1},
            log={"log_every": 1, "checkpoint_every": count // 2, "valid_every": 1000},
            engine={"precision": precision, "zero_stage": stage},
        )  # fmt: skip
        whole, halves = (setting.folder / f"{kind}-{stage}" for kind in ("whole", "halves"))
        run(config, whole)
        shutil.copytree(whole, halves, symlinks=True)  # as a crash after the first checkpoint leaves it
        shutil.rmtree(halves / "checkpoints" / f"step-{count:08d}")
        run(config, halves)
        rows = [
            [row["loss"] for row in read_rows(each / "metrics.jsonl") if row["split"] == "train"]
            for each in (whole, halves)
        ]
        last = [row for row in read_rows(whole / "metrics.jsonl") if row["split"] == "train"][-1]
        yield {
            "what": f"ZeRO {stage}, {precision}, {torch.distributed.get_backend()}",
            "steps": len(rows[0]),
            "loss": round(rows[0][-1], 5),
            "data wait %": round(last["data_wait_percent"], 1),
            "ok": len(rows[0]) == len(rows[1]) == count and rows[0] == rows[1],
        }


def write_shards(setting: Setting, name: str, count: int) -> Path:
    """Write shards of random codes of a codec with 4 x 64 entries."""
    from codecssl.pretrain.bench import SYNTHETIC
    from codecssl.tokenize.write_codes import write_shards as write

    random = np.random.default_rng(0)
    card = replace(SYNTHETIC, codebook_sizes=(64,) * 4, codes_per_frame=(1,) * 4, latent_dim=16)
    items = [
        (f"u{i}", random.integers(0, 64, (4, int(random.integers(40, 300)))).astype(np.uint16), {})
        for i in range(count)
    ]
    write(setting.folder / name, card, items)
    return setting.folder / name


def speed(setting: Setting) -> Iterator[Row]:
    """Training steps of tiny, base and large, compiled and not, and transformers' HuBERT with the same encoder."""
    from codecssl.pretrain.bench import bench

    for size in ("tiny",) if setting.tiny else ("tiny", "base", "large"):
        seconds = 2.0 if setting.tiny else {"tiny": 1200.0, "base": 600.0, "large": 300.0}[size]
        for compiled in (False, True):
            engine = {"precision": "fp32" if setting.tiny else "bf16", "compile": str(compiled).lower()}
            config = config_of(f"codec2vec_{size}_codes", setting, engine=engine)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            # at tiny sizes torch's compiler is left out: it would call a C++ compiler for minutes
            with torch.compiler.set_stance("force_eager" if setting.tiny else "default"):
                rows = list(
                    bench(
                        config,
                        seconds=seconds,
                        clip_seconds=min(15.0, seconds),
                        steps=1 if setting.tiny else 5,
                        hubert=(size == "base" or setting.tiny) and not compiled,
                    )
                )
            for row in rows:
                if compiled and row["what"] != "DeepSpeed":
                    continue
                what = f"{size}, {row.pop('what')}" + (", compiled" if compiled else "")
                yield {"what": what} | {key: float(f"{value:.4g}") for key, value in row.items()}


# ---------------------------------------------------------------- superb


def superb(setting: Setting) -> Iterator[Row]:
    """Training epochs of SUPERB's keyword spotting on the upstream `codes`, without and with the token cache."""
    from codecssl.superb.bench import SuperbBenchConfig, run
    from codecssl.superb.corpora.corpus import open_corpus
    from codecssl.superb.sample.unpack import unpack

    corpus = open_corpus(unpack(setting.folder / "sample"))
    config = SuperbBenchConfig(codec="tiny_16khz", tasks="ks", utterances=4 if setting.tiny else 96, rounds=1)
    for row in run(config, corpus):
        times = {f"{way}, s": seconds for way, seconds in row["epoch_seconds"].items()}
        yield {"what": "ks, codec on the CPU", **times, "ok": bool(row["token_cache"]["cached"])}


# ---------------------------------------------------------------- the command

CHECKS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "codecs": codecs,
    "tokenize_speed": tokenize_speed,
    "steps": steps,
    "resume": resume,
    "speed": speed,
    "superb": superb,
}


def run_check(name: str, setting: Setting) -> dict[str, Any]:
    """Run one check. An exception becomes a row that is not ok; the other checks still run."""
    began, rows = time.perf_counter(), list[Row]()
    try:
        for row in CHECKS[name](setting):
            rows.append(row)
            print(f"{name}: {row}", flush=True)
    except Exception as error:
        traceback.print_exc()
        rows.append({"what": f"{type(error).__name__}: {str(error)[:300]}", "ok": False})
    return {"check": name, "seconds": round(time.perf_counter() - began, 1), "rows": rows}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine(device: str) -> Row:
    """Describe the machine and the libraries."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}


def markdown(found: dict[str, Any]) -> str:
    """Format the results as Markdown, one table per check."""
    title = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value)
    lines = [f"# make gpu: {'all ok' if found['ok'] else 'NOT ok'}", "", title]
    for check in found["checks"]:
        lines += ["", f"## {check['check']} ({check['seconds']:.0f} s)"]
        columns: list[str] = []
        for row in check["rows"]:
            if list(row) != columns:
                columns = list(row)
                lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines.append(f"| {' | '.join(str(value) for value in row.values())} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes")
    parser.add_argument("--only", choices=tuple(CHECKS), action="append", help="repeatable (default: all)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU; on a CPU: make gpu DEVICE=cpu", file=sys.stderr)
        return 1
    if arguments.tiny:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checks = []
        for name in arguments.only or CHECKS:
            own = Path(folder, name)
            own.mkdir()
            checks.append(run_check(name, Setting(arguments.device, arguments.tiny, own)))
    ok = all(row.get("ok", True) for check in checks for row in check["rows"])
    found = {"ok": ok, "machine": machine(arguments.device), "checks": checks}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.output / "gpu.md").write_text(markdown(found))
    print(markdown(found))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
