"""The command codecssl-superb run: which runs there are, doing those that wait, the table at the end."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codecssl.superb.tasks import BUDGETS, TASKS, choose
from codecssl.tokenize.common.cores import available_cores
from codecssl.tokenize.common.errors import UserError, message_on_one_line

if TYPE_CHECKING:
    from codecssl.superb.runner.run import Run


def add_command(commands: Any, shape: Any, common: Any) -> None:
    """`run`, among the other commands; `common` adds the arguments that it shares with others."""
    run = commands.add_parser("run", help="run tasks for upstreams; finished runs are skipped", formatter_class=shape)
    run.set_defaults(command=_run)
    common(run)
    run.add_argument("--tasks", default="all", help=f"comma-separated, of {','.join(TASKS)}; or all")
    run.add_argument(
        "--data",
        required=True,
        metavar="ROOT|sample",
        help="folder with manifest.jsonl, or with SUPERB's corpora as unpacked, or the word sample",
    )
    run.add_argument("--side", type=Path, metavar="DIR", help="small lists that official corpora need")
    run.add_argument("--lr", type=_rates, help="learning rates to sweep, 1e-3,1e-4; default: what the budget says")
    run.add_argument("--budget", choices=BUDGETS, default="quick", help="how many of the official steps to run")
    seeds = run.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=integers, default=(0,), help="of heads, order of data, random upstream: 0,1,2")
    seeds.add_argument("--seed", type=int, help="one of them")
    run.add_argument("--folds", action="store_true", help="er: test five folds in turn (full always does)")
    run.add_argument("--lm", type=Path, metavar="FILE", help="asr: 4-gram model (ARPA, may be .gz) for WER with LM")
    run.add_argument("--parts", type=int, default=1, metavar="N", help="share the list of runs among N processes")
    run.add_argument("--part", type=int, default=0, metavar="I", help="this process does every N-th run from the I-th")
    run.add_argument("--dry-run", action="store_true", help="print the runs, done or waiting, and do nothing")
    run.add_argument("--num-workers", type=int, default=0, help="data-loading processes per run")
    run.add_argument("--cache", type=Path, metavar="DIR", help="token cache, filled first; default: OUTPUT/cache")
    run.add_argument("--feature-cache-gib", type=float, default=2.0, help="memory per job for hidden states; 0: none")


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate < 10 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text}: learning rates are numbers between 0 and 10, as in 1e-3,1e-4")
    return rates


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers, comma-separated."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: whole numbers are meant, as in 0,1,2") from None


def numbers(text: str) -> tuple[float, ...]:
    """Positive numbers, comma-separated."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = (0.0,)
    if not all(0 < number < float("inf") for number in found):
        raise argparse.ArgumentTypeError(f"{text}: positive numbers are meant, as in 1e-3,1e-1,10") from None
    return found


def _runs(arguments: argparse.Namespace) -> "list[Run]":
    from codecssl.superb.reporting.tables import SAMPLE
    from codecssl.superb.runner.sweep import Sweep, part
    from codecssl.superb.sample.unpack import unpack
    from codecssl.superb.upstreams.expert import parse_all

    upstreams, tasks = parse_all(arguments.upstream), choose(arguments.tasks)
    root = unpack(arguments.output / "sample") if arguments.data == "sample" else Path(arguments.data)
    sweep = Sweep(
        upstreams=upstreams,
        tasks=tasks,
        budget=BUDGETS[arguments.budget],
        data=SAMPLE if arguments.data == "sample" else root.resolve().name,
        root=root,
        output=arguments.output,
        rates=arguments.lr,
        seeds=arguments.seeds if arguments.seed is None else (arguments.seed,),
        folds=arguments.folds,
        side=arguments.side,
        language_model=arguments.lm,
    )
    return part(sweep.runs(), arguments.parts, arguments.part)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from codecssl.superb.commands import cache
    from codecssl.superb.runner.lm_decoding import check_decoder

    console = Console(highlight=False, soft_wrap=True, file=sys.stdout)  # not where a run sends what s3prl prints
    if arguments.lm is not None:
        check_decoder()
    runs = _runs(arguments)
    waiting = sum(not run.finished for run in runs)
    console.print(f"{len(runs)} runs, {len(runs) - waiting} finished before; {arguments.jobs} at a time")
    if arguments.dry_run:
        for run in runs:
            console.print(f"{'done   ' if run.finished else 'waiting'}  {title(run)}  {run.folder}")
        return 0
    if waiting:
        cache.fill_before(arguments, console)
    failures = _do(arguments, runs, console)
    if any(run.finished for run in runs):
        from codecssl.superb.commands.report import show

        show([arguments.output])
    if failures:
        first = next(iter(failures.values()))
        raise UserError(f"{len(failures)} of {len(runs)} runs failed, the first with: {message_on_one_line(first)}")
    return 0


def _do(arguments: argparse.Namespace, runs: "list[Run]", console: Any) -> dict[str, Exception]:
    from codecssl.superb.runner.jobs import run_all
    from codecssl.superb.runner.run import Machine, Run

    machine = Machine(
        device=arguments.device,
        num_workers=arguments.num_workers,
        feature_cache_gib=arguments.feature_cache_gib,
        threads=_threads(arguments.jobs),
        cache=None if arguments.cache is None else str(arguments.cache),
    )

    def report(run: Run, outcome: Any) -> None:
        if isinstance(outcome, Exception):
            reason = message_on_one_line(outcome)
            console.print(f"{title(run)}  [red]failed[/]: {reason} (see {run.folder / 'run.log'})")
        else:
            console.print(f"{title(run)}  {_figures(run, outcome)} ({outcome['seconds']:.0f} s)")

    with console.status("starting") as status:  # shown on a terminal only

        def begin(run: Run) -> None:
            status.update(f"{title(run)}  (progress: {run.folder / 'run.log'})")

        return run_all(runs, machine, jobs=arguments.jobs, report=report, begin=begin)


def title(run: "Run") -> str:
    """A run in a line."""
    rate = "official lr" if run.learning_rate is None else f"lr {run.learning_rate:g}"
    rate = "no training" if TASKS[run.task].problem is None else rate
    fold = f"  fold {run.fold}" if run.fold is not None else ""
    return f"{run.upstream.name}  {run.task}  {rate}  seed {run.seed}{fold}"


def _figures(run: "Run", row: dict[str, Any]) -> str:
    values = [(m.label, row["values"][m.key]) for m in TASKS[run.task].metrics if m.key in row["values"]]
    skipped = [f"{sum(row['skipped'].values())} skipped"] if row["skipped"] else []
    return ", ".join([*(f"{label} {100 * value:.1f}" for label, value in values), *skipped])


def _threads(jobs: int) -> int | None:
    return None if jobs == 1 else max(1, available_cores() // jobs)
