"""Manifest columns that select the audio, under their names in NeMo, Lhotse, Kaldi and Hugging Face datasets."""

from __future__ import annotations

import math
from typing import Any

from codecssl.tokenize.common.errors import UserError

PATHS = ("path", "audio_filepath", "audio_path", "wav_path", "audio", "wav", "file", "filename", "file_name")
STARTS = ("start", "offset", "begin_time", "start_time", "begin")
ENDS = ("end", "end_time")
"""Columns for the end in seconds. The first one filled in a row is used."""


def first_of(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the first of `names` that is filled in a row."""
    return next((name for name in names if row.get(name) not in (None, "")), None)


def segment_of(where: str, row: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return {start, end, duration, channel} for `Input` and the columns used. Raises UserError for invalid values.

    `duration` counts from the start. Without start and end it is the file's length and remains a label.
    """
    at, to = first_of(row, STARTS), first_of(row, ENDS)
    start = None if at is None else _seconds(where, row, at)
    end = None if to is None else _seconds(where, row, to)
    used = {name for name in (at, to, "start", "end") if name}
    duration = _seconds(where, row, "duration") if row.get("duration") not in (None, "") and end is None else None
    if duration is not None and at is not None and start is not None:
        end, duration = start + duration, None
        used.add("duration")
    if end is not None and end <= (start or 0.0):
        raise UserError(f"{where}: end {end} is not after start {start or 0.0}")
    channel = row.get("channel")
    if channel not in (None, ""):
        used.add("channel")
    return {"start": start, "end": end, "duration": duration or None, "channel": _channel(where, channel)}, used


def _channel(where: str, value: Any) -> int | None:
    if value in (None, ""):
        return None
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    try:
        if not isinstance(value, (bool, list, dict)) and float(value) == int(float(value)) >= 0:
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(
        f"{where}: channel {str(value)[:40]!r} is not a channel's number, from 0; rename the column if it is a label"
    )


def _seconds(where: str, row: dict[str, Any], column: str) -> float:
    value = row[column]
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where}: {column} {str(value)[:40]!r} is not a number of seconds") from None
    if seconds < 0:
        raise UserError(f"{where}: {column} {seconds} is negative")
    if not math.isfinite(seconds):
        raise UserError(f"{where}: {column} {seconds} is not a number of seconds")
    return seconds
