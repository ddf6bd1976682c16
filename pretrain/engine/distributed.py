"""The process group of a run: rendezvous, agreement, sums of measurements, and a common exit.

Control messages use a separate gloo group on the CPU. It never waits for a GPU, and it exists before and after
DeepSpeed. A single process sends no messages.
"""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from io import StringIO
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from codecssl.pretrain.ranks import Ranks, choose_backend, find_meeting, find_ranks
from codecssl.tokenize.common.errors import TransientError, UserError
from codecssl.tokenize.common.process import CRASHED, PREEMPTED
from codecssl.tokenize.common.retry import disk_error

__all__ = ["PREEMPTED", "ProcessGroup", "join_ranks", "quiet_deepspeed", "silent"]

_MEETING, _FOREVER, _LAST_WORDS = timedelta(minutes=10), timedelta(days=7), timedelta(seconds=20)
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
"""Texts of errors that indicate that another process has ended."""
_FAILED = ("NCCL", "gloo")
"""Words in other errors of the communication libraries."""
_BROKEN = ("ECC error", "NVLink error", "busy or unavailable")
"""Words in errors of a device that a fault of the program does not cause."""

T = TypeVar("T")


class ProcessGroup:
    """The process group of a run. Every rank must call its methods together."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.rank, self.world_size = ranks, ranks.rank, ranks.world_size
        self._group = torch.distributed.new_group(backend="gloo", timeout=_FOREVER) if self.world_size > 1 else None

    @property
    def first(self) -> bool:
        """True on rank 0, which prints and writes files."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        on_gpu = choose_backend(torch.cuda.device_count()) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def total(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all ranks, in float64 on the CPU."""
        return self._reduced(values, torch.distributed.ReduceOp.SUM)

    def largest(self, *values: float) -> list[float]:
        """Return the maximum over all ranks of each value."""
        return self._reduced(torch.tensor(values), torch.distributed.ReduceOp.MAX).tolist()

    def together(self, work: Callable[[], T]) -> T:
        """Do the work on every rank. If it fails on any rank, all stop with its error."""
        result, error = _tried(work)
        self.agree(error)
        return result  # type: ignore[return-value]

    def once(self, work: Callable[[], T]) -> T:
        """Do the work on rank 0 and return its result on all ranks. If it fails, all stop with that error."""
        result, error = _tried(work) if self.first else (None, None)
        self.agree(error)
        box = [result]
        if self._group is not None:
            with self.hearing():
                torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]  # type: ignore[return-value]

    def agree(self, error: UserError | None = None, *, stop: bool = False) -> bool:
        """Return True if any rank was asked to stop. If any rank has an error, all stop with it."""
        error, stopped = self.poll(error, stop=stop)
        if error is not None:
            self.fail(error)
        return stopped

    def poll(self, error: UserError | None = None, *, stop: bool = False) -> tuple[UserError | None, bool]:
        """Return the error of the first rank that has one, and True if any rank was asked to stop."""
        failed, stopped = self.largest(error is not None, stop)
        if failed:
            errors: list[UserError | None] = [error] * self.world_size
            if self._group is not None:
                with self.hearing():
                    torch.distributed.all_gather_object(errors, error, group=self._group)
            rank, error = next((rank, found) for rank, found in enumerate(errors) if found is not None)
            error = type(error)(f"{error} (rank {rank})") if rank else error
        return error, bool(stopped)

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Context of a communication with the other ranks: a failure is reported on one line without a traceback.

        A rank that only detects that another one has ended prints nothing; the ended rank reports the cause. A rank
        whose own communication failed (an error of NCCL or gloo while all ranks are alive), or whose device is broken,
        prints the cause itself. All exit with CRASHED: another start may succeed.
        """
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if isinstance(error, torch.AcceleratorError) and any(word in text for word in _BROKEN):
                reason = str(error).splitlines()[0]  # the others advise how to debug a kernel
                self._alone(f"rank {self.rank}: the device failed: {reason}; start again, on another device", error)
            if self.world_size == 1:
                raise
            if any(sign in text for sign in _LOST):
                self.fail(
                    TransientError(
                        f"another process of this run has ended; its own output has the cause ({text[:200]})"
                    )
                )
            if isinstance(error, torch.distributed.DistError) or any(word in text for word in _FAILED):
                self._alone(f"rank {self.rank}: exchanging data with the other ranks failed: {text[:600]}", error)
            raise

    def _alone(self, cause: str, error: Exception) -> NoReturn:
        """Report a fault of this rank and exit at once: the others may wait for its data."""
        if self.first:
            raise TransientError(cause) from error
        print(f"error: {cause}", file=sys.stderr, flush=True)
        raise SystemExit(CRASHED) from error

    def fail(self, error: UserError) -> NoReturn:
        """Stop all ranks with an error that all of them have. Rank 0 raises it; the others exit silently."""
        if self.first:
            raise error
        self.leave(CRASHED if isinstance(error, TransientError) else 1)

    def leave(self, code: int) -> NoReturn:
        """Exit with this code, rank 0 first.

        A launcher that sees another rank exit may kill rank 0 before it has printed its message.
        """
        if not self.first:
            # rank 0 never arrives: this ends when its connection closes, which gloo would report on stderr
            with silent(2), suppress(RuntimeError):
                torch.distributed.monitored_barrier(self._group, timeout=_LAST_WORDS)
        raise SystemExit(code)

    def _reduced(self, values: Tensor, operation: Any) -> Tensor:
        values = values.detach().to("cpu", torch.float64, copy=True)
        if self._group is not None:
            with self.hearing():
                torch.distributed.all_reduce(values, op=operation, group=self._group)
        return values


def _tried(work: Callable[[], T]) -> tuple[T | None, UserError | None]:
    """Return (result of the work, its error). Errors are those of the input and of the file system."""
    try:
        return work(), None
    except UserError as error:
        return None, error
    except OSError as error:
        remedy = "make it readable, or make room, and run the same command again"
        return None, disk_error(f"{error.filename or 'a file'}: {error.strerror or error}; {remedy}", error)


def join_ranks(environment: Mapping[str, str] | None = None) -> ProcessGroup:
    """Join the process group that the environment describes (`find_ranks`, `find_meeting`), or start a single process.

    Must be called before the first import of deepspeed, which selects its accelerator on import.
    """
    environment = os.environ if environment is None else environment
    ranks = find_ranks(environment)
    if ranks.rank:
        warnings.filterwarnings("ignore")  # rank 0 shows them once
    backend = choose_backend(torch.cuda.device_count(), environment)
    gpus = torch.cuda.device_count() if backend == "nccl" else 0
    if not gpus:
        os.environ["DS_ACCELERATOR"] = "cpu"
    with silent():  # gloo prints its connections
        if not torch.distributed.is_initialized():
            _connect(ranks, environment, backend, device=_device(ranks, gpus))
        return ProcessGroup(ranks)


@contextmanager
def silent(stream: int = 1) -> Iterator[None]:
    """Suppress standard output (1) or standard error (2), from Python and from native libraries."""
    (sys.stdout if stream == 1 else sys.stderr).flush()
    kept, nowhere = os.dup(stream), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream)
    try:
        with (redirect_stdout if stream == 1 else redirect_stderr)(StringIO()):
            yield
    finally:
        os.dup2(kept, stream)
        os.close(kept)
        os.close(nowhere)


def quiet_deepspeed() -> Any:
    """Import deepspeed, with logging of errors only. The import takes seconds and is therefore deferred."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A C++ all-reduce through shared memory that compiles for half a minute at the first start. Only DeepSpeed's
    # inference calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without compiling it.

    ZeRO imports Muon only to check the type of the optimizer. Its compilation would load torch's compiler, which takes
    five seconds of every start.
    """
    compiler, plain = torch.compile, lambda function=None, **options: function or (lambda inner: inner)
    torch.compile = plain  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        torch.compile = compiler


def _device(ranks: Ranks, gpus: int) -> int:
    """Return the index of this process's GPU: the local rank, or 0 if the launcher exposes a single GPU."""
    if gpus > 1 and ranks.local_rank >= gpus:
        raise UserError(
            f"local rank {ranks.local_rank}: this node shows {gpus} GPUs; start one process per GPU, or ask for more"
        )
    return ranks.local_rank if gpus > 1 else 0


def _connect(ranks: Ranks, environment: Mapping[str, str], backend: str, *, device: int) -> None:
    if backend == "nccl":
        torch.cuda.set_device(device)
    if ranks.world_size == 1:
        # An in-memory store: a single process needs no port, and leaves no variables in the environment that would
        # affect its children.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it
    else:
        address, port = find_meeting(environment)
        names = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size, "LOCAL_RANK": device if backend == "nccl"
                 else ranks.local_rank, "MASTER_ADDR": address, "MASTER_PORT": port}  # fmt: skip
        os.environ.update({name: str(value) for name, value in names.items()})  # DeepSpeed reads them too
        store = _meet(ranks, address, port)
    # Timeouts are left to the watchdog, which reports them with a message.
    torch.distributed.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=_FOREVER
    )
    quiet_deepspeed().init_distributed(dist_backend=backend, verbose=False)


def _meet(ranks: Ranks, address: str, port: int) -> Any:
    try:
        rendezvous = torch.distributed.rendezvous(  # type: ignore[attr-defined]
            "env://", rank=ranks.rank, world_size=ranks.world_size, timeout=_MEETING
        )
        return next(rendezvous)[0]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {ranks.rank}: {ranks.world_size} processes did not connect at {address} port {port}"
            f" ({str(error).splitlines()[0]}); check that all of them were started, MASTER_ADDR and MASTER_PORT"
        ) from None
