"""Manifest columns that select the audio, under their names in NeMo, Lhotse, Kaldi and Hugging Face datasets.

Rows of Lhotse's and Kaldi's own manifests are converted to such columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from codecssl.tokenize.common.errors import UserError

PATHS = ("path", "audio_filepath", "audio_path", "wav_path", "audio", "wav", "file", "filename", "file_name")
STARTS = ("start", "offset", "begin_time", "start_time", "begin")
ENDS = ("end", "end_time")
"""Columns for the end in seconds. The first one filled in a row is used."""


Row = dict[str, Any]
Rows = Iterator[tuple[int, Row]]
"""Line number and columns of each row."""


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


LHOTSE_CUT = ("id", "start", "duration", "channel", "supervisions", "recording", "type", "features", "custom")
"""Fields of a Lhotse cut that are not copied to the labels."""
LHOTSE_SUPERVISION = ("id", "recording_id", "start", "duration", "channel", "alignment", "custom")
"""Fields of a Lhotse supervision that are not copied to the labels."""

# ---------------------------------------------------------------- Lhotse


def from_lhotse(where: str, row: Row) -> Row:
    """Convert a MonoCut or a Recording to a row with path, id, start, duration, channel and labels.

    Other rows are returned unchanged. The fields of a single supervision become labels; several stay together as the
    label `supervisions`. Raises UserError for cuts that are not a segment of one channel of one file.
    """
    kind = row.get("type")
    if isinstance(row.get("sources"), list) and "sampling_rate" in row:
        return {"id": row.get("id"), "path": _file_of(where, row)[0]}
    if kind in ("MixedCut", "PaddingCut", "MultiCut") and ("tracks" in row or "recording" in row or "duration" in row):
        raise UserError(f"{where}: a {kind} of Lhotse; only MonoCuts are read: save the mixed audio, or split the cut")
    if "recording_id" in row and "recording" not in row and first_of(row, PATHS) is None:
        raise UserError(f"{where}: a supervision of Lhotse without its recording; give the cuts")
    recording = row.get("recording")
    if not isinstance(recording, dict) or not ("supervisions" in row or kind == "MonoCut"):
        if kind == "MonoCut":
            raise UserError(f"{where}: a cut of Lhotse without a recording; only cuts with audio are read")
        return row
    path, channels = _file_of(where, recording)
    channel = row.get("channel", 0)
    if channel not in channels:
        raise UserError(f"{where}: channel {str(channel)[:40]} of {recording.get('id')}, which has {channels}")
    labels = {key: value for key, value in row.items() if key not in LHOTSE_CUT} | _labels(row)
    labels = {key: value for key, value in labels.items() if key not in (*PATHS, *STARTS, *ENDS)}
    place = {"start": row.get("start", 0.0), "duration": row.get("duration")}
    return labels | {"id": row.get("id"), "path": path, "channel": channels.index(channel)} | place


def _file_of(where: str, recording: Row) -> tuple[str, list[Any]]:
    """Return the path of a recording and the channels of its file."""
    sources, name = recording.get("sources"), str(recording.get("id"))[:80]
    if recording.get("transforms"):
        raise UserError(f"{where}: recording {name} has transforms, which are not applied; save the transformed audio")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise UserError(f"{where}: recording {name} must have one source; save it as one file")
    source = sources[0]
    if source.get("type") != "file":
        kind = str(source.get("type"))[:40]
        raise UserError(f"{where}: recording {name} is of the type {kind}; only files are read: save it as one")
    channels = source.get("channels")
    return str(source.get("source")), channels if isinstance(channels, list) else [0]


def _labels(cut: Row) -> Row:
    custom = cut.get("custom") if isinstance(cut.get("custom"), dict) else {}
    supervisions = cut.get("supervisions") or []
    if not isinstance(supervisions, list) or len(supervisions) != 1 or not isinstance(supervisions[0], dict):
        return dict(custom or {}) | ({"supervisions": supervisions} if supervisions else {})
    found = supervisions[0]
    own = {key: value for key, value in found.items() if key not in LHOTSE_SUPERVISION and value is not None}
    more = found.get("custom") if isinstance(found.get("custom"), dict) else {}
    return dict(custom or {}) | dict(more or {}) | own


# ---------------------------------------------------------------- Kaldi


def with_segments(scp: Path, rows: Rows) -> Rows:
    """Add what lies next to a wav.scp: `segments` (one row per segment), and `utt2spk` and `text` as labels.

    Yields line numbers of `segments`, if there is one. Raises UserError for an unknown recording.
    """
    labels = {name: _table(scp.with_name(file)) for name, file in (("speaker", "utt2spk"), ("text", "text"))}

    def labelled(row: Row) -> Row:
        return row | {name: table[row["id"]] for name, table in labels.items() if row["id"] in table}

    segments = scp.with_name("segments")
    if not segments.is_file():
        yield from ((number, labelled(row)) for number, row in rows)
        return
    paths = {row["id"]: row["path"] for _, row in rows}
    with segments.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.decode("utf-8", "surrogateescape").split()
            if not fields:
                continue
            where = f"{segments}, line {number}"
            if len(fields) != 4:
                raise UserError(f"{where}: must be an utterance, a recording, a start and an end")
            id, recording, start, end = fields
            if recording not in paths:
                raise UserError(f"{where}: recording {recording!r} is not in {scp}")
            segment = {"start": start} if end in ("-1", "-1.0") else {"start": start, "end": end}
            yield number, labelled({"id": id, "path": paths[recording]} | segment)


def _table(path: Path) -> dict[str, str]:
    """Read the lines `KEY VALUE` of a file; {} if it does not exist."""
    if not path.is_file():
        return {}
    pairs = (line.partition(" ")[::2] for line in path.read_text("utf-8", "surrogateescape").splitlines())
    return {key: value.strip() for key, value in pairs if key}
