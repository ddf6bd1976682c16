"""Weights of codecs: from a folder or file, the hub's cache, or a URL given by the user."""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from codecssl.tokenize.backends.table import BACKENDS
from codecssl.tokenize.common.errors import UserError, one_line
from codecssl.tokenize.common.files import atomic_file
from codecssl.tokenize.common.trusted_weights import cache_folder

MOST_BYTES = 16 << 30
"""Largest file in bytes that `download` fetches. The largest weights of a codec here have 6 GB."""

_CACHE_ONLY = ContextVar("cache_only", default=False)


def missing(name: str, source: str, why: str = "") -> UserError:
    """Build the error for missing or invalid weights, with instructions to get them."""
    return UserError(f"codec {name}: no weights at {source}{why}; get them by {BACKENDS[name].weights}")


def local(source: str) -> str:
    """Return the absolute path of a local source, which stays valid in other folders, else the source itself."""
    return str(Path(source).resolve()) if Path(source).exists() else source


def load_pretrained(name: str, kind: Any, source: str) -> Any:
    """Load a transformers model of class `kind` from a folder in the hub's format or from the hub (its cache, offline).

    The model is in float32, in eval mode, without gradients. Raises UserError if there are no such weights.
    """
    try:
        model, found = _from_disk_or_hub(kind, source)
    except Exception as error:  # missing files, other files, weights of another shape, or a truncated config.json
        raise missing(name, source, f" ({one_line(error)})" if Path(source).exists() else "") from error
    # transformers fills missing weights with random values and only warns; a training mask affects no code
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
    """Check that the hub answers and has a repository. Downloads would retry for most of a minute.

    Raises OSError or ValueError if it does not. Raises OSError while only the cache may be used (`cache_only`).
    """
    if _CACHE_ONLY.get():
        raise OSError(f"{repository} is named by a file, not by you: it is taken from the hub's cache only")
    from huggingface_hub import model_info

    model_info(repository, timeout=10)


def th_file(weights: str | None, cached: str) -> Path | None:
    """Return the encodec package's .th file: `weights` or, by default, the file in torch hub's cache."""
    if weights is None:
        path = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache/torch")) / "hub/checkpoints" / cached
    else:
        path = Path(weights)
    return path if path.is_file() else None


def fill(model: nn.Module, path: Path, name: str) -> None:
    """Load the tensors of a `torch.save` file into `model`. Raises UserError if they are missing or do not match."""
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # an unrelated pickle may raise any error
        raise UserError(f"{path}: not the weights of {name} ({one_line(error)})") from error


def find_weights(name: str, source: str | None, repository: str, file: str, pattern: str) -> Path:
    """Find a codec's checkpoint: the file `source`, the only match of `pattern` in a folder, or `file` on the hub.

    Raises UserError if there is none, or if a folder has several.
    """
    if source is None:
        return hub_file(name, repository, file)
    path = Path(source)
    if not path.exists():
        raise missing(name, source)
    if path.is_file():
        return path
    found = sorted(p for p in path.rglob(pattern) if p.is_file())
    if not found:
        raise missing(name, source, f" (no {pattern} in it)")
    if len(found) > 1:
        raise UserError(f"codec {name}: {path} holds {len(found)} of {pattern}; give one of them, as {found[0]}")
    return found[0]


def hub_file(name: str, repository: str, file: str) -> Path:
    """Return a file of a hub repository, from the hub's cache if it is there. Raises UserError if it is not found."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            return Path(hf_hub_download(repository, file, local_files_only=True))
        except LocalEntryNotFoundError:
            ask_hub(repository)
            return Path(hf_hub_download(repository, file))
    except (OSError, ValueError) as error:  # the hub's errors are one or the other
        raise missing(name, f"{repository}/{file}") from error


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file or a `torch.save` file, without running code from it.

    Of a Lightning checkpoint, that is its `state_dict`. The tensors of nested dictionaries have keys joined by dots.
    Raises UserError for any other content.
    """
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unrelated pickle may raise any error
        raise UserError(f"{path}: not the weights of {name} ({one_line(error)})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    tensors = dict(_flat(state))
    if not tensors:
        raise UserError(f"{path}: not the weights of {name} (no tensors in it)")
    return tensors


def _flat(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def fill_part(
    module: nn.Module, state: dict[str, Tensor], prefix: str, path: Path, name: str, *, assign: bool = False
) -> None:
    """Load the tensors of `state` under `prefix` into `module`. Raises UserError if they are missing or do not match.

    Tensors of the checkpoint that the module does not have are ignored. assign: the module takes the tensors, uncopied.
    """
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    try:
        lacking = module.load_state_dict(part, strict=False, assign=assign).missing_keys
    except RuntimeError as error:
        what = str(error).splitlines()[-1].strip()  # torch lists the tensors after a title
        raise UserError(f"{path}: not the weights of {name} ({what})") from error
    if lacking:
        raise UserError(f"{path}: not the weights of {name} (lacks {prefix}{lacking[0]})")


def fold_weight_norm(model: nn.Module) -> None:
    """Replace the weight norm of every layer by the plain weight that it computes."""
    for module in model.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)


WEIGHT_NORM = {"weight_g": "weight_v", "parametrizations.weight.original0": "parametrizations.weight.original1"}
"""Names of the norms and of the directions of a layer with weight norm, in torch's old and new format."""


def folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace the norms and directions of weight norm in a state dict by the weights that they compute.

    Raises KeyError if one of two is missing.
    """
    found = dict(state)
    for key in state:
        for norms, directions in WEIGHT_NORM.items():
            if key.endswith((f".{norms}", f".{directions}")):
                stem = key.removesuffix(norms).removesuffix(directions)
                direction = state[stem + directions]
                found[f"{stem}weight"] = direction * (state[stem + norms] / torch.norm_except_dim(direction, 2, 0))
                del found[key]
    return found


def state_sha256(model: nn.Module, *more: Tensor) -> str:
    """sha256 over names and bytes of a state dict, independent of its storage format, and over `more` tensors."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    for value in more:
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_url(source: str) -> bool:
    """Return True if `source` is a URL to download."""
    return urllib.parse.urlparse(source).scheme in ("http", "https", "file")


def downloaded(url: str) -> Path:
    """Path in the cache ($XDG_CACHE_HOME/codecssl) to which `download` writes a URL."""
    name = Path(urllib.parse.urlparse(url).path).name or "weights"
    return cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def download(url: str) -> Path:
    """Fetch a file once into the cache, atomically. `URL#sha256=HEX` also checks the content.

    Only for a URL given by the user. Raises UserError if it cannot be fetched, has more than MOST_BYTES, or has
    another sha256.
    """
    target = downloaded(url)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    address, _, fragment = url.partition("#")
    expected = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else ""
    try:
        with atomic_file(target) as file, urllib.request.urlopen(address, timeout=60) as answer:
            found = _copy(answer, file, address)
            if expected and found != expected:
                raise UserError(f"{address}: its sha256 is {found}, not {expected}; check the address and the sha256")
    except (http.client.HTTPException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{address}: cannot be fetched ({error}); fetch it by hand and give the file") from error
    return target


def _copy(answer: Any, file: BinaryIO, url: str) -> str:
    """Copy an answer to `file` and return its sha256."""
    announced, size, digest = answer.headers.get("Content-Length"), 0, hashlib.sha256()
    while block := answer.read(1 << 20):
        size += len(block)
        if size > MOST_BYTES:
            raise UserError(f"{url}: more than {MOST_BYTES >> 30} GiB; fetch it by hand and give the file")
        file.write(block)
        digest.update(block)
    if announced is not None and int(announced) != size:
        raise OSError(f"{size} of {announced} bytes came")
    return digest.hexdigest()


@contextmanager
def cache_only() -> Iterator[None]:
    """Within this context, weights come only from the disk and the hub's cache, without network access."""
    token = _CACHE_ONLY.set(True)
    try:
        yield
    finally:
        _CACHE_ONLY.reset(token)
