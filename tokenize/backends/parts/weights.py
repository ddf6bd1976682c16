"""Weights of codecs: from a folder or file, the hub's cache, or a URL that the user gives."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import nn

from codecssl.tokenize.backends.table import BACKENDS
from codecssl.tokenize.common.errors import UserError, one_line
from codecssl.tokenize.common.files import temporary_for


def missing(name: str, source: str, why: str = "") -> UserError:
    """The error for weights that are not there, or why they are none: it says how to get them."""
    return UserError(f"codec {name}: no weights at {source}{why}; get them by {BACKENDS[name].weights}")


def local(source: str) -> str:
    """The absolute path of a source that exists here (so that a card's stays true elsewhere), else the source."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def load_pretrained(name: str, kind: Any, source: str) -> Any:
    """A transformers model of class `kind` from a folder in the hub's format or from the hub (its cache, offline).

    Returned in float32, in eval mode, without gradients. Raises UserError when there are no such weights.
    """
    try:
        model, found = _from_disk_or_hub(kind, source)
    except Exception as error:  # of what is not there, no model, weights of another shape, and a torn config.json
        raise missing(name, source, f" ({one_line(error)})" if Path(source).exists() else "") from error
    # transformers would go on with random values in their place, and a warning; a mask for training decides no code
    if lacking := sorted(key for key in found["missing_keys"] if not key.endswith("masked_spec_embed")):
        raise UserError(f"codec {name}: {source} lacks {lacking[0]}; give the whole checkpoint")
    return model.float().eval().requires_grad_(False)


def _from_disk_or_hub(kind: Any, source: str) -> Any:
    try:
        return kind.from_pretrained(source, output_loading_info=True, local_files_only=True)
    except OSError:
        if Path(source).exists():
            raise
        ask_hub(source)
        return kind.from_pretrained(source, output_loading_info=True)


def ask_hub(repository: str) -> None:
    """Raises OSError or ValueError when the hub does not answer or has no such repository: downloads would ask it
    again and again, for most of a minute."""
    from huggingface_hub import model_info

    model_info(repository, timeout=10)


def th_file(weights: str | None, cached: str) -> Path | None:
    """The encodec package's .th file: `weights`, or, where none are named, the one that lies in torch hub's cache."""
    if weights is None:
        path = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache/torch")) / "hub/checkpoints" / cached
    else:
        path = Path(weights)
    return path if path.is_file() else None


def fill(model: nn.Module, path: Path, name: str) -> None:
    """Put the tensors of a file of `torch.save` into `model`. Raises UserError when they are others, or none."""
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a pickle of something else may raise anything
        raise UserError(f"{path}: not the weights of {name} ({one_line(error)})") from error


def state_sha256(model: nn.Module) -> str:
    """sha256 over names and bytes of a state dict: the same for each way of storing it."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_url(source: str) -> bool:
    """Whether `source` is to be downloaded."""
    return urllib.parse.urlparse(source).scheme in ("http", "https", "file")


def download(url: str) -> Path:
    """A file fetched once into the cache ($XDG_CACHE_HOME/codecssl); whole or not there. Raises UserError."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "codecssl"
    name = Path(urllib.parse.urlparse(url).path).name or "weights"
    target = root / hashlib.sha256(url.encode()).hexdigest()[:16] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(target)
    try:
        urllib.request.urlretrieve(url, temporary)  # raises ContentTooShortError for half a file
        temporary.replace(target)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{url}: cannot be fetched ({error}); fetch it by hand and give the file") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
