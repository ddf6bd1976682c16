"""Names of upstreams, as typed by the user, and their parsing."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codecssl.pretrain.export.shipped import model_folder
from codecssl.superb.rows import BASELINES, SPECTRA
from codecssl.superb.upstreams import transformers_upstreams
from codecssl.tokenize.common.errors import UserError

NAMES = (
    "an exported model's folder, a shipped model's name (laptop_16khz), a codec's folder of task-codec, "
    f"{', '.join(BASELINES)}, codes:MODEL, codes:CODEC, random:MODEL, NAME@s3prl, or hf:PATH|NAME for a HuBERT, "
    "wav2vec2 or WavLM of transformers"
)


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A parsed upstream name.

    kind: "model", "s3prl", "hf", or one of `BASELINES`. argument: a model's folder, a codec's name, an s3prl name, or a
    transformers checkpoint.
    """

    name: str
    kind: str
    argument: str | None = None

    @property
    def reads_codes(self) -> bool:
        return self.kind in ("model", "codes", "random")

    @property
    def runs_codec(self) -> bool:
        """False for models whose only input is the log-mel plane of a wave."""
        model = _description(self.argument or "").get("model") if self.kind in ("model", "random") else None
        return self.reads_codes and not (isinstance(model, dict) and model.get("input") == "mel")

    def identity(self) -> dict[str, str | None]:
        """Identity of the upstream's features: the name, and for a path (also NAME@PATH) its files' sha256."""
        digest, files = None, _files(self.argument or "")
        if files:
            digest = hashlib.sha256(b"".join(hashlib.sha256(p.read_bytes()).digest() for p in files)).hexdigest()
        return {"name": self.name, "kind": self.kind, "argument": self.argument, "sha256": digest}


def parse(name: str) -> Upstream:
    """Parse a name as typed by the user. Raises UserError for an unknown name."""
    head, _, tail = name.partition(":")
    if name.endswith("@s3prl"):
        return Upstream(name=name, kind="s3prl", argument=name.removesuffix("@s3prl"))
    if name in SPECTRA:
        return Upstream(name=name, kind=name)
    if head == "hf" and tail:
        return Upstream(name=name, kind="hf", argument=tail)
    if head == "codes":
        return Upstream(name=name, kind="codes", argument=tail or None)
    if head == "random" and (not tail or is_model(tail)):
        return Upstream(name=name, kind="random", argument=tail or None)
    if transformers_upstreams.is_checkpoint(name):
        raise UserError(f"upstream {name}: a checkpoint of transformers; give hf:{name}")
    if is_model(name) or is_task_codec(name):
        return Upstream(name=name, kind="model", argument=name)
    raise UserError(f"upstream {name}: not known; give {NAMES} (codecssl-pretrain export makes such a folder)")


def parse_all(names: Sequence[str]) -> list[Upstream]:
    """Parse the names of one comparison.

    Bare `codes` and `random` use the codec and architecture of the first named model.
    """
    upstreams = [parse(name) for name in names]
    model = next((u.argument for u in upstreams if u.kind == "model" and is_model(u.argument or "")), None)
    bare = [u.kind in ("codes", "random") and u.argument is None for u in upstreams]
    return [
        Upstream(name=u.name, kind=u.kind, argument=model) if is_bare else u
        for u, is_bare in zip(upstreams, bare, strict=True)
    ]


def is_model(path: str) -> bool:
    """True if a folder is an exported model. Codecs and other models also have a config.json."""
    return _description(path).get("format") == "codecssl-model"


def is_task_codec(path: str) -> bool:
    """True if a folder is a codec written by `codecssl-superb task-codec`."""
    return _description(path).get("model_type") == "codecssl-machine"


def _description(path: str) -> dict[str, Any]:
    try:
        found = json.loads((model_folder(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _files(name: str) -> list[Path]:
    """Weight and settings files that a name points to. Empty if it is not a path."""
    path = model_folder(name.partition("@")[2] or name)
    if not name or not path.exists():
        return []
    kinds = (".json", ".safetensors", ".bin", ".th", ".tflite")
    return [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in kinds)
