"""`codecssl-pretrain status`: progress, speed and late ranks of a run, from its files alone.

Every half a minute, each process records its current activity and when it began in RUN/ranks/NNNNN.json.
"""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from codecssl.pretrain import run_folder
from codecssl.pretrain.engine import checkpoint
from codecssl.pretrain.monitor.telemetry import clock, console_line, read_rows
from codecssl.tokenize.common.errors import UserError, damaged_file
from codecssl.tokenize.common.process import BEAT_SECONDS

SILENT_SECONDS = 4 * BEAT_SECONDS
"""Time without a record after which a process counts as gone: killed, or on a dead node."""
LATE_SECONDS = 30.0
"""A rank is late if others have waited for it this long, and at least LATE_STEPS usual steps."""
LATE_STEPS = 5
RECENT = 20
"""Number of latest rows over which the speed is measured."""
WAITS = "waiting for the other ranks"

Beat = dict[str, Any]


def status(run: Path) -> dict[str, Any]:
    """Return the progress of `run`. Raises UserError if the folder is not a run.

    state: finished, running, stopped (by a signal, to be resumed), failed, stuck, gone (ended without a record) or
    not started. late: ranks for which others wait. gone: ranks that ended without a record. Rates are None before the
    first row of metrics.
    """
    with damaged_file(run, "its records are not those of a run; bring them back from a backup"):
        return _status(run)


def _status(run: Path) -> dict[str, Any]:
    config = run_folder.read_config(run)
    saved = checkpoint.whole(run / "checkpoints")
    rows = read_rows(run / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    now, beats = time.time(), _beats(run)
    step = train[-1]["step"] if train else 0
    done = checkpoint.read_state(saved[-1])["step"] if saved else 0
    step_seconds = _recent(train, "step_seconds")
    gone = [rank for rank, beat in beats.items() if beat["state"] == "running" and now - beat["time"] > SILENT_SECONDS]
    steps = config.optim.steps
    state = _state(done >= steps, beats, gone)
    return {
        "state": state,
        "step": max(step, done),
        "step_saved": done,
        "steps": steps,
        "checkpoints": len(saved),
        "loss": train[-1]["loss"] if train else None,
        "frames_per_second": _recent(train, "frames_per_second"),
        "audio_hours_per_hour": _recent(train, "audio_hours_per_hour"),
        "data_wait_percent": _recent(train, "data_wait_percent"),
        "seconds_left": None if step_seconds is None else (steps - max(step, done)) * step_seconds,
        "age_seconds": now - max([_modified(run / "metrics.jsonl"), *(beat["time"] for beat in beats.values())]),
        "ranks": len(beats),
        "hosts": sorted({beat["host"] for beat in beats.values()}),
        "job": beats[0]["job"] if 0 in beats else None,
        "restarts": max((beat["restarts"] for beat in beats.values()), default=0),
        "doing": beats[0]["doing"] if 0 in beats and state == "running" else None,
        "gone": [_described(rank, beats[rank], now) for rank in gone],
        "late": [_described(rank, beats[rank], now) for rank in _late(beats, gone, step_seconds, now)],
    }


def lines(run: Path, state: dict[str, Any]) -> list[str]:
    """Format the result of `status` as lines of text. Raises UserError for damaged records."""
    with damaged_file(run, "its records are not those of a run; bring them back from a backup"):
        return _lines(run, state)


def _lines(run: Path, state: dict[str, Any]) -> list[str]:
    found = [
        f"{run}: {state['state']} at step {state['step']}; step {state['step_saved']} of {state['steps']} saved,"
        f" {state['checkpoints']} checkpoint(s); last sign of life {state['age_seconds']:.0f} s ago"
    ]
    if state["frames_per_second"] is not None and state["state"] != "finished":
        found.append(
            f"{state['frames_per_second']:.0f} frames/s, {state['audio_hours_per_hour']:.0f} h of audio an hour,"
            f" data waited for {state['data_wait_percent']:.0f} % of the time, {clock(state['seconds_left'])} left"
        )
    if state["ranks"]:
        where = f"{state['ranks']} process(es) on {', '.join(state['hosts'])}"
        job = f", job {state['job']} after {state['restarts']} restart(s)" if state["job"] else ""
        found.append(where + job + (f"; {state['doing']}" if state["doing"] else ""))
    for key in ("gone", "late"):
        found += [f"{key}: rank {r['rank']} on {r['host']}, {r['doing']} for {r['seconds']:.0f} s" for r in state[key]]
    rows = read_rows(run / "metrics.jsonl")
    return found + [console_line(row) for row in {row["split"]: row for row in rows}.values()]


def _beats(run: Path) -> dict[int, Beat]:
    """Read the last record of each rank of the latest start."""
    found = {}
    for path in sorted((run / "ranks").glob("[0-9]*.json")):
        try:
            found[int(path.stem)] = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({error}); remove it") from error
    began = found[0]["started"] - 60.0 if 0 in found else 0.0  # older records are of a start with more ranks
    return {rank: beat for rank, beat in found.items() if beat["time"] >= began}


def _state(finished: bool, beats: dict[int, Beat], gone: list[int]) -> str:
    if finished:
        return "finished"
    if not beats:
        return "not started"
    states = {beat["state"] for beat in beats.values()}
    if bad := states & {"stuck", "failed"}:
        return max(bad)
    first = str(beats[min(beats)]["state"])  # the launcher may kill the others before they record it
    return "gone" if gone and first == "running" else first


def _late(beats: dict[int, Beat], gone: list[int], step_seconds: float | None, now: float) -> list[int]:
    running = {r: beat for r, beat in beats.items() if beat["state"] == "running" and r not in gone}
    patience = max(LATE_SECONDS, LATE_STEPS * (step_seconds or 0.0))
    waiting = [r for r, beat in running.items() if beat["doing"].startswith(WAITS) and now - beat["since"] > patience]
    return [r for r, beat in running.items() if not beat["doing"].startswith(WAITS)] if waiting else []


def _described(rank: int, beat: Beat, now: float) -> dict[str, Any]:
    return {"rank": rank, "host": beat["host"], "doing": beat["doing"], "seconds": now - beat["since"]}


def _recent(rows: list[dict[str, Any]], key: str) -> float | None:
    return median(row[key] for row in rows[-RECENT:]) if rows else None


def _modified(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
