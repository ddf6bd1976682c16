"""The subcommands of codecssl-superb about corpora and tasks: tasks, sample, mini."""

import argparse
from pathlib import Path

from codecssl.superb.tasks import BUDGETS, TASKS
from codecssl.tokenize.common.command_line import CommandLine, console


def add_commands(line: CommandLine) -> None:
    """Add `tasks`, `sample` and `mini`."""
    group = "tasks and corpora"
    line.command("tasks", _tasks, group=group, help="list the tasks and the budgets", example="tasks")
    sample = line.command(
        "sample",
        _sample,
        group=group,
        help="unpack the shipped corpus of synthetic speech",
        example="sample corpus",
        resume="unpacks it again",
    )
    sample.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder")
    mini = line.command(
        "mini",
        _mini,
        group=group,
        help="build mini-SUPERB from a labelled manifest",
        example="mini manifest.jsonl --output mini",
        resume="builds what is missing",
    )
    mini.add_argument("manifest", type=Path, metavar="MANIFEST", help="a .jsonl with path, task and label columns")
    mini.add_argument("--output", required=True, type=Path, metavar="ROOT", help="the corpus folder to make")
    mini.add_argument("--seed", type=int, default=0, help="seed of splits, trials, cuts and mixtures")
    mini.add_argument("--recipe", default="mini", metavar="NAME|YAML", help="sizes: of configs/superb, or a file")


def _tasks(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    table = Table("task", "title", "official corpus", "metrics", "s3prl")
    for task in TASKS.values():
        labels = ", ".join(metric.label for metric in task.metrics)
        table.add_row(task.name, task.title, task.corpus, labels, task.problem or "quesst14_dtw")
    budgets = Table("budget", "steps", "learning rates by default")
    for budget in BUDGETS.values():
        steps = "all" if budget.divisor == 1 else f"1/{budget.divisor} of the official ones, at least {budget.least}"
        steps += "; fewer for heavy heads, tested on a few utterances (asr, sf)" if budget.lighten else ""
        budgets.add_row(budget.name, steps, ", ".join(f"{lr:g}" for lr in budget.learning_rates) or "official")
    for each in (table, budgets):
        console().print(each)


def _sample(arguments: argparse.Namespace) -> None:
    from codecssl.superb.sample.unpack import unpack

    print(unpack(arguments.output))


def _mini(arguments: argparse.Namespace) -> None:
    from codecssl.superb.mini.build import build

    print(build(arguments.manifest, arguments.output, seed=arguments.seed, recipe=arguments.recipe))
