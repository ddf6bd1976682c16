"""Execute many runs in parallel. Finished runs are skipped, and a failure does not stop the others."""

import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from codecssl.superb import results
from codecssl.superb.runner import run as one
from codecssl.superb.runner.run import Machine, Run
from codecssl.superb.runner.workers import WorkerDiedError, in_workers
from codecssl.superb.upstreams.names import Upstream
from codecssl.tokenize.common.errors import UserError


def run_all(
    runs: Sequence[Run],
    machine: Machine,
    *,
    jobs: int = 1,
    on_result: Callable[[Run, Any], None],
    begin: Callable[[Run], None] = lambda run: None,
) -> dict[str, Exception]:
    """Execute the unfinished runs, `jobs` at a time, and write results.jsonl after each.

    `on_result(run, outcome)` is called once per run with its row or its exception. With one job, `begin(run)` is called
    before each run starts. Returns the failures by folder.
    """
    failures: dict[str, Exception] = {}
    for run in runs:
        if run.finished and one.leftovers(run.folder):  # killed between the result and tidying
            _attempt(run, machine)
    with closing(_outcomes([run for run in runs if not run.finished], machine, jobs, begin)) as outcomes:
        for run, outcome in outcomes:
            if isinstance(outcome, Exception):
                failures[str(run.folder)] = outcome
            results.publish(run.output)
            on_result(run, outcome)
    return failures


def _outcomes(
    runs: Sequence[Run], machine: Machine, jobs: int, begin: Callable[[Run], None]
) -> Generator[tuple[Run, Any], None, None]:
    """Yield the outcome of each run. Runs of one upstream and task share a process and its cached features."""
    if jobs == 1:
        for run in runs:
            begin(run)
            yield run, _attempt(run, machine)
        return
    units: dict[tuple[Upstream, str], list[Run]] = {}
    for run in runs:
        units.setdefault((run.upstream, run.task), []).append(run)
    with closing(in_workers(partial(_attempt_all, machine=machine), list(units.values()), jobs)) as outcomes:
        for unit, outcome in outcomes:
            if isinstance(outcome, WorkerDiedError):
                yield from ((run, outcome) for run in unit if not run.finished)
            else:
                yield outcome


def _attempt_all(runs: Sequence[Run], machine: Machine) -> Iterator[tuple[Run, Any]]:
    return ((run, _attempt(run, machine)) for run in runs)


def _attempt(run: Run, machine: Machine) -> Any:
    """Return the row or the error of a run. Tracebacks are written to run.log."""
    try:
        return one.run_one(run, machine)
    except UserError as error:
        return error
    except Exception as error:
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / "run.log").open("a") as log:
            traceback.print_exc(file=log)
        return _plain(error, machine)  # other exceptions may not pickle


def _plain(error: Exception, machine: Machine) -> Exception:
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        remedy = "SUPERB's batch size is fixed: take fewer --jobs, a smaller --feature-cache-gib or a larger device"
        return UserError(f"out of memory on {machine.device} ({text[:120]}); {remedy}")
    return RuntimeError(f"{type(error).__name__}: {text}")
