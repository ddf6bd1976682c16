"""HEAR task folders from local audio: labels of a manifest, synthesised notes, music against speech.

Every probe of a probes file (see `superb.probe`) becomes a scene task with folds, by its label and group columns.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb.hear import notes
from codecssl.superb.hear.task_folder import Clip, write_task
from codecssl.superb.probe.crossvalidate import assign_folds
from codecssl.superb.probe.probe import Probe
from codecssl.superb.sounds.notes import TIMBRES
from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.audio import read_wave
from codecssl.tokenize.sources.manifest import read_rows

FOLDS = 4
VERSION = "codecssl1"
PIECE_SECONDS = 3.0


def write_tasks(
    root: Path,
    manifest: Path | None,
    probes: Sequence[Probe],
    *,
    seed: int = 0,
    copies: int = 2,
    on_progress: Callable[[str], None] = print,
) -> list[Path]:
    """Write pitch, instruments and note_events, and with a manifest a task for each probe and music_speech.

    copies: notes of each timbre and pitch. Tasks without rows in the manifest are left out. Returns the folders.
    """
    found = []

    def add(name: str, clips: Sequence[Clip], **metadata: Any) -> None:
        if clips:
            found.append(write_task(root, {"task_name": name, "version": VERSION, **metadata}, clips))
        on_progress(f"{name}: {f'{len(clips)} clips' if clips else 'left out, no rows in the manifest'}")

    add("pitch", notes.pitch_clips(copies, seed), **_folded(len(TIMBRES), "presplit_kfold", 1.0),
        evaluation=["pitch_acc", "chroma_acc"])  # fmt: skip
    add("instruments", notes.instrument_clips(copies, seed), **_folded(FOLDS, "presplit_kfold", 1.0),
        evaluation=["top1_acc", "mAP"])  # fmt: skip
    scenes = {"embedding_type": "event", "prediction_type": "multilabel", "split_mode": "trainvaltest"}
    add("note_events", notes.event_clips((16, 6, 8), seed), **scenes, sample_duration=8.0,
        evaluation=["event_onset_200ms_fms", "segment_1s_er"])  # fmt: skip
    if manifest is not None:
        rows = read_rows(manifest, "path")
        for probe in probes:
            clips = _probe_clips(manifest.parent, rows, probe, seed)
            add(probe.name, clips, **_folded(FOLDS, "new_split_kfold", None), evaluation=["top1_acc", "mAP"])
        clips = _music_speech(manifest.parent, rows, seed)
        add(
            "music_speech", clips, **_folded(FOLDS, "new_split_kfold", PIECE_SECONDS), evaluation=["top1_acc", "aucroc"]
        )
    return found


def _folded(folds: int, mode: str, seconds: float | None) -> dict[str, Any]:
    return {"embedding_type": "scene", "prediction_type": "multiclass", "split_mode": mode, "nfolds": folds,
            "sample_duration": seconds}  # fmt: skip


def _probe_clips(folder: Path, rows: Sequence[dict[str, Any]], probe: Probe, seed: int) -> list[Clip]:
    chosen = [row for row in rows if probe.takes(row)]
    if not chosen:
        return []
    if missing := [row["path"] for row in chosen if row.get(probe.label) is None]:
        raise UserError(f"probe {probe.name}: {missing[0]} has no column {probe.label}; narrow the probe with where")
    labels = np.array([str(row[probe.label]) for row in chosen])
    groups = np.array([str(row.get(probe.group)) for row in chosen]) if probe.group else None
    folds = assign_folds(labels, groups, FOLDS, seed)
    return [
        Clip(file=f"{number:05d}.wav", split=f"fold{fold:02d}", labels=[label],
             wave=read_wave(folder / row["path"], SAMPLE_RATE))
        for number, (row, label, fold) in enumerate(zip(chosen, labels.tolist(), folds, strict=True))
    ]  # fmt: skip


def _music_speech(folder: Path, rows: Sequence[dict[str, Any]], seed: int) -> list[Clip]:
    """Pieces of 3 s of every file of music, and the first 3 s of as many utterances; no file is in two folds."""
    from sklearn.model_selection import StratifiedGroupKFold

    tasks = [str(row.get("task", "")).split(",") for row in rows]
    size = round(PIECE_SECONDS * SAMPLE_RATE)
    pieces = []
    for row in (row for row, of in zip(rows, tasks) if "music" in of):
        wave = read_wave(folder / row["path"], SAMPLE_RATE)
        pieces += [("music", row["path"], wave[at : at + size]) for at in range(0, len(wave) - size + 1, size)][:12]
    speech = [row for row, of in zip(rows, tasks) if "asr" in of and float(row.get("seconds", 0)) >= PIECE_SECONDS]
    if not pieces or not speech:
        return []
    step = max(1, len(speech) // len(pieces))
    for row in speech[::step][: len(pieces)]:
        pieces.append(
            ("speech", str(row.get("speaker", row["path"])), read_wave(folder / row["path"], SAMPLE_RATE)[:size])
        )
    labels, groups = np.array([piece[0] for piece in pieces]), np.array([piece[1] for piece in pieces])
    kfold = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    folds = np.zeros(len(pieces), int)
    for number, (_, test) in enumerate(kfold.split(labels, labels, groups)):
        folds[test] = number
    return [
        Clip(file=f"{number:05d}.wav", split=f"fold{fold:02d}", labels=[label], wave=wave)
        for number, ((label, _, wave), fold) in enumerate(zip(pieces, folds, strict=True))
    ]
