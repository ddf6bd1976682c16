"""Execute many runs in parallel. Finished runs are skipped, and a failure does not stop the others."""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from typing import Any

from codecssl.superb import results
from codecssl.superb.runner import run as one
from codecssl.superb.runner.run import Machine, Run
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
    for run, outcome in _outcomes([run for run in runs if not run.finished], machine, jobs, begin):
        if isinstance(outcome, Exception):
            failures[str(run.folder)] = outcome
        results.publish(run.output)
        on_result(run, outcome)
    return failures


def _outcomes(
    runs: Sequence[Run], machine: Machine, jobs: int, begin: Callable[[Run], None]
) -> Iterator[tuple[Run, Any]]:
    """Yield the outcome of each run. Runs of one upstream and task share a process and its cached features."""
    if jobs == 1:
        for run in runs:
            begin(run)
            yield run, _attempt(run, machine)
        return
    units: dict[tuple[Upstream, str], list[Run]] = {}
    for run in runs:
        units.setdefault((run.upstream, run.task), []).append(run)
    context = get_context("spawn")  # CUDA and threads can't be forked
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=end_with_parent) as pool:
        futures = {pool.submit(_attempt_all, unit, machine): unit for unit in units.values()}
        try:
            for future in as_completed(futures):
                unit, died = futures[future], future.exception()
                yield from zip(unit, [died] * len(unit) if died else future.result(), strict=True)
        except BaseException:
            for process in active_children():  # their runs resume, as after a kill
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def end_with_parent() -> None:
    """End this process when its parent ends, and leave Ctrl-C to the parent.

    Otherwise, after a kill of the parent, it would continue runs that the next command restarts in the same folders.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _attempt_all(runs: Sequence[Run], machine: Machine) -> list[Any]:
    return [_attempt(run, machine) for run in runs]


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
