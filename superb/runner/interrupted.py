"""Runs of s3prl that were killed in training: damaged checkpoints are removed, and the training restarts or resumes.

s3prl's resume begins the epoch again, with other batches: its figure is not that of an uninterrupted run. So a training
restarts whole, unless it is as long as the official ones, which are longer than many a job may last. result.json tells.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from codecssl.superb.runner.outcome import drop_truncated


def prepare_training(folder: Path, steps: int, *, restart: bool) -> list[dict[str, Any]]:
    """Make a run's folder ready for s3prl; returns all interruptions so far, {"at": step, "then": what was done}.

    steps: of the whole training; one that is complete is kept. restart: train from the beginning again.
    """
    train, notes = folder / "train", folder / "interrupted.jsonl"
    begun = train.exists()
    drop_truncated(train)
    saved = sorted(int(path.name.removeprefix("step_")) for path in train.glob("step_*"))
    if begun and steps not in saved:
        then = "resumed" if saved and not restart else "restarted"
        if then == "restarted":
            shutil.rmtree(train, ignore_errors=True)
            shutil.rmtree(folder / "evaluate", ignore_errors=True)
        with notes.open("a") as file:
            file.write(json.dumps({"at": max(saved, default=0), "then": then}) + "\n")
    return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
