"""Export of a model: a folder with model.safetensors and config.json, loaded without DeepSpeed.

The folder also has README.md, a model card written from the run's records, and curves.png.
"""

import dataclasses
import filecmp
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codecssl.configs.load import from_dict
from codecssl.pretrain import run_folder
from codecssl.pretrain.config import ModelConfig, RunConfig
from codecssl.pretrain.engine import checkpoint
from codecssl.pretrain.engine.fp32_state import load_weights
from codecssl.pretrain.export import sources
from codecssl.pretrain.export.model_card import model_card
from codecssl.pretrain.export.shipped import model_folder, shipped_models
from codecssl.pretrain.model.model import CodecModel
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError, damaged_file
from codecssl.tokenize.common.files import names_in, refuse_links_out, write_atomic
from codecssl.tokenize.common.hashing import file_sha256
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources.huggingface import parse as parse_hf

FORMAT, VERSION, WEIGHTS = "codecssl-model", 1, "model.safetensors"
CURVES = "curves.png"
MOST_SIZE = 1 << 20
"""Maximum of any size in the model section of a config.json."""
_FILES = {WEIGHTS, "config.json", "README.md", CURVES, sources.FILE}


def export(run_dir: str | Path, output_dir: str | Path, *, half: bool = False) -> None:
    """Export the newest checkpoint of a run as a model folder: fp32 weights, model config, codec card, history.

    half: store the weights as float16. A loaded model still computes in fp32. An earlier export in `output_dir` is
    replaced. Raises UserError if `output_dir` holds anything else, and for damaged records of the run.
    """
    with damaged_file(run_dir, "its records are not those of a run; bring them back from a backup"):
        _export(Path(run_dir), Path(output_dir), half)


def _export(run: Path, output: Path, half: bool) -> None:
    config = run_folder.read_config(run)
    newest, corrupt = checkpoint.newest_intact(run / "checkpoints")
    for path in corrupt:
        print(f"warning: {path}: {checkpoint.damage(path)} is corrupt; an older checkpoint is used", file=sys.stderr)
    if newest is None:
        raise UserError(f"{run}: has no complete checkpoint yet; let codecssl-pretrain run reach one")
    if output.exists() and names_in(output) - _FILES:
        raise UserError(f"{output}: is not empty and no earlier export; give another --output")
    refuse_links_out(output)
    output.mkdir(parents=True, exist_ok=True)
    step = int(checkpoint.read_state(newest)["step"])
    data = run_folder.read_data(run)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "model": dataclasses.asdict(config.model),
        "codec": data["codec"],
        **({"mel": data["mel"]} if "mel" in data else {}),
        "training": {"step": step, "config": dataclasses.asdict(config), "data": data["train"],
                     "changes": [row for row in run_folder.read_changes(run) if row["step"] <= step],
                     "metrics": _last_rows(run, step), "versions": run_folder.read_versions(run)},
    }  # fmt: skip
    # Removed first and written last: a folder without it is not a valid model.
    (output / "config.json").unlink(missing_ok=True)
    if half:
        _write_half(newest / checkpoint.WEIGHTS, output / WEIGHTS)
    else:
        shutil.copyfile(newest / checkpoint.WEIGHTS, output / WEIGHTS)
    description["weights_sha256"] = file_sha256(output / WEIGHTS)
    if (run / CURVES).is_file():
        shutil.copyfile(run / CURVES, output / CURVES)
    shards = _open_shards(config, data["train"])
    description["training"]["hub_datasets"] = sorted({name for dataset in shards for name in _hub_datasets(dataset)})
    (output / sources.FILE).unlink(missing_ok=True)
    if shards:
        sources.write_sources(shards, output)
    card = model_card(output.resolve().name, description, map(_contents, shards))
    write_atomic(output / "README.md", card.encode(errors="backslashreplace"))
    write_atomic(output / "config.json", json.dumps(description, indent=1).encode())


def _write_half(source: Path, target: Path) -> None:
    """Copy a safetensors file as float16."""
    from safetensors.torch import load_file, save_file

    save_file({name: value.half() for name, value in load_file(source).items()}, target)


def is_export_of(run: Path, folder: Path) -> bool:
    """Return True if the folder is a complete export of the run's newest checkpoint."""
    newest, _ = checkpoint.newest_intact(run / "checkpoints")
    if newest is None or not (folder / "config.json").is_file():
        return False
    return filecmp.cmp(newest / checkpoint.WEIGHTS, folder / WEIGHTS, shallow=False)


def load_pretrained(path: str | Path) -> CodecModel:
    """Load an exported model, fp32 on the CPU, in evaluation mode. Its codec's card is `model.card`.

    Raises UserError if the sha256 of the weights differs from that of the export. Old exports have no sha256.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = model_folder(path)
    description = read_description(folder)
    _check_weights(folder, description.get("weights_sha256"))
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: model.safetensors is missing or damaged ({error}); export it again") from None
    with damaged_file(folder / "config.json", "export the model again"):
        model = _model(description, weights, folder)
    load_weights(model, weights, folder)
    return model.eval()


def _model(description: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> CodecModel:
    """Build the model that config.json describes, after a comparison with the shapes of its weights.

    A file from elsewhere could state sizes that need more memory or time than there is.
    """
    config, card = from_dict(ModelConfig, description["model"]), CodecCard.from_dict(description["codec"])
    mel = MelSpec.from_dict(description["mel"]) if "mel" in description else None
    sizes = [value for value in vars(config).values() if type(value) is int]
    if config.layers > len(weights) or max(sizes) > MOST_SIZE:
        raise UserError(f"{folder}: config.json describes another model than its weights; export it again")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CodecModel(config, card, mel).named_parameters()}
    for name in sorted(shapes.keys() & weights.keys()):
        if shapes[name] != weights[name].shape:
            raise UserError(
                f"{folder}: {name} is {tuple(weights[name].shape)}, the model's {tuple(shapes[name])}; export it again"
            )
    return CodecModel(config, card, mel)


def _check_weights(folder: Path, expected: str | None) -> None:
    path = folder / WEIGHTS
    if expected is not None and path.is_file() and file_sha256(path) != expected:
        found = "its sha256 is not the one in config.json"
        raise UserError(f"{folder}: {WEIGHTS} is missing or damaged ({found}); copy it again, or export it again")


def read_description(folder: Path) -> dict[str, Any]:
    """Return config.json of an exported model. Raises UserError if the folder holds none of this version."""
    try:
        description: dict[str, Any] = json.loads((folder / "config.json").read_text())
        if not isinstance(description, dict):
            raise ValueError
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"{folder}: is not an exported model (no readable config.json); make one with codecssl-pretrain export RUN"
            f" --output MODEL, or give the name of a shipped one ({', '.join(shipped_models())})"
        ) from None
    if description.get("format") != FORMAT or description.get("version") != VERSION:
        raise UserError(
            f"{folder}: format {description.get('format')!r} version {description.get('version')!r},"
            f" this version reads {FORMAT!r} version {VERSION}; export it again"
        )
    return description


def _open_shards(config: RunConfig, fingerprints: list[str]) -> list[Shards]:
    """Open the training folders. Returns an empty list if any is missing or has changed."""
    found = []
    for path in config.data.dirs:
        try:
            shards = Shards(path)
        except (UserError, OSError):
            return []
        if shards.fingerprint not in fingerprints:
            return []
        found.append(shards)
    return found


def _contents(shards: Shards) -> dict[str, Any]:
    """Return a row of the model card's table of data."""
    hours = float(int(shards.frames.sum(dtype="int64")) / shards.card.frame_rate) / 3600
    return {"name": shards.path.resolve().name, "utterances": len(shards), "hours": hours}


def _hub_datasets(shards: Shards) -> list[str]:
    """Names of the Hub's datasets that the shards were made of."""
    requests = [
        parse_hf(source) for source in shards.header.get("sources", []) if source.startswith(("hf:", "hf-stream:"))
    ]
    return [request.name for request in requests if not Path(request.name).exists()]


def _last_rows(run: Path, step: int) -> dict[str, Any]:
    """Return the last training row and the last validation row up to the step."""
    return {row["split"]: row for row in read_rows(run / "metrics.jsonl") if row["step"] <= step}
