"""Progress and remaining time of a run, read from its files during or after the run (`codecssl-tokenize status`)."""

from __future__ import annotations

import glob
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.layout import load_json, read_header
from codecssl.tokenize.format.validate import check_plan

RECENT = 256
"""Number of latest writes over which the speed is measured."""
LONG_SECONDS = 600.0
"""Minimum length of a long pause."""
LONG_TIMES = 10
"""Ratio of a long pause to the usual one."""


@dataclass(frozen=True, kw_only=True, order=True)
class _Write:
    """A finished shard, or a finished block of an unfinished one."""

    when: float
    """Seconds since the epoch."""
    shard: int
    block: int
    """-1 for a whole shard."""
    inputs: int
    samples: int
    failed: int


def status(root: Path, tasks: int | None = None) -> dict[str, Any]:
    """Return the progress of the run that writes `root`. Raises UserError for another folder.

    `tasks_unfinished` lists the tasks among 0 .. tasks - 1 with work left, None if unknown. `inputs_total`, `fraction`
    and `seconds_left` are None if the sources could not be counted. The rates and `seconds_left` are also None while
    too little is written. `stalled` lists unfinished shards without a recent write. If the run's number of `tasks` is
    given, it also names the task of each.
    """
    plan = _plan(root)
    card, now = CodecCard.from_dict(plan["codec"]), time.time()
    writes = sorted(_writes(root))
    newest = max([_modified(root / "plan.json"), *(w.when for w in writes[-1:])])
    inputs, total = sum(w.inputs for w in writes), _total(root, plan)
    finished = (root / "dataset.json").exists()
    speed = _speed(writes, _modified(root / "plan.json"), card.sample_rate)
    left = None if total is None else max(0, total - inputs)
    shards = None if total is None or "shard_inputs" not in plan else -(-total // plan["shard_inputs"])
    return {
        "finished": finished,
        "shards": sum(w.block < 0 for w in writes),
        "shards_total": shards,
        "blocks": sum(w.block >= 0 for w in writes),
        "inputs": inputs,
        "inputs_total": total,
        "fraction": 1.0 if finished else None if total is None else inputs / max(total, 1),
        "failed": sum(w.failed for w in writes),
        "hours": sum(w.samples for w in writes) / card.sample_rate / 3600,
        "age_seconds": max(0.0, now - newest),
        **speed,
        "seconds_left": _seconds_left(finished, left, speed["inputs_per_second"]),
        "stalled": [] if finished else list(_stalled(writes, now, tasks)),
        "tasks_unfinished": _unfinished(writes, shards, tasks),
    }


def _unfinished(writes: list[_Write], shards: int | None, tasks: int | None) -> list[int] | None:
    if shards is None or tasks is None:
        return None
    done = Counter(shard % tasks for shard in {write.shard for write in writes if write.block < 0} if shard < shards)
    return [task for task in range(min(tasks, shards)) if done[task] < len(range(task, shards, tasks))]


def _plan(root: Path) -> dict[str, Any]:
    for name in ("plan.json", "dataset.json"):
        if (root / name).exists():
            plan = load_json(root / name)
            check_plan(plan, root / name)
            return plan
    raise UserError(f"{root}: no plan.json; no `codecssl-tokenize run` wrote here")


def _total(root: Path, plan: dict[str, Any]) -> int | None:
    if (root / "dataset.json").exists():
        return int(read_header(root)["totals"]["inputs"])
    return plan.get("inputs")


def _seconds_left(finished: bool, left: int | None, speed: float | None) -> float | None:
    if finished or left == 0:
        return 0.0
    return left / speed if left is not None and speed else None


# ---------------------------------------------------------------- what was written


def _writes(root: Path) -> Iterator[_Write]:
    done = set()
    for path in (root / "shards").glob("*.json"):
        if path.stem.isdecimal() and (write := _read(path, int(path.stem), -1)):
            done.add(write.shard)
            yield write
    # glob.glob skips the folder of a shard that is removed at this moment; Path.glob raises.
    for path in map(Path, glob.glob(f"{glob.escape(str(root))}/work/*/*.json")):  # noqa: PTH207
        if not (path.stem.isdecimal() and path.parent.name.isdecimal()):
            continue
        shard = int(path.parent.name)
        if shard not in done and (write := _read(path, shard, int(path.stem))):  # its blocks may not be removed yet
            yield write


def _read(path: Path, shard: int, block: int) -> _Write | None:
    try:
        row, when = load_json(path), path.stat().st_mtime
    except FileNotFoundError:  # its shard was just finished
        return None
    failed = row.get("failed")
    if not isinstance(failed, list) or not all(type(row.get(key)) is int for key in ("inputs", "samples")):
        raise UserError(f"{path}: damaged, no counts in it; run `codecssl-tokenize verify`")
    counts = {"inputs": row["inputs"], "samples": row["samples"], "failed": len(failed)}
    return _Write(when=when, shard=shard, block=block, **counts)


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


# ---------------------------------------------------------------- speed


def _speed(writes: list[_Write], began: float, sample_rate: int) -> dict[str, float | None]:
    """Measure the speed over the latest writes, excluding pauses between a kill and a restart."""
    recent = writes[-RECENT:]
    begin = began if len(recent) == len(writes) and began else recent[0].when if recent else 0.0
    counted = [w for w in recent if w.when > begin]
    pauses = [b - a for a, b in pairwise([begin, *(w.when for w in counted)])]
    worked = [(pause, w) for pause, w in zip(pauses, counted) if pause <= _long(pauses)]
    seconds = sum(pause for pause, _ in worked)
    if not seconds:
        return {"inputs_per_second": None, "times_real_time": None}
    return {
        "inputs_per_second": sum(w.inputs for _, w in worked) / seconds,
        "times_real_time": sum(w.samples for _, w in worked) / sample_rate / seconds,
    }


def _long(pauses: list[float]) -> float:
    return max(LONG_SECONDS, LONG_TIMES * median(pauses)) if pauses else LONG_SECONDS


def _stalled(writes: list[_Write], now: float, tasks: int | None) -> Iterator[dict[str, Any]]:
    latest: dict[int, float] = {}
    pauses = []
    for write in writes:  # in order of time
        if write.block < 0:
            continue
        if write.shard in latest:
            pauses.append(write.when - latest[write.shard])
        latest[write.shard] = write.when
    for shard, when in sorted(latest.items()):
        if now - when > _long(pauses):
            yield {"shard": shard, "age_seconds": now - when} | ({} if tasks is None else {"task": shard % tasks})
