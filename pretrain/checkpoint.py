"""Checkpoints of a run: atomic, the newest few kept, torn ones ignored.

    RUN/checkpoints/step-00005000/   engine/ (DeepSpeed's: weights, optimizer, schedule)
                                     model.safetensors (the encoder in fp32, what `export` gives away)
                                     state.json (step, running sums of the metrics)
                                     whole.json (size of every file: written last)
    RUN/checkpoints/latest           a link to the newest

A checkpoint is written under another name, flushed to disk and renamed; one whose files are not all there,
in full size, is passed over. Random numbers need no state (see chance.py), the order of data neither (see
plan.py).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from codecssl.tokenize.errors import UserError

_ENGINE, _WHOLE, _STATE, WEIGHTS = "engine", "whole.json", "state.json", "model.safetensors"


def save(engine: Any, folder: Path, state: dict[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `state["step"]` into `folder`, then drop all but the newest `keep`."""
    from safetensors.torch import save_file

    from codecssl.pretrain.engine import fp32_weights

    final = folder / f"step-{state['step']:08d}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    engine.save_checkpoint(str(partial), tag=_ENGINE, save_latest=False)
    save_file(fp32_weights(engine.module.model), partial / WEIGHTS)
    (partial / _STATE).write_text(json.dumps(state))
    (partial / _WHOLE).write_text(json.dumps(_sizes(partial)))
    _flush(partial)
    shutil.rmtree(final, ignore_errors=True)  # a torn one of the same step
    partial.rename(final)
    _point_latest(folder, final)
    for old in whole(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Put weights, optimizer and schedule back into the engine; returns the saved state."""
    path, _ = engine.load_checkpoint(str(checkpoint), tag=_ENGINE)
    if path is None:
        raise UserError(f"{checkpoint}: DeepSpeed could not load it; delete that folder to resume from an older one")
    return read_state(checkpoint)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The saved state of a checkpoint: its step, and the running sums of the metrics."""
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text())
    return state


def whole(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in sorted(folder.glob("step-*")) if _is_whole(path)]


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = whole(folder)
    return found[-1] if found else None


def _is_whole(path: Path) -> bool:
    try:
        expected = json.loads((path / _WHOLE).read_text())
    except (OSError, ValueError):
        return False
    return bool(expected == {name: size for name, size in _sizes(path).items() if name != _WHOLE})


def _sizes(path: Path) -> dict[str, int]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in sorted(files)}


def _flush(path: Path) -> None:
    """To the disk itself, files first: a rename may otherwise reach it before the data does."""
    for entry in (*path.rglob("*"), path):
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _point_latest(folder: Path, final: Path) -> None:
    link = folder / ".latest"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(folder / "latest")
