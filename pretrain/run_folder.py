"""Records of a run folder: its config, data and library versions.

RUN/config.yaml     the complete config of the last start, defaults included
RUN/data.json       codec card, fingerprints of the shards
RUN/versions.json   versions of Python and of the libraries
RUN/changes.jsonl   settings that changed on a resume, with the step
RUN/checkpoints, RUN/metrics.jsonl, ...: see `engine.checkpoint`, `monitor.telemetry`
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from codecssl.configs.load import differences, from_dict, to_yaml
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import alone_in, names_in, refuse_links_out, write_atomic
from codecssl.tokenize.common.hashing import file_sha256

# Settings that may change on a resume: the paths of the data and how it is read (fingerprints identify the data), the
# intervals of logging and saving, and how the same global batches are divided and computed.
FREE = (
    *("log.", "data.dirs", "data.valid_dirs", "data.labels", "data.valid_labels"),
    *("data.auto_batch", "data.workers", "data.prefetch", "data.codec_weights", "optim.start_from"),
    *("engine.accumulation", "engine.zero_stage", "engine.activation_checkpointing", "engine.compile"),
)
RECORDED = ("optim.lr", "optim.clip_norm", "optim.steps")
"""Settings that may change on a resume but affect the result. Each change is recorded with its step."""
_CHANGES = "changes.jsonl"
_PACKAGES = ("codecssl", "torch", "fairseq2", "fairseq2n", "deepspeed", "numpy")


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Hold an exclusive lock on the run folder while the context is open.

    Raises UserError if another process holds the lock, and for a folder that is not a run folder.
    """
    begun = {"data.json", "versions.json"}  # left by a start that was killed
    if run.exists() and not (run / "config.yaml").exists() and names_in(run) - begun:
        raise UserError(f"{run}: has files in it but is not a run folder; give another --output")
    if str(run).encode(errors="replace") != os.fsencode(run):
        raise UserError(f"{run}: the name is not UTF-8, which TensorBoard cannot write; give another --output")
    refuse_links_out(run)
    with alone_in(run):
        yield


def claim(run: Path, config: RunConfig, data: dict[str, Any], *, step: int = 0) -> list[str]:
    """Record config (with lengths in frames) and data in the folder `run`, or check them against its records.

    Both may change until a step has been logged or saved there. After that only settings in FREE and RECORDED may
    change. data: {"codec": card as a dict, "train": fingerprints, "valid": fingerprints}. step: step of the checkpoint
    from which the run resumes. Returns the changes since the last start, for the user.
    """
    changes: list[str] = []
    data = data | {"start_from": _weights_sha256(config.optim.start_from)}
    if has_begun(run):
        changes = _check_config(run, config, step)
        data = _check_data(run, data)
    write_atomic(run / "data.json", json.dumps(data, indent=1).encode())
    write_atomic(run / "versions.json", json.dumps(versions(), indent=1).encode())
    write_atomic(run / "config.yaml", to_yaml(config).encode())
    return changes


def read_changes(run: Path) -> list[dict[str, Any]]:
    """Return rows {"step", "key", "old", "new"} of the settings that changed on a resume, in order."""
    path = run / _CHANGES
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); bring it back from a backup, or remove it") from None


def read_config(run: Path) -> RunConfig:
    """Read the config of a run."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: is not a run folder (no config.yaml); give the --output of codecssl-pretrain run")
    try:
        return from_dict(RunConfig, yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError, AttributeError, ValueError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); bring it back from a backup") from None


def read_data(run: Path) -> dict[str, Any]:
    """Read the data of a run, as recorded by `claim`."""
    return _read_json(run / "data.json")


def read_versions(run: Path) -> dict[str, str]:
    """Read the library versions of the last start of a run."""
    return _read_json(run / "versions.json")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that may affect results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def has_begun(run: Path) -> bool:
    """Return True if the folder holds results that another config or other data would invalidate."""
    if not (run / "config.yaml").exists():
        return False
    rows, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    return (rows.exists() and rows.stat().st_size > 0) or any(checkpoints.glob("*step-*"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); bring it back from a backup") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: damaged, not a JSON object; bring it back from a backup")
    return found


def _check_config(run: Path, config: RunConfig, step: int) -> list[str]:
    """Reject changes that are not allowed, and record those of RECORDED. Returns them for the user."""
    rate = CodecCard.from_dict(read_data(run)["codec"]).frame_rate
    before = at_frame_rate(read_config(run), rate)  # runs of earlier releases state frames alone
    changed = {key: pair for key, pair in differences(before, config).items() if not key.startswith(FREE)}
    for key, (old, new) in changed.items():
        if key not in RECORDED:
            raise UserError(f"{run}: was made with {key} {old}, this run has {new}; use that value or another --output")
    # A start may resume from before an earlier change: that change is then undone, or made again.
    rows = [row for row in read_changes(run) if row["step"] <= step]
    rows += [{"step": step, "key": key, "old": old, "new": new} for key, (old, new) in changed.items()]
    if rows or (run / _CHANGES).exists():
        write_atomic(run / _CHANGES, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return [f"from step {step} on {key} is {new}, it was {old}" for key, (old, new) in changed.items()]


def _weights_sha256(model: str | None) -> str | None:
    """Return the sha256 of an exported model's weights, or "gone" if there is no such file."""
    if model is None:
        return None
    path = Path(model) / "model.safetensors"
    return file_sha256(path) if path.is_file() else "gone"


def _check_data(run: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Compare with the recorded data by fingerprint and sha256. Returns the data to record.

    The paths of the folders may change.
    """
    old = read_data(run)
    kept = old.get("start_from", data["start_from"])
    if data["start_from"] not in (kept, "gone"):
        raise UserError(f"{run}: was made with another optim.start_from (weights {_short([kept or 'none'])}, now"
                        f" {_short([data['start_from'] or 'none'])}); give the same, or another --output")  # fmt: skip
    for part in ("train", "valid"):
        if old[part] != data[part]:
            raise UserError(
                f"{run}: was made from other {part} shards ({_short(old[part])}, now"
                f" {_short(data[part])}); give the same --data, in the same order, or another --output"
            )
    return data | {"start_from": kept}


def _short(fingerprints: list[str]) -> str:
    return ", ".join(fingerprint[:8] for fingerprint in fingerprints) or "none"
