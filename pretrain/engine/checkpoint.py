"""Checkpoints of a run: written atomically, the newest few kept, damaged ones reported and skipped.

    RUN/checkpoints/step-00005000/   model.safetensors (the encoder in fp32, as `export` publishes it)
                                     training.safetensors (heads, moments of the optimizer, the objective's extra state)
                                     state.json (step, losses since the last row of the metrics)
                                     whole.json (size and CRC-32 of every file: written last)
    RUN/checkpoints/latest           a link to the newest

All tensors are whole and fp32, independent of the ZeRO stage and the number of ranks. A run can resume with another
stage and another number of ranks. Rank 0 writes under a temporary name, syncs, and renames. It also renames before it
removes. A directory step-* with a missing file was therefore damaged, not interrupted. No state is needed for random
numbers (see hashed_random.py), the order of data (plan.py) and the schedule (a function of the step).
"""

import errno
import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from codecssl.pretrain.engine.fp32_state import MOMENTS, masters, moments
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.retry import disk_error, patiently

FORMAT = 2
_WHOLE, _STATE, _TRAINING, WEIGHTS = "whole.json", "state.json", "training.safetensors", "model.safetensors"
_MODEL = "model."  # prefix of the encoder's weights in the objective
_CHUNK = 1 << 22


@dataclass
class Saved:
    """Contents of a checkpoint: whole fp32 tensors by parameter name, and the state of the training loop."""

    state: dict[str, Any]
    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The optimizer's moments, by key and parameter name."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """The objective's `extra_state`."""

    @property
    def step(self) -> int:
        return int(self.state["step"])


def collect(engine: Any, state: dict[str, Any]) -> Saved:
    """Gather the engine's state on rank 0; the other ranks return empty tensors. All ranks must call it."""
    return Saved(
        {"format": FORMAT, **state},
        dict(masters(engine)),
        {key: dict(moments(engine, key)) for key in MOMENTS},
        engine.module.extra_state(),
    )


def save(saved: Saved, folder: Path, *, keep: int, retry_seconds: float = 0.0) -> Path:
    """Write a checkpoint into `folder`, then remove all but the newest `keep`. To be called by rank 0.

    retry_seconds: time for which a write is retried while the disk is unavailable. Raises UserError if the disk is full
    or weights are not finite, TransientError if the disk stays unavailable. Earlier checkpoints are then unchanged.
    """
    if bad := [name for name, value in saved.weights.items() if not value.isfinite().all()]:
        raise UserError(f"step {saved.step}: {bad[0]} is not finite; lower optim.lr or optim.clip_norm, and start"
                        f" again: {_last(folder)}")  # fmt: skip
    final = folder / f"step-{saved.step:08d}"
    partial = folder / f".{final.name}.partial"
    try:
        patiently(lambda: _put(saved, partial, final), final, seconds=retry_seconds)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(f"{final}: could not be written ({error.strerror or error}); make room and start again:"
                         f" {_last(folder)}", error) from None  # fmt: skip
    for old in whole(folder)[:-keep]:
        _remove(old)
    return final


def _put(saved: Saved, partial: Path, final: Path) -> None:
    for left in final.parent.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    partial.parent.mkdir(exist_ok=True)  # without the run's folder, whose disk may be unavailable
    partial.mkdir()
    _write(saved, partial)
    if final.exists():  # a damaged checkpoint of the same step
        shutil.rmtree(final)
    partial.rename(final)
    _point_latest(final.parent, final)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint. An interrupted removal leaves no directory of its name."""
    shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.partial")), ignore_errors=True)


def load(checkpoint: Path) -> Saved:
    """Load a checkpoint's contents, on the CPU. Raises UserError if another version of codecssl wrote it."""
    state = read_state(checkpoint)
    if state["format"] != FORMAT:
        raise UserError(
            f"{checkpoint}: has format {state['format']}, this version reads {FORMAT}; resume with the codecssl "
            "version that wrote it, or give another --output"
        )
    from safetensors.torch import load_file

    saved = Saved(state, {_MODEL + name: value for name, value in load_file(checkpoint / WEIGHTS).items()})
    parts = {
        "weights": saved.weights,
        "extra": saved.extra,
        **{key: saved.moments.setdefault(key, {}) for key in MOMENTS},
    }
    for key, value in load_file(checkpoint / _TRAINING).items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return saved


def newest_intact(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return (the newest intact checkpoint, the newer damaged ones).

    Raises UserError if all of them are damaged, because a run must not silently start at step 0.
    """
    corrupt: list[Path] = []
    if old := next(folder.glob("step-*/engine"), None):
        raise UserError(
            f"{old.parent}: uses DeepSpeed's checkpoint format, but this version needs format {FORMAT}; resume with "
            "the codecssl version that wrote it, or give another --output"
        )
    for path in reversed(_all(folder)):
        if damage(path) is None:
            return path, corrupt
        corrupt.append(path)
    if corrupt:
        older = "no older one is complete" if len(corrupt) > 1 else "there is no older checkpoint"
        raise UserError(f"{corrupt[0]}: {damage(corrupt[0])} is corrupt, and {older}; bring it back from a backup, or"
                        f" delete {folder} to start from step 0")  # fmt: skip
    return None, []


def set_aside(corrupt: Path) -> Path:
    """Rename a corrupt checkpoint, which excludes it from later searches and from the number of kept checkpoints."""
    aside = corrupt.with_name(f"corrupt-{corrupt.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return corrupt.rename(aside)


def damage(checkpoint: Path) -> str | None:
    """Return the name of the first file that is missing, truncated or has a wrong CRC-32; None if intact."""
    try:
        files = _read_whole(checkpoint)
    except (OSError, ValueError, RecursionError):
        return _WHOLE
    if not isinstance(files, dict) or not {WEIGHTS, _TRAINING, _STATE} <= files.keys():
        return _WHOLE
    return next((name for name, expected in files.items() if _described(checkpoint / name) != expected), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state of a checkpoint: its step, and the losses since the last row of metrics."""
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text())
    return state


def whole(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. In a complete one all files have their full size."""
    return [path for path in _all(folder) if _is_whole(path)]


def _all(folder: Path) -> list[Path]:
    """Return all checkpoints of a run, including damaged ones, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    found = whole(folder)
    return found[-1] if found else None


def _last(folder: Path) -> str:
    found = newest(folder)
    return f"{found.name} is the last good checkpoint" if found else "there is no checkpoint yet"


def _write(saved: Saved, partial: Path) -> None:
    heads = {name: value for name, value in saved.weights.items() if not name.startswith(_MODEL)}
    training = {f"weights/{name}": value for name, value in heads.items()}
    training |= {f"{key}/{name}": value for key in saved.moments for name, value in saved.moments[key].items()}
    training |= {f"extra/{name}": value.detach().cpu().clone() for name, value in saved.extra.items()}
    _save_file(training, partial / _TRAINING)
    _save_file({name.removeprefix(_MODEL): value for name, value in saved.weights.items() if name not in heads},
               partial / WEIGHTS)  # fmt: skip
    (partial / _STATE).write_text(json.dumps(saved.state))
    files = {path.name: _described(path) for path in sorted(partial.iterdir())}
    (partial / _WHOLE).write_text(json.dumps(files))
    _flush(partial)


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    except SafetensorError as error:  # how it reports a full disk: the errno is in the text only
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.ENOSPC, str(error)) from None


def _described(path: Path) -> dict[str, int]:
    """Return size and CRC-32 of a file. At 1 GB/s or more this is cheap compared with writing the file."""
    size = checksum = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
    except OSError:
        return {"bytes": -1, "crc32": -1}
    return {"bytes": size, "crc32": checksum}


def _read_whole(path: Path) -> dict[str, dict[str, int]]:
    files: dict[str, dict[str, int]] = json.loads((path / _WHOLE).read_text())
    return files


def _is_whole(path: Path) -> bool:
    try:
        return all((path / name).stat().st_size == file["bytes"] for name, file in _read_whole(path).items())
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False


def _flush(path: Path) -> None:
    """Sync to disk, files first. Otherwise a rename may reach the disk before the data."""
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
