"""What a kill leaves: checkpoints of s3prl that are cut short are removed, so that a run resumes from whole ones."""

import shutil
import zipfile
from pathlib import Path


def drop_torn(train: Path) -> None:
    """Remove what a kill left half-written; with a torn valid_best the run starts over."""
    best = train / "valid_best"
    if best.exists() and not is_whole(best):
        shutil.rmtree(train)
    for checkpoint in train.glob("step_*"):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def is_whole(checkpoint: Path) -> bool:
    """s3prl writes config.yaml last; a torch file cut short is not a zip archive."""
    files = [
        checkpoint / "model" / "state_dict.pt",
        checkpoint / "task" / "state.pt",
        checkpoint / "optimizer.pt",
    ]
    return (checkpoint / "config.yaml").is_file() and all(f.is_file() and zipfile.is_zipfile(f) for f in files)
