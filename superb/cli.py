"""codecssl-superb: run the tasks, probe features, make the report, unpack the sample corpus."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codecssl.superb.tasks import BUDGETS, TASKS, choose
from codecssl.tokenize.errors import UserError

if TYPE_CHECKING:
    from codecssl.superb.run import Run

UPSTREAMS = (
    "an exported model's folder, fbank, codes (the codec's latents), random (an untrained encoder), "
    "codes:MODEL, codes:CODEC, random:MODEL, or NAME@s3prl; bare codes and random follow the first model "
    "named; repeat to compare"
)


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 an error on one line, 2 usage."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="codecssl-superb", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shape = argparse.ArgumentDefaultsHelpFormatter

    run = commands.add_parser("run", help="run tasks for upstreams; finished runs are skipped", formatter_class=shape)
    run.set_defaults(command=_run)
    _common(run)
    run.add_argument("--tasks", default="all", help=f"comma-separated, of {','.join(TASKS)}; or all")
    run.add_argument(
        "--data", required=True, metavar="ROOT|sample", help="folder with manifest.jsonl, or the word sample"
    )
    run.add_argument("--lr", type=_rates, help="learning rates to sweep, 1e-3,1e-4; default: what the budget says")
    run.add_argument("--budget", choices=BUDGETS, default="quick", help="how many of the official steps to run")
    run.add_argument("--seed", type=int, default=0, help="of heads, of the order of data, of the random upstream")
    run.add_argument("--num-workers", type=int, default=0, help="data-loading processes per run")
    run.add_argument("--feature-cache-gib", type=float, default=2.0, help="memory per job for hidden states; 0: none")

    probe = commands.add_parser("probe", help="linear probes of frozen, mean-pooled features", formatter_class=shape)
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
    probe.add_argument("--seeds", type=_integers, default=(0, 1, 2), help="of the folds, comma-separated")
    probe.add_argument("--folds", type=int, default=4)

    report = commands.add_parser("report", help="table, report.md and report.html of finished runs")
    report.set_defaults(command=_report)
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="--output of run; files go to the first")

    tasks = commands.add_parser("tasks", help="list the tasks and the budgets")
    tasks.set_defaults(command=_tasks)

    sample = commands.add_parser("sample", help="unpack the spoken sample corpus that ships with codecssl")
    sample.set_defaults(command=_sample)
    sample.add_argument("output", type=Path, metavar="OUTPUT")
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--upstream", action="append", required=True, metavar="MODEL|NAME", help=UPSTREAMS)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="results; may hold earlier ones")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--jobs", type=_positive, default=1, help="at a time")


def _rates(text: str) -> tuple[float, ...]:
    rates = tuple(float(part) for part in text.split(","))
    if not all(0 < rate < 10 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text}: learning rates lie between 0 and 10")
    return rates


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def _runs(arguments: argparse.Namespace) -> "list[Run]":
    from codecssl.superb.expert import parse_all
    from codecssl.superb.report import SAMPLE
    from codecssl.superb.run import Run
    from codecssl.superb.sample import unpack
    from codecssl.superb.tasks import Corpus

    upstreams, tasks = parse_all(arguments.upstream), choose(arguments.tasks)
    root = unpack(arguments.output / "sample") if arguments.data == "sample" else Path(arguments.data)
    for task in tasks:
        Corpus(root).examples(task)
    rates = arguments.lr or BUDGETS[arguments.budget].learning_rates or (None,)
    name = SAMPLE if arguments.data == "sample" else root.resolve().name
    return [
        Run(
            upstream=upstream,
            task=task.name,
            learning_rate=rate,
            budget=BUDGETS[arguments.budget],
            seed=arguments.seed,
            data=name,
            root=root,
            output=arguments.output,
        )
        for upstream in upstreams
        for task in tasks
        for rate in rates
    ]


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from codecssl.superb.run import Machine, Run, run_all

    console, runs = Console(highlight=False), _runs(arguments)
    machine = Machine(
        device=arguments.device,
        num_workers=arguments.num_workers,
        feature_cache_gib=arguments.feature_cache_gib,
        threads=_threads(arguments.jobs),
    )
    waiting = sum(not run.finished for run in runs)
    console.print(f"{len(runs)} runs, {len(runs) - waiting} finished before; {arguments.jobs} at a time")

    def report(run: Run, outcome: Any) -> None:
        rate = "official lr" if run.learning_rate is None else f"lr {run.learning_rate:g}"
        head = f"{run.upstream.name}  {run.task}  {rate}"
        if isinstance(outcome, Exception):
            console.print(f"{head}  [red]failed[/]: {_one_line(outcome)} (see {run.folder / 'run.log'})")
        else:
            console.print(f"{head}  {100 * outcome['value']:.1f} % ({outcome['seconds']:.0f} s)")

    failures = run_all(runs, machine, jobs=arguments.jobs, report=report)
    if any(run.finished for run in runs):
        _show([arguments.output])
    if failures:
        first = next(iter(failures.values()))
        raise UserError(f"{len(failures)} of {len(runs)} runs failed, the first with: {_one_line(first)}")
    return 0


def _threads(jobs: int) -> int | None:
    import os

    return None if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _show(folders: Sequence[Path]) -> None:
    from rich.console import Console

    from codecssl.superb.report import console_table, load, write

    comparisons, console = load(folders), Console(highlight=False)
    for comparison in comparisons:
        console.print(console_table(comparison))
    console.print("wrote " + " and ".join(str(path) for path in write(comparisons, folders[0])), soft_wrap=True)


def _report(arguments: argparse.Namespace) -> int:
    _show(arguments.folders)
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from codecssl.superb import probe
    from codecssl.superb.crossvalidate import Settings

    settings = Settings(folds=arguments.folds, seeds=arguments.seeds, device=arguments.device, jobs=arguments.jobs)
    probes = probe.load_probes(arguments.probes)
    console = Console(highlight=False)
    rows = probe.run(arguments.upstream, arguments.data, probes, arguments.output, settings, report=console.print)
    console.print(probe.console_table(rows))
    console.print(f"wrote {probe.write_markdown(rows, arguments.output)}", soft_wrap=True)
    return 0


def _tasks(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "what", "official corpus", "metric", "s3prl problem")
    for task in TASKS.values():
        table.add_row(task.name, task.title, task.corpus, task.metric, task.problem)
    budgets = Table("budget", "steps", "learning rates by default")
    for budget in BUDGETS.values():
        steps = "all" if budget.divisor == 1 else f"1/{budget.divisor} of the official ones, at least {budget.least}"
        budgets.add_row(budget.name, steps, ", ".join(f"{rate:g}" for rate in budget.learning_rates) or "official")
    for each in (table, budgets):
        Console().print(each)
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from codecssl.superb.sample import unpack

    print(unpack(arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
