"""codecssl-superb: run the tasks, probe features, make the report, unpack the sample corpus."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from codecssl.superb.commands import cache, report, run, task_codec
from codecssl.superb.tasks import BUDGETS, TASKS
from codecssl.tokenize.cli import Parser
from codecssl.tokenize.common.errors import UserError

UPSTREAMS = (
    "an exported model's folder, fbank, logmel, mfcc, codes (the codec's latents), random (an untrained encoder), "
    "codes:MODEL, codes:CODEC, random:MODEL, NAME@s3prl, or hf:PATH|NAME (transformers); bare codes and random follow "
    "the first model named; repeat to compare"
)


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 an error on one line, 2 usage."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="codecssl-superb", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shape = argparse.ArgumentDefaultsHelpFormatter

    run.add_command(commands, shape, _common)

    probe = commands.add_parser("probe", help="linear probes of frozen features", formatter_class=shape)
    probe.set_defaults(command=_probe)
    _common(probe)
    probe.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="MANIFEST|SHARDS",
        help="a manifest.jsonl of audio, or a folder of token shards",
    )
    probe.add_argument(
        "--probes",
        default="probes",
        metavar="NAME|YAML",
        help="what to probe: a name in configs/superb, or a file",
    )
    probe.add_argument("--seeds", type=run.integers, default=(0, 1, 2), help="of the folds, comma-separated")
    probe.add_argument("--folds", type=int, default=4)
    probe.add_argument(
        "--pool",
        choices=("meanstd", "mean"),
        default="meanstd",
        help="over time: mean and deviation, or the mean alone",
    )
    probe.add_argument(
        "--C",
        type=run.numbers,
        default=(1e-3, 1e-2, 1e-1, 1.0, 10.0),
        metavar="C,C,...",
        help="inverse strengths of the L2 penalty; the training folds choose one; one value fixes it",
    )

    report.add_command(commands)

    tasks = commands.add_parser("tasks", help="list the tasks and the budgets")
    tasks.set_defaults(command=_tasks)

    sample = commands.add_parser("sample", help="unpack the spoken sample corpus that ships with codecssl")
    sample.set_defaults(command=_sample)
    sample.add_argument("output", type=Path, metavar="OUTPUT")

    cache.add_commands(commands, shape)
    task_codec.add_commands(commands, shape)

    mini = commands.add_parser("mini", help="build mini-SUPERB from a labelled manifest", formatter_class=shape)
    mini.set_defaults(command=_mini)
    mini.add_argument("manifest", type=Path, metavar="MANIFEST", help="a .jsonl with path, task and label columns")
    mini.add_argument("--output", required=True, type=Path, metavar="ROOT", help="the corpus folder to make")
    mini.add_argument("--seed", type=int, default=0, help="of splits, trials, cuts and mixtures")
    mini.add_argument("--recipe", default="mini", metavar="NAME|YAML", help="sizes: of configs/superb, or a file")
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--upstream", action="append", required=True, metavar="MODEL|NAME", help=UPSTREAMS)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="results; may hold earlier ones")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--jobs", type=_positive, default=1, help="at a time")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is meant")
    return int(text)


def _probe(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from codecssl.superb.probe import probe, tables
    from codecssl.superb.probe.crossvalidate import Settings

    settings = Settings(
        folds=arguments.folds,
        seeds=arguments.seeds,
        C=arguments.C,
        pool=arguments.pool,
        device=arguments.device,
        jobs=arguments.jobs,
    )
    probes = probe.load_probes(arguments.probes)
    console = Console(highlight=False)
    rows = probe.run(arguments.upstream, arguments.data, probes, arguments.output, settings, report=console.print)
    for each in tables.console_tables(rows):
        console.print(each)
    console.print(f"wrote {tables.write_markdown(arguments.output)}", soft_wrap=True)
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "what", "official corpus", "metrics", "s3prl")
    for task in TASKS.values():
        labels = ", ".join(metric.label for metric in task.metrics)
        table.add_row(task.name, task.title, task.corpus, labels, task.problem or "quesst14_dtw")
    budgets = Table("budget", "steps", "learning rates by default")
    for budget in BUDGETS.values():
        steps = "all" if budget.divisor == 1 else f"1/{budget.divisor} of the official ones, at least {budget.least}"
        steps += "; fewer for heavy heads, tested on a few utterances (asr, sf)" if budget.lighten else ""
        budgets.add_row(budget.name, steps, ", ".join(f"{rate:g}" for rate in budget.learning_rates) or "official")
    for each in (table, budgets):
        Console().print(each)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from codecssl.superb.sample.unpack import unpack

    print(unpack(arguments.output))
    return 0


def _mini(arguments: argparse.Namespace) -> int:
    from codecssl.superb.mini.build import build

    print(build(arguments.manifest, arguments.output, seed=arguments.seed, recipe=arguments.recipe))
    return 0


if __name__ == "__main__":
    sys.exit(main())
