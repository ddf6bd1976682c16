"""The subcommand of codecssl-superb that writes embeddings."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from codecssl.superb.commands.common import DEVICE
from codecssl.tokenize.common.command_line import CommandLine, add_codec_weights, amount, positive, progress_bar, whole

if TYPE_CHECKING:
    from codecssl.superb.embed.embed import EmbedConfig


def add_commands(line: CommandLine) -> None:
    """Add `embed`."""
    sub = line.command(
        "embed",
        _embed,
        group="embeddings",
        help="embeddings of audio files or token shards, as Parquet",
        example="embed recordings --upstream model --output embeddings",
        description=(
            "One embedding of each input, or the states of every frame, of any upstream. The Parquet files open with"
            " datasets.load_dataset('parquet', data_files='OUTPUT/data/*.parquet'). Inputs longer than a window are"
            " cut into overlapping windows; frames of the overlap are dropped."
        ),
        resume="resumes after the last whole shard",
    )
    _add_inputs(sub)
    add = sub.add_argument
    add("--output", "-o", required=True, type=Path, metavar="DIR", help="the folder of embeddings")
    add("--tasks", type=positive, default=1, metavar="N", help="divide the work into N tasks")
    add("--task", type=whole, default=0, metavar="I", help="do task I of 0..N-1")
    timed = line.command(
        "embed-bench",
        _bench,
        group="embeddings",
        help="files per second of embed, and the share of its time that the model alone takes",
        example="embed-bench recordings --upstream model",
        description="Embeds all inputs into a temporary folder. Token shards show the model without a codec.",
    )
    _add_inputs(timed)
    timed.add_argument("--json", action="store_true", help="print JSON, one line")


def _add_inputs(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="audio as in codecssl-tokenize run, or one folder of token shards")
    add("--upstream", required=True, metavar="MODEL|NAME", help="as in run: an exported model, fbank, codes, ...")
    add(
        "--layer", default="mean", metavar="L|mean", help="hidden state 0 to L (negative: from the last), or their mean"
    )
    add("--pool", default="mean", choices=("mean", "meanstd"), help="pooling over the frames of an input")
    add("--frames", action="store_true", help="keep the states of every frame too, as safetensors")
    add("--device", default="cpu", help=DEVICE)
    add_codec_weights(sub)
    add("--window-seconds", type=amount, default=30.0, help="longest piece that goes through the upstream at once")
    add("--overlap-seconds", type=amount, default=1.0, help="context of a window on each side, computed and dropped")
    add(
        "--shard-inputs",
        type=positive,
        default=512,
        metavar="N",
        help="inputs per shard; a kill loses at most one shard",
    )


def _config(arguments: argparse.Namespace, output: Path, tasks: int = 1, task: int = 0) -> "EmbedConfig":
    from codecssl.superb.embed.embed import EmbedConfig
    from codecssl.tokenize.common.errors import UserError

    layer = arguments.layer
    if layer != "mean" and not layer.lstrip("-").isdigit():
        raise UserError(f"--layer {layer}: give a number, or mean")
    names = ("upstream", "pool", "frames", "device", "window_seconds", "overlap_seconds")
    return EmbedConfig(
        sources=tuple(arguments.sources),
        output=output,
        tasks=tasks,
        task=task,
        layer=None if layer == "mean" else int(layer),
        shard_inputs=arguments.shard_inputs,
        **{name: getattr(arguments, name) for name in names},
    )


def _embed(arguments: argparse.Namespace) -> None:
    from codecssl.superb.embed.embed import embed

    config = _config(arguments, arguments.output, arguments.tasks, arguments.task)
    with progress_bar("inputs") as on_progress:
        totals = embed(config, on_progress)
    if totals is None:
        print(f"{config.output}: task {config.task} of {config.tasks} done; other tasks' shards are missing")
    else:
        print(f"{config.output}: {totals['embeddings']} embeddings, {totals['failed']} failed")


def _bench(arguments: argparse.Namespace) -> None:
    import json

    from codecssl.superb.embed.bench import bench

    row = bench(_config(arguments, Path()))
    if arguments.json:
        print(json.dumps(row))
        return
    print(f"{row['inputs']} inputs, {row['failed']} failed, {row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s of CPU)")
    print(f"{row['files_per_second']:.1f} files per second")
    shares = (f"{name} {100 * row[f'{name}_share']:.1f} %" for name in ("model", "codec", "other"))
    print(f"time: {', '.join(shares)}")
