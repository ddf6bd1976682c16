"""Read the folder of an s3prl run: metrics of the selected checkpoint, layer weights, learning curves."""

import shutil
import zipfile
from pathlib import Path
from typing import Any

from codecssl.superb.rows import ResultRow
from codecssl.superb.tasks import Task


def outcome(folder: Path, task: Task) -> ResultRow:
    """Return the result row of a finished run: value, values (all metrics), valid, best_step, layer_weights, curves."""
    read = {"asv": _verification, "sd": _diarisation}.get(task.name, _tested)
    found = read(folder, task)
    known = [metric.key for metric in task.metrics]
    values = {key: value for key, value in found.pop("values").items() if key in known}
    checkpoint = found.pop("checkpoint")
    weights = _layer_weights(checkpoint)
    return {"value": values[task.metric], "values": values, **found, "layer_weights": weights,
            "curves": _curves(folder / "train" / "tb")}  # fmt: skip


def _tested(folder: Path, task: Task) -> ResultRow:
    """Read the test metrics of the checkpoint with the best validation metric."""
    best = folder / "train" / "valid_best"
    stats = _yaml(best / "training_stats.yaml")
    return {
        "values": _yaml(folder / "evaluate" / "valid_best" / "test" / "result.yaml"),
        "valid": stats["valid_best_metrics"][task.metric],
        "best_step": stats["global_step"],
        "checkpoint": best,
    }


def _diarisation(folder: Path, task: Task) -> ResultRow:
    """Select the best of SUPERB's thresholds and median filters on the test set, as s3prl does."""
    score = _yaml(folder / "evaluate" / "valid_best" / "test" / "dscore.yaml")
    chosen = {"threshold": score["threshold"], "median_filter": score["median_filter"]}
    return {**_tested(folder, task), "values": {"der": score["der"] / 100}, "chosen": chosen}


def _verification(folder: Path, task: Task) -> ResultRow:
    """Select the best of all kept checkpoints on the test set, since SUPERB has no validation set for verification."""
    tested = {
        int(path.parent.name.removeprefix("step_")): _yaml(path)["EER"]
        for path in (folder / "evaluate" / "test_trial").glob("step_*/result.yaml")
    }
    step = min(tested, key=lambda step: (tested[step], step))
    return {
        "values": {"eer": tested[step]},
        "valid": None,
        "best_step": step,
        "checkpoint": folder / "train" / f"step_{step}",
        "chosen": {"checkpoints": {str(step): round(tested[step], 5) for step in sorted(tested)}},
    }


def _layer_weights(checkpoint: Path) -> list[float] | None:
    import torch

    state = torch.load(checkpoint / "model" / "state_dict.pt", map_location="cpu", weights_only=True)
    weights = state.get("featurizer.weights")
    return None if weights is None else [round(w, 5) for w in weights.softmax(-1).tolist()]


def _curves(folder: Path) -> dict[str, list[list[float]]]:
    """Read s3prl's TensorBoard scalars: "train-loss", "valid-accuracy", ... -> [[step, value], ...]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    latest = {tag: {s.step: round(s.value, 5) for s in points} for tag, points in scalars.items()}  # after a resume
    return {tag: [[step, values[step]] for step in sorted(values)] for tag, values in latest.items()}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def drop_truncated(train: Path) -> None:
    """Remove truncated checkpoints left by a kill. Without a complete valid_best the run starts over."""
    best = train / "valid_best"
    if best.exists() and not _is_whole(best):
        shutil.rmtree(train)
    for checkpoint in train.glob("step_*"):
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def _is_whole(checkpoint: Path) -> bool:
    """True if s3prl finished writing. config.yaml is written last, and a truncated torch file is not a zip archive."""
    files = [
        checkpoint / "model" / "state_dict.pt",
        checkpoint / "task" / "state.pt",
        checkpoint / "optimizer.pt",
    ]
    return (checkpoint / "config.yaml").is_file() and all(f.is_file() and zipfile.is_zipfile(f) for f in files)
