"""Worker processes that end when they must: at Ctrl-C within `GRACE_SECONDS`, and with their parent.

Each worker leads a process group of its own, so that its data-loading processes end together with it. Ctrl-C reaches
only the parent, which then ends the groups.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from codecssl.tokenize.common.process import interrupts_deferred

Item = TypeVar("Item")

GRACE_SECONDS = 2.0
"""Time between SIGTERM and SIGKILL."""


class WorkerDiedError(RuntimeError):
    """A worker process ended before it returned all outcomes."""


class Worker(Generic[Item]):
    """A process that computes `function(item)` for one item at a time."""

    def __init__(self, function: Callable[[Item], Iterable[Any]]) -> None:
        context = get_context("spawn")  # CUDA and threads can't be forked
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function))
        self.process.start()
        theirs.close()
        self.item: Item | None = None

    def give(self, item: Item) -> None:
        self.item = item
        with contextlib.suppress(OSError):  # it died meanwhile; the caller finds its sentinel ready
            self.connection.send(item)

    def outcome(self) -> tuple[Any] | None:
        """Return the next outcome in a tuple, and None after the last. Raises WorkerDiedError."""
        if self.connection.poll():
            with contextlib.suppress(EOFError, OSError):
                received: tuple[Any] | None = self.connection.recv()
                return received
        self.process.join(GRACE_SECONDS)
        raise WorkerDiedError(f"a worker process died with exit code {self.process.exitcode}")

    def finish(self) -> None:
        """Let the process end by itself, within `GRACE_SECONDS`. A killed one leaves its semaphores behind."""
        self.connection.close()
        self.process.join(GRACE_SECONDS)

    def signal(self, number: int) -> None:
        """Send a signal to the process and the processes that it started."""
        pid = self.process.pid
        assert pid is not None
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it has no group yet, or has ended
            if self.process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)


def in_workers(
    function: Callable[[Item], Iterable[Any]], items: Sequence[Item], jobs: int
) -> Generator[tuple[Item, Any], None, None]:
    """Yield (item, outcome) for each outcome in `function(item)`, in the order in which they arrive.

    `function` and the items are pickled. Where a worker dies, the outcome is a WorkerDiedError, and another worker
    takes the remaining items. Close the generator (`contextlib.closing`) to end the workers early.
    """
    waiting, workers = deque(items), list[Worker[Item]]()
    try:
        with interrupts_deferred():
            for _ in range(min(jobs, len(items))):
                workers.append(Worker(function))
        for worker in workers:
            worker.give(waiting.popleft())
        while workers:
            ready = wait([c for worker in workers for c in (worker.connection, worker.process.sentinel)])
            for worker in [w for w in workers if w.connection in ready or w.process.sentinel in ready]:
                item = worker.item
                assert item is not None
                try:
                    received = worker.outcome()
                    if received is not None:
                        yield item, received[0]
                        continue
                    if waiting:
                        worker.give(waiting.popleft())
                        continue
                except WorkerDiedError as error:
                    yield item, error
                worker.finish()
                with interrupts_deferred():
                    end([worker])
                    workers.remove(worker)
                    if waiting:
                        workers.append(Worker(function))
                if waiting:
                    workers[-1].give(waiting.popleft())
    finally:
        with interrupts_deferred():
            end(workers)


def end(workers: Sequence[Worker[Any]]) -> None:
    """End the workers and their processes: at once by SIGTERM, after `GRACE_SECONDS` by SIGKILL."""
    for worker in workers:
        worker.signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        worker.signal(signal.SIGKILL)
        worker.process.join()
        worker.connection.close()


def _serve(connection: Connection, function: Callable[[Any], Iterable[Any]]) -> None:
    """Main function of a worker."""
    os.setpgid(0, 0)
    _end_with_parent()
    while True:
        try:
            item = connection.recv()
        except EOFError:  # there are no more items
            return
        for outcome in function(item):
            connection.send((outcome,))
        connection.send(None)


def _end_with_parent() -> None:
    """Kill this process's group when its parent has ended.

    After a kill of the parent, it would otherwise continue runs that the next command restarts in the same folders.
    """
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
