"""The run folder's own papers: which config, which data and which library versions made it.

RUN/config.yaml  the whole config, defaults spelled out      RUN/data.json  codec card, fingerprints of the
shards
RUN/versions.json                                            RUN/checkpoints, metrics.jsonl, ...: see their
files
"""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from codecssl.configs.load import differences, from_dict, to_yaml
from codecssl.pretrain.config import RunConfig
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import alone_in, names_in, write_atomic

# What may change when a run is resumed: where data lies and how it is fetched, how often the run speaks and
# saves, and how the same global batches are divided and computed.
FREE = (
    *("log.", "data.dirs", "data.valid_dirs", "data.workers", "data.prefetch", "data.codec_weights"),
    *("engine.accumulation", "engine.zero_stage", "engine.activation_checkpointing", "engine.compile"),
)
_PACKAGES = ("codecssl", "torch", "fairseq2", "fairseq2n", "deepspeed", "numpy")


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """No other process trains in this folder while the context is open. UserError where one does, and for a folder
    that is none of ours."""
    begun = {"data.json", "versions.json"}  # of a start that was killed
    if run.exists() and not (run / "config.yaml").exists() and names_in(run) - begun:
        raise UserError(f"{run}: has files in it but is not a run folder; give another --output")
    with alone_in(run):
        yield


def claim(run: Path, config: RunConfig, data: dict[str, Any]) -> None:
    """Make `run` the folder of this config and this data, or check that it already is; until a step has been told or
    saved there, both may still change.

    data: {"codec": card as a dict, "train": fingerprints, "valid": fingerprints}.
    """
    if (run / "config.yaml").exists() and _has_begun(run):
        _check_config(run, config)
        _check_data(run, data)
    write_atomic(run / "data.json", json.dumps(data, indent=1).encode())
    write_atomic(run / "versions.json", json.dumps(versions(), indent=1).encode())
    write_atomic(run / "config.yaml", to_yaml(config).encode())


def read_config(run: Path) -> RunConfig:
    """The config that made a run."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: is not a run folder (no config.yaml); give the --output of codecssl-pretrain run")
    try:
        return from_dict(RunConfig, yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); bring it back from a backup") from None


def read_data(run: Path) -> dict[str, Any]:
    """What `claim` was told of the data."""
    return _read_json(run / "data.json")


def read_versions(run: Path) -> dict[str, str]:
    """The versions under which a run was last started."""
    return _read_json(run / "versions.json")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries on which a number may depend."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _has_begun(run: Path) -> bool:
    """Whether there is anything that another config or other data would spoil."""
    rows, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    return (rows.exists() and rows.stat().st_size > 0) or any(checkpoints.glob("*step-*"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); bring it back from a backup") from None
    return found


def _check_config(run: Path, config: RunConfig) -> None:
    changed = {key: pair for key, pair in differences(read_config(run), config).items() if not key.startswith(FREE)}
    for key, (old, new) in changed.items():
        raise UserError(f"{run}: was made with {key} {old}, this run says {new}; use that value or another --output")


def _check_data(run: Path, data: dict[str, Any]) -> None:
    old = read_data(run)
    for part in ("train", "valid"):
        if old[part] != data[part]:
            raise UserError(
                f"{run}: was made from other {part} shards ({_short(old[part])}, now"
                f" {_short(data[part])}); give the same --data, in the same order, or another --output"
            )


def _short(fingerprints: list[str]) -> str:
    return ", ".join(fingerprint[:8] for fingerprint in fingerprints) or "none"
