"""Weights of codecs: from a folder or file, the hub's cache, or a URL that the user gives."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from torch import nn

from codecssl.tokenize.codec import BACKENDS
from codecssl.tokenize.errors import UserError


def missing(name: str, source: str) -> UserError:
    """The error for weights that are not there: it says how to get them."""
    return UserError(f"codec {name}: no weights at {source}; get them by {BACKENDS[name].weights}")


def local(source: str) -> str:
    """The absolute path of a source that exists here (so that a card's stays true elsewhere), else the source."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def load_pretrained(name: str, kind: Any, source: str) -> Any:
    """A transformers model of class `kind` from a folder in the hub's format or from the hub (its cache, offline).

    Returned in float32, in eval mode, without gradients. Raises UserError when there are no such weights.
    """
    try:
        model, found = kind.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:  # of what is not there, no model, and weights of another shape
        raise missing(name, source) from error
    # transformers would go on with random values in their place, and a warning; a mask for training decides no code
    if lacking := sorted(key for key in found["missing_keys"] if not key.endswith("masked_spec_embed")):
        raise UserError(f"codec {name}: {source} lacks {lacking[0]}; give the whole checkpoint")
    return model.float().eval().requires_grad_(False)


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
    temporary = target.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        urllib.request.urlretrieve(url, temporary)  # raises ContentTooShortError for half a file
        temporary.replace(target)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(f"{url}: cannot be fetched ({error}); fetch it by hand and give the file") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target
