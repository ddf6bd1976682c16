"""The subcommands of codecssl-superb about task codecs: task-codec, answer, task-codec-report."""

import argparse
from pathlib import Path
from typing import Any

from codecssl.tokenize.common.command_line import (
    CommandLine,
    add_codec_weights,
    console,
    integers,
    positive,
    positive_floats,
)

TASKS = "none (no labels), pr, ks, ic, sid, er, or a name in --probes"


def add_commands(line: CommandLine) -> None:
    """Add `task-codec`, `answer` and `task-codec-report`."""
    group = "task codecs"
    train = line.command(
        "task-codec",
        _compress,
        group=group,
        help="quantise a layer of a model for a task: a codec below 200 bit/s",
        example="task-codec --upstream model --task digits --layer 2 --data shards --output codec",
        resume="resumes from the last checkpoint",
    )
    _common(train)
    train.add_argument("--output", required=True, type=Path, metavar="CODEC", help="the codec's folder")
    train.add_argument("--task", default="none", help=TASKS)
    train.add_argument("--layer", type=int, required=True, help="0 (input of the first layer) to the last layer")
    train.add_argument("--rate-bps", type=float, default=200.0, help="nominal bit rate in bit/s, at most")
    train.add_argument("--seed", type=int, default=0, help="seed of parts, weights and batches")
    answer = line.command(
        "answer",
        _answer,
        group=group,
        help="predict labels from the token shards of a task codec",
        example="answer --codec codec --data tokens --output answers.jsonl",
    )
    answer.add_argument("--codec", required=True, type=Path, metavar="CODEC", help="the folder that task-codec wrote")
    answer.add_argument("--data", required=True, type=Path, metavar="SHARDS", help="made with --codec CODEC")
    answer.add_argument("--output", required=True, type=Path, metavar="FILE", help="a line of JSON per utterance")
    report = line.command(
        "task-codec-report",
        _report,
        group=group,
        help="task metric against bit rate: table, plot, results.jsonl",
        example="task-codec-report --upstream model --task digits --layers 2 --data shards --output rates",
        resume="computes the missing points",
    )
    _common(report)
    report.add_argument("--output", required=True, type=Path, metavar="DIR", help="may hold earlier points")
    report.add_argument(
        "--task", required=True, help="one or more, comma-separated: pr, ks, ic, sid, er, or names in --probes"
    )
    report.add_argument("--layers", type=integers, required=True, help="comma-separated")
    report.add_argument(
        "--rates-bps", type=positive_floats, default=(50.0, 100.0, 200.0), help="bit/s, comma-separated"
    )
    report.add_argument("--seeds", type=integers, default=(0, 1, 2), help="comma-separated")
    report.add_argument(
        "--folds", type=int, default=4, help="number of folds to test, of four per seed; fewer are faster"
    )


def _common(parser: argparse.ArgumentParser) -> None:
    from codecssl.superb.task_codec.config import BottleneckTrainConfig

    train = BottleneckTrainConfig()
    parser.add_argument("--upstream", required=True, type=Path, metavar="MODEL", help="an exported model's folder")
    parser.add_argument("--data", required=True, type=Path, metavar="ROOT|SHARDS", help="manifest.jsonl, or shards")
    parser.add_argument("--frame-rate", type=float, help="codes per second in Hz (default: 12.5; 25 for pr and none)")
    parser.add_argument("--codebook-dim", type=int, default=32, help="width of the codebook lookup, 8 to 64")
    parser.add_argument("--probes", default="probes", metavar="NAME|YAML", help="a name in configs/superb, or a file")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    add_codec_weights(parser)
    parser.add_argument(
        "--head-steps", type=int, default=train.head_steps, help="steps of heads before their input changes"
    )
    parser.add_argument("--a-steps", type=int, default=train.a_steps, help="steps of stage A, without labels")
    parser.add_argument("--b-steps", type=int, default=train.b_steps, help="steps of stage B and of heads, with labels")
    parser.add_argument("--batch-size", type=positive, default=train.batch_size, help="utterances in a batch")
    for stage in ("head", "a", "b"):
        name = f"{stage}_learning_rate"
        parser.add_argument(
            f"--{stage}-learning-rate",
            type=float,
            default=getattr(train, name),
            help="falls to 0 over the stage",
        )
    parser.add_argument(
        "--quantizer-dropout",
        type=float,
        default=train.quantizer_dropout,
        help="share of utterances, 0 to 1",
    )


def _settings(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    from codecssl.superb.task_codec.config import BottleneckTrainConfig

    of_stages = [f"{stage}_{what}" for stage in ("head", "a", "b") for what in ("steps", "learning_rate")]
    names = ("batch_size", "quantizer_dropout", *of_stages)
    train = BottleneckTrainConfig(seed=seed, **{name: getattr(arguments, name) for name in names})
    kept = ("upstream", "data", "output", "task", "frame_rate", "codebook_dim", "probes", "device")
    return {name: getattr(arguments, name) for name in kept} | {"train": train}


def _compress(arguments: argparse.Namespace) -> None:
    from codecssl.superb.task_codec.make_codec import TaskCodecConfig, make_task_codec

    out = console(soft_wrap=True)
    settings = _settings(arguments, arguments.seed)
    config = TaskCodecConfig(layer=arguments.layer, rate_bps=arguments.rate_bps, **settings)
    made = make_task_codec(config, on_progress=out.print)["training"]
    out.print(f"{arguments.output}: {made['rate']}; entries in use {made['used_entries']} of {made['entries']}")
    if "test_error_unquantised" in made:
        kept = ", ".join(f"{100 * error:.2f}" for error in made["test_error_by_codebooks"])
        out.print(f"test error % by codebooks kept: {kept}; unquantised {100 * made['test_error_unquantised']:.2f}")


def _answer(arguments: argparse.Namespace) -> None:
    from codecssl.superb.task_codec.answer import answer

    print(f"wrote {answer(arguments.codec, arguments.data, arguments.output)} answers to {arguments.output}")


def _report(arguments: argparse.Namespace) -> None:
    from codecssl.superb.task_codec.rates.report import ReportConfig, report

    out = console(soft_wrap=True)
    grid = {"layers": arguments.layers, "rates_bps": arguments.rates_bps, "seeds": arguments.seeds}
    grid["folds"] = arguments.folds
    settings = _settings(arguments, 0)
    tasks = tuple(settings.pop("task").split(","))
    for path in report(ReportConfig(tasks=tasks, **grid, **settings), out.print):
        out.print(f"wrote {path}")
