"""The commands of codecssl-superb that make codes for a machine: compress, answer, compress-report."""

import argparse
from pathlib import Path
from typing import Any

from codecssl.superb.commands.run import integers

TASKS = "none (no labels), pr, ks, ic, sid, er, or a name in --probes"


def add_commands(commands: Any, shape: Any) -> None:
    """`compress`, `answer` and `compress-report`, among the other commands."""
    compress = commands.add_parser(
        "compress", help="quantise a layer of a model for a task: a codec below 200 bit/s", formatter_class=shape
    )
    compress.set_defaults(command=_compress)
    _common(compress)
    compress.add_argument("--output", required=True, type=Path, metavar="CODEC", help="the codec's folder")
    compress.add_argument("--task", default="none", help=TASKS)
    compress.add_argument("--layer", type=int, required=True, help="L, 0 (input of the first layer) to the last")
    compress.add_argument("--rate-bps", type=float, default=200.0, help="bit/s, nominal, at most")
    compress.add_argument("--seed", type=int, default=0, help="of parts, weights and batches")

    answer = commands.add_parser("answer", help="what a codec of compress answers to its own token shards")
    answer.set_defaults(command=_answer)
    answer.add_argument("--codec", required=True, type=Path, metavar="CODEC", help="the folder that compress wrote")
    answer.add_argument("--data", required=True, type=Path, metavar="SHARDS", help="made with --codec CODEC")
    answer.add_argument("--output", required=True, type=Path, metavar="FILE", help="a line of JSON per utterance")

    report = commands.add_parser(
        "compress-report", help="task metric against rate: table, plot, results.jsonl", formatter_class=shape
    )
    report.set_defaults(command=_report)
    _common(report)
    report.add_argument("--output", required=True, type=Path, metavar="DIR", help="may hold earlier points")
    report.add_argument(
        "--task", required=True, help="one or more, comma-separated: pr, ks, ic, sid, er, or of --probes"
    )
    report.add_argument("--layers", type=integers, required=True, help="comma-separated")
    report.add_argument("--rates-bps", type=_floats, default=(50.0, 100.0, 200.0), help="bit/s, comma-separated")
    report.add_argument("--seeds", type=integers, default=(0, 1, 2), help="comma-separated")
    report.add_argument("--folds", type=int, default=4, help="of each seed's four, tested in turn; fewer are quicker")


def _common(parser: argparse.ArgumentParser) -> None:
    from codecssl.superb.task_codec.config import TrainConfig

    train = TrainConfig()
    parser.add_argument("--upstream", required=True, type=Path, metavar="MODEL", help="an exported model's folder")
    parser.add_argument("--data", required=True, type=Path, metavar="ROOT|SHARDS", help="manifest.jsonl, or shards")
    parser.add_argument("--frame-rate", type=float, help="Hz, of the codes; default: 12.5, 25 for pr and none")
    parser.add_argument("--codebook-dim", type=int, default=32, help="width of the lookup, 8 to 64")
    parser.add_argument("--probes", default="probes", metavar="NAME|YAML", help="of configs/superb, or a file")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--head-steps", type=int, default=train.head_steps, help="of heads, before what they read changes"
    )
    parser.add_argument("--a-steps", type=int, default=train.a_steps, help="of stage A, without labels")
    parser.add_argument("--b-steps", type=int, default=train.b_steps, help="of stage B and of every head, with labels")
    parser.add_argument("--batch-size", type=int, default=train.batch_size, help="utterances")
    for stage in ("head", "a", "b"):
        name = f"{stage}_learning_rate"
        parser.add_argument(
            f"--{stage}-learning-rate", type=float, default=getattr(train, name), help="falls to 0 over the stage"
        )
    parser.add_argument(
        "--quantizer-dropout", type=float, default=train.quantizer_dropout, help="share of utterances, 0 to 1"
    )


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: numbers are meant, as in 50,100,200") from None


def _settings(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    from codecssl.superb.task_codec.config import TrainConfig

    of_stages = [f"{stage}_{what}" for stage in ("head", "a", "b") for what in ("steps", "learning_rate")]
    names = ("batch_size", "quantizer_dropout", *of_stages)
    train = TrainConfig(seed=seed, **{name: getattr(arguments, name) for name in names})
    kept = ("upstream", "data", "output", "task", "frame_rate", "codebook_dim", "probes", "device")
    return {name: getattr(arguments, name) for name in kept} | {"train": train}


def _compress(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from codecssl.superb.task_codec.compress import CompressConfig, compress

    console = Console(highlight=False, soft_wrap=True)
    settings = _settings(arguments, arguments.seed)
    config = CompressConfig(layer=arguments.layer, rate_bps=arguments.rate_bps, **settings)
    made = compress(config, report=console.print)["training"]
    console.print(f"{arguments.output}: {made['rate']}; entries in use {made['used_entries']} of {made['entries']}")
    if "test_error_unquantised" in made:
        kept = ", ".join(f"{100 * error:.2f}" for error in made["test_error_by_codebooks"])
        console.print(f"test error % by codebooks kept: {kept}; unquantised {100 * made['test_error_unquantised']:.2f}")
    return 0


def _answer(arguments: argparse.Namespace) -> int:
    from codecssl.superb.task_codec.answer import answer

    print(f"wrote {answer(arguments.codec, arguments.data, arguments.output)} answers to {arguments.output}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from codecssl.superb.task_codec.rates.report import ReportConfig, report

    console = Console(highlight=False, soft_wrap=True)
    grid = {"layers": arguments.layers, "rates_bps": arguments.rates_bps, "seeds": arguments.seeds}
    grid["folds"] = arguments.folds
    settings = _settings(arguments, 0)
    tasks = tuple(settings.pop("task").split(","))
    for path in report(ReportConfig(tasks=tasks, **grid, **settings), console.print):
        console.print(f"wrote {path}")
    return 0
