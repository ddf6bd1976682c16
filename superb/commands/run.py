"""The subcommand `codecssl-superb run`: the runs of a sweep, those that are not finished, the table at the end."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codecssl.superb.commands.common import SIDE, add_upstreams, data_root
from codecssl.superb.tasks import BUDGETS, TASKS, choose
from codecssl.tokenize.common.command_line import CommandLine, console, integers, positive, whole
from codecssl.tokenize.common.cores import available_cores
from codecssl.tokenize.common.errors import UserError, message_on_one_line
from codecssl.tokenize.common.files import refuse_links_out

if TYPE_CHECKING:
    from codecssl.superb.runner.run import Run
    from codecssl.superb.runner.sweep import Sweep


class TasksOrShare(argparse.Action):
    """`--tasks ks,sid` names tasks; `--tasks 12`, with `--task I`, shares the runs among 12 processes."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if not values.isdecimal():
            namespace.tasks = values
        elif int(values):
            namespace.parts = int(values)
        else:
            raise argparse.ArgumentError(self, "0: must be at least 1 to share the work, or names of tasks")


def add_commands(line: CommandLine) -> None:
    """Add `run`."""
    run = line.command(
        "run",
        _run,
        group="evaluation",
        help="run tasks for upstreams; finished runs are skipped",
        example="run --upstream model --upstream fbank --tasks ks,sid --data sample --output superb --budget smoke",
        resume="skips finished runs and resumes this one",
    )
    add_upstreams(run)
    run.add_argument(
        "--tasks",
        action=TasksOrShare,
        default="all",
        metavar="TASK,...|N",
        help=f"comma-separated, of {','.join(TASKS)}; all: SUPERB's ten; sound: the last three. A number shares the"
        " work, see --task",
    )
    run.add_argument(
        "--data",
        required=True,
        metavar="ROOT|sample",
        help="folder with manifest.jsonl, or with SUPERB's corpora as unpacked, or the word sample",
    )
    run.add_argument("--side", type=Path, metavar="DIR", help=SIDE)
    run.add_argument("--dry-run", action="store_true", help="list the runs, done or waiting, and exit")
    training = run.add_argument_group("training")
    training.add_argument("--budget", choices=BUDGETS, default="quick", help="share of the official steps to run")
    training.add_argument("--lr", type=_lrs, help="learning rates to sweep, 1e-3,1e-4 (default: those of the budget)")
    seeds = training.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seeds", type=integers, default=(0,), help="seeds of heads, data order and random upstream: 0,1,2"
    )
    seeds.add_argument("--seed", type=int, help="one seed")
    training.add_argument("--folds", action="store_true", help="er: test five folds in turn (full always does)")
    training.add_argument("--lm", type=Path, metavar="FILE", help="asr: 4-gram model (ARPA, .gz) for WER with LM")
    shared = run.add_argument_group("sharing the runs, for example in a job array")
    shared.add_argument(
        "--task",
        type=whole,
        dest="part",
        default=0,
        metavar="I",
        help="with --tasks N: do every N-th run from run I",
    )
    shared.add_argument("--parts", type=positive, default=1, metavar="N", help="the same as --tasks N")
    shared.add_argument("--part", type=whole, default=0, metavar="I", help="the same as --task I")
    speed = run.add_argument_group("speed and memory")
    speed.add_argument("--num-workers", type=whole, default=0, help="data-loading processes per run")
    speed.add_argument("--cache", type=Path, metavar="DIR", help="token cache, filled first (default: OUTPUT/cache)")
    speed.add_argument("--feature-cache-gib", type=float, default=2.0, help="memory per job for hidden states; 0: none")


def _lrs(text: str) -> tuple[float, ...]:
    try:
        lrs = tuple(float(part) for part in text.split(","))
    except ValueError:
        lrs = (0.0,)
    if not all(0 < lr < 10 for lr in lrs):
        raise argparse.ArgumentTypeError(f"{text}: must be learning rates between 0 and 10, as in 1e-3,1e-4")
    return lrs


def _sweep(arguments: argparse.Namespace) -> "Sweep":
    from codecssl.superb.reporting.tables import SAMPLE
    from codecssl.superb.runner.sweep import Sweep
    from codecssl.superb.upstreams.names import parse_all

    upstreams, tasks = parse_all(arguments.upstream), choose(arguments.tasks)
    root = data_root(arguments.data, arguments.output)
    return Sweep(
        upstreams=upstreams,
        tasks=tasks,
        budget=BUDGETS[arguments.budget],
        data=SAMPLE if arguments.data == "sample" else root.resolve().name,
        root=root,
        output=arguments.output,
        lrs=arguments.lr,
        seeds=arguments.seeds if arguments.seed is None else (arguments.seed,),
        folds=arguments.folds,
        side=arguments.side,
        language_model=arguments.lm,
    )


def _run(arguments: argparse.Namespace) -> None:
    from codecssl.superb.runner.lm_decoding import check_decoder
    from codecssl.superb.runner.sweep import part

    out = console(soft_wrap=True, file=sys.stdout)  # not where a run sends what s3prl prints
    if arguments.lm is not None:
        check_decoder()
    refuse_links_out(arguments.output)
    sweep = _sweep(arguments)
    runs = part(sweep.runs(), arguments.parts, arguments.part)
    waiting = sum(not run.finished for run in runs)
    out.print(f"{len(runs)} runs, {len(runs) - waiting} finished before; {arguments.jobs} at a time")
    if arguments.dry_run:
        for run in runs:
            out.print(f"{'done   ' if run.finished else 'waiting'}  {title(run)}  {run.folder}")
        return
    _name_deviations(sweep, out)
    if waiting:
        _fill_cache(sweep, arguments, out)
    failures = _do(arguments, runs, out)
    if any(run.finished for run in runs):
        from codecssl.superb.commands.report import show

        show([arguments.output])
    if failures:
        first = next(iter(failures.values()))
        raise UserError(f"{len(failures)} of {len(runs)} runs failed, the first with: {message_on_one_line(first)}")


def _name_deviations(sweep: "Sweep", console: Any) -> None:
    """Print which tasks of a full run are not on the official data, before they train for days."""
    from codecssl.superb.corpora.corpus import open_corpus

    corpus = open_corpus(sweep.root, sweep.side)
    for task in sweep.tasks if sweep.budget.divisor == 1 else ():
        if texts := corpus.deviations(task.name):
            console.print(f"{task.name}: not the official data: {'; '.join(texts)}; the result is not called SUPERB")


def _fill_cache(sweep: "Sweep", arguments: argparse.Namespace, console: Any) -> None:
    """Encode the audio of the sweep's tasks, for the upstreams that read codes."""
    from codecssl.superb.corpora.corpus import open_corpus
    from codecssl.superb.runner.prefill import fill_all, jobs

    if any(upstream.runs_codec for upstream in sweep.upstreams):
        corpus = open_corpus(sweep.root, sweep.side)
        root = arguments.cache or sweep.output / "cache"
        fill_all(list(jobs(sweep.upstreams, sweep.tasks, corpus, root, device=arguments.device)), console)


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

    def on_result(run: Run, outcome: Any) -> None:
        if isinstance(outcome, Exception):
            reason = message_on_one_line(outcome)
            console.print(f"{title(run)}  [red]failed[/]: {reason} (see {run.folder / 'run.log'})")
        else:
            console.print(f"{title(run)}  {_figures(run, outcome)} ({outcome['seconds']:.0f} s)")

    with console.status("starting") as status:  # shown on a terminal only

        def begin(run: Run) -> None:
            status.update(f"{title(run)}  (progress: {run.folder / 'run.log'})")

        return run_all(runs, machine, jobs=arguments.jobs, on_result=on_result, begin=begin)


def title(run: "Run") -> str:
    """Describe a run in one line."""
    lr = "official lr" if run.learning_rate is None else f"lr {run.learning_rate:g}"
    lr = "no training" if TASKS[run.task].problem is None else lr
    fold = f"  fold {run.fold}" if run.fold is not None else ""
    return f"{run.upstream.name}  {run.task}  {lr}  seed {run.seed}{fold}"


def _figures(run: "Run", row: dict[str, Any]) -> str:
    values = [(m.label, row["values"][m.key]) for m in TASKS[run.task].metrics if m.key in row["values"]]
    skipped = [f"{sum(row['skipped'].values())} skipped"] if row["skipped"] else []
    stops = row.get("interrupted", [])
    ends = [f"interrupted {len(stops)} time(s), training {stops[-1]['then']}"] if stops else []
    warnings = [f"warning: {row['ctc_warning']}"] if "ctc_warning" in row else []
    return ", ".join([*(f"{label} {100 * value:.1f}" for label, value in values), *skipped, *ends, *warnings])


def _threads(jobs: int) -> int | None:
    return None if jobs == 1 else max(1, available_cores() // jobs)
