"""Restart or resume s3prl runs that were killed in training, after removing damaged checkpoints.

s3prl resumes at the start of the epoch with other batches: its figure differs from that of an uninterrupted run.
Training therefore restarts from the beginning, unless it is as long as the official ones, which may exceed the time
limit of a job. result.json records interruptions.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from codecssl.superb.runner.outcome import drop_truncated


def prepare_training(folder: Path, steps: int, *, restart: bool) -> list[dict[str, Any]]:
    """Prepare a run's folder for s3prl. Returns all interruptions so far, {"at": step, "then": action}.

    `steps` is the length of the training; a complete one is kept. With `restart`, training starts from the beginning.
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
