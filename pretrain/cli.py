"""The command line `codecssl-pretrain`: train on token shards, make labels, export models, inspect runs."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from codecssl.configs.load import load_config, names, to_yaml
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.frame_rate import frames_replaced
from codecssl.tokenize.common.command_line import CommandLine, add_codec_weights, add_sharing, positive
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.process import INTERRUPTED, StopSignal, guarded

CONFIG_HELP = f"a YAML file, or one of {', '.join(names('pretrain'))}"
OVERRIDES = (
    "Any value of the config can be set by --section.key VALUE; `run CONFIG --print_config` shows them all.\n"
    "--data.batch_frames auto keeps the config's global batch and accumulates the largest micro-batches that fit."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (see `tokenize.common.command_line`)."""
    return command_line().main(argv)


def _no_misspelt_option(overrides: Sequence[str]) -> None:
    """Raise UserError for a misspelt option such as `--otput`, before it is parsed as a config override."""
    options = ("--data", "--output", "--nproc", "--profile", "--print_config", "--seed", "--codec-weights")
    for word in overrides:
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.7)
        if name.startswith("--") and "." not in name and near and name not in options:
            raise UserError(f"option {name}: unknown; did you mean {near[0]}?")


def _config(arguments: argparse.Namespace) -> RunConfig:
    overrides: list[str] = arguments.overrides
    _no_misspelt_option(overrides)
    overrides = ["--data.auto_batch=true" if word == "--data.batch_frames=auto" else word for word in overrides]
    if arguments.data:
        overrides = [*overrides, f"--data.dirs=[{', '.join(_quoted(path) for path in arguments.data)}]"]
    return load_config(RunConfig, "pretrain", arguments.config, frames_replaced(overrides))


def _run(arguments: argparse.Namespace) -> int | None:
    config = _config(arguments)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return None
    if arguments.output is None:
        raise UserError("--output: not given; name the run's folder with --output RUN")
    if arguments.nproc > 1:
        return _launch(arguments)
    with StopSignal(
        interrupt=True
    ) as stop:  # from here on: importing torch and DeepSpeed takes long enough for a signal to come
        from codecssl.pretrain.run import run

        run(config, arguments.output, profile=arguments.profile, stop=stop)
    return None


def _launch(arguments: argparse.Namespace) -> int:
    """Run this command in `--nproc` processes, as `torchrun --nproc-per-node N -m codecssl.pretrain run ...` does."""
    from codecssl.pretrain.launch import launch

    command = [sys.executable, "-m", "codecssl.pretrain", "run", arguments.config, "--output", str(arguments.output)]
    if arguments.data:
        command += ["--data", *arguments.data]
    for path in arguments.codec_weights or ():
        command += ["--codec-weights", path]
    if arguments.profile:
        command.append("--profile")
    code = launch([*command, *arguments.overrides], arguments.nproc)
    if code == INTERRUPTED:
        print("error: interrupted; the same command resumes from the newest checkpoint", file=sys.stderr)
    return code


def _export(arguments: argparse.Namespace) -> None:
    if arguments.format == "transformers":
        from codecssl.pretrain.export.transformers_format import export_transformers

        output, half = arguments.output, arguments.half
        export_transformers(arguments.run, output, half=half, license=arguments.license, datasets=arguments.dataset)
        print(f"{output}: opens with AutoModel.from_pretrained({str(output)!r}, trust_remote_code=True)")
        return
    if arguments.license or arguments.dataset:
        raise UserError("--license, --dataset: belong to the Hub's model card; add --format transformers")
    from codecssl.pretrain.export.export import export

    export(arguments.run, arguments.output, half=arguments.half)
    print(f"{arguments.output}: model.safetensors, config.json and a model card written")


def _bench(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    import json

    if arguments.peers:
        from codecssl.pretrain.peers.speed import peers
        from codecssl.pretrain.peers.speed import table as peers_table

        found = peers(config, seconds=arguments.seconds, clip_seconds=arguments.clip_seconds, steps=arguments.steps)
        for line in map(json.dumps, found) if arguments.json else peers_table(found):
            print(line, flush=True)
        return

    from codecssl.pretrain.bench import bench, table

    rows = bench(
        config,
        seconds=arguments.seconds,
        clip_seconds=arguments.clip_seconds,
        steps=arguments.steps,
        hubert=not arguments.no_hubert,
    )
    for row in map(json.dumps, rows) if arguments.json else table(rows):
        print(row, flush=True)


def _peers(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from codecssl.pretrain.peers.compare import compare

    found = compare(
        config,
        arguments.output,
        cpu_seconds=arguments.cpu_seconds,
        audio=arguments.audio,
        conv_dim=arguments.conv_dim,
    )
    for name, row in found.items():
        per = row["audio_seconds"] / row["cpu_seconds"]
        print(f"{name:<16}{row['steps']:>7.0f} steps{row['cpu_seconds']:>9.0f} CPU s{per:>8.1f} s of audio per CPU s")


def _label(arguments: argparse.Namespace) -> None:
    import json

    from codecssl.pretrain.labels.label import LabelConfig, label

    found = label(
        LabelConfig(
            source=arguments.source,
            data=tuple(arguments.data),
            output=arguments.output,
            layer=arguments.layer,
            cmvn=arguments.cmvn,
            clusters=arguments.clusters,
            sample_frames=arguments.sample_frames,
            utterance_frames=arguments.utterance_frames,
            clustering=arguments.clustering,
            device=arguments.device,
            seed=arguments.seed,
            tasks=arguments.tasks,
            task=arguments.task,
        )
    )
    if found is None:
        print(f"task {arguments.task} of {arguments.tasks} is done; other tasks' shards are still missing")
        return
    print(json.dumps(found, indent=1))
    numbered = sorted(arguments.output.glob("[0-9]*-*"), key=lambda path: int(path.name.partition("-")[0]))
    quoted = ", ".join(_quoted(str(path)) for path in numbered or [arguments.output])
    print(f'{arguments.output}: train with --objective.target labels --data.labels="[{quoted}]"')


def _status(arguments: argparse.Namespace) -> None:
    import json

    from codecssl.pretrain.monitor.status import lines, status

    state = status(arguments.run)
    print(json.dumps(state) if arguments.json else "\n".join(lines(arguments.run, state)))


def _quoted(path: str) -> str:
    return "'" + path.replace("'", "''") + "'"


def command_line() -> CommandLine:
    """Build the parser of the subcommands and their arguments. No heavy imports."""
    line = CommandLine("codecssl-pretrain", "Pretrain encoders on token shards by masked prediction.")
    _add_run(line)
    _add_label(line)
    export = line.command(
        "export",
        _export,
        group="runs",
        help="write the newest checkpoint as a model folder",
        example="export run --output model",
    )
    export.add_argument(
        "run", metavar="RUN", type=Path, help="the run's folder; with --format transformers an exported model too"
    )
    export.add_argument("--output", metavar="MODEL", type=Path, required=True, help="a new or empty folder")
    export.add_argument(
        "--format",
        choices=("codecssl", "transformers"),
        default="codecssl",
        help="transformers: a folder that AutoModel opens where codecssl is not installed",
    )
    export.add_argument("--license", metavar="ID", help="the weights' licence in the Hub's model card, such as mit")
    export.add_argument(
        "--dataset",
        metavar="NAME",
        action="append",
        default=[],
        help="training data in the Hub's model card; repeatable",
    )
    export.add_argument("--half", action="store_true", help="store the weights as float16; computing stays in fp32")
    status = line.command(
        "status",
        _status,
        group="runs",
        help="a run's progress, speed and late ranks, from its files, also while it runs",
        example="status run",
    )
    status.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    status.add_argument("--json", action="store_true", help="print JSON")
    _add_bench(line)
    _add_peers(line)
    return line


def _add_run(line: CommandLine) -> None:
    run = line.command(
        "run",
        _run,
        group="runs",
        help="train; run it again to resume",
        description=f"Train a model as CONFIG describes. Resumes from RUN's newest checkpoint.\n{OVERRIDES}",
        example="run codec2vec_tiny_codes --data shards --output run --optim.steps 2000",
        resume="resumes from the newest checkpoint",
        overrides=True,
    )
    run.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    run.add_argument(
        "--data", metavar="DIR|URL", nargs="+", help="token shards of one codec: folders, s3://, gs:// or https://"
    )
    run.add_argument("--output", metavar="RUN", type=Path, help="the run's folder")
    add_codec_weights(run)
    run.add_argument(
        "--nproc",
        type=positive,
        default=1,
        metavar="N",
        help="processes on this machine, one per GPU; torchrun is not needed",
    )
    run.add_argument("--profile", action="store_true", help="write a torch trace of some steps into RUN/profile")
    run.add_argument("--print_config", "--print-config", action="store_true", help="print the whole config and exit")


def _add_label(line: CommandLine) -> None:
    label = line.command(
        "label",
        _label,
        group="runs",
        help="k-means labels of a model's features, as targets of another run",
        description="Label every frame of token shards with the cluster of its features; one clustering for all data.",
        example="label run --layer 2 --clusters 500 --data shards --output labels",
        resume="resumes after the last whole shard",
    )
    label.add_argument(
        "source",
        metavar="RUN|MODEL|latents|mfcc|JSONL",
        help="where features come from (mfcc: the stored log-mel plane), or ready labels",
    )
    label.add_argument("--data", metavar="DIR", nargs="+", type=Path, required=True, help="folders of token shards")
    label.add_argument("--output", metavar="LABELS", type=Path, required=True, help="folder of the labels")
    features = label.add_argument_group("features")
    features.add_argument("--layer", type=int, default=-1, metavar="L", help="0: input of the first; -1: the last")
    features.add_argument("--cmvn", action="store_true", help="mean 0 and deviation 1 in each utterance")
    features.add_argument("--device", default="cpu", help="device of the model")
    add_codec_weights(features)
    kmeans = label.add_argument_group("k-means")
    kmeans.add_argument("--clusters", type=int, default=500, metavar="C", help="number of clusters")
    kmeans.add_argument("--sample-frames", type=int, default=300_000, metavar="N", help="frames to fit k-means to")
    kmeans.add_argument("--utterance-frames", type=int, metavar="N", help="frames to take from one utterance, at most")
    kmeans.add_argument("--clustering", type=Path, metavar="FILE", help="use an earlier clustering.safetensors")
    kmeans.add_argument("--seed", type=int, default=0, help="seed of the sample and of k-means")
    add_sharing(label)


def _add_peers(line: CommandLine) -> None:
    peers = line.command(
        "peers",
        _peers,
        group="measurements",
        help="pretrain on tokens, on log-mels and on samples for the same processor time",
        description="Train CONFIG, a log-mel HuBERT and a waveform HuBERT with the same encoder, for the same "
        f"processor time each. Compare them with `codecssl-superb probe`.\n{OVERRIDES}",
        example="peers codecmae_laptop --data shards --output peers --cpu-seconds 600",
        resume="keeps the trainings that have ended",
        overrides=True,
    )
    peers.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    peers.add_argument("--data", metavar="DIR", nargs=1, required=True, help="token shards with a log-mel plane")
    peers.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder of the three models")
    peers.add_argument("--audio", metavar="DIR", type=Path, help="folder to which the paths in the shards are relative")
    peers.add_argument("--cpu-seconds", type=float, default=600.0, help="processor time of each training")
    peers.add_argument("--conv-dim", type=positive, default=512, help="channels of the waveform HuBERT's front end")


def _add_bench(line: CommandLine) -> None:
    bench = line.command(
        "bench",
        _bench,
        group="measurements",
        help="time a training step next to a plain loop and a waveform HuBERT",
        description="Time training steps of CONFIG on random codes, next to the same model without DeepSpeed and a "
        f"waveform HuBERT with the same encoder, in turns in one run. With --data, also the loader alone.\n{OVERRIDES}",
        example="bench codec2vec_tiny_codes --seconds 60",
        overrides=True,
    )
    bench.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    bench.add_argument("--data", metavar="DIR", nargs="+", help="token shards: their codec, and the loader's speed")
    bench.add_argument("--seconds", type=float, default=30.0, help="seconds of audio in a step")
    bench.add_argument("--clip-seconds", type=float, default=15.0, help="seconds of audio in an item of the batch")
    bench.add_argument("--steps", type=positive, default=3, help="steps of each, in turns; the fastest counts")
    bench.add_argument("--peers", action="store_true", help="ours, HuBERTs and a codec in the loop, on a CPU")
    bench.add_argument("--no-hubert", action="store_true", help="leave the waveform HuBERT out")
    bench.add_argument("--json", action="store_true", help="print JSON, one line a measurement")


if __name__ == "__main__":
    sys.exit(guarded(main))
