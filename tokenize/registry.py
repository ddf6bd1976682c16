"""Find codecs by name, by the path of their weights, or by the card of a dataset.

Built-in codecs are listed in `backends/table.py`. Another package registers a codec through an entry point of the group
`codecssl.codecs`: its name is the codec's name, and it points to a `Backend`. In the package's pyproject.toml:

    [project.entry-points."codecssl.codecs"]
    my_codec = "my_package.codecs:MY_CODEC"
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import warnings
from contextlib import nullcontext
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from codecssl.tokenize.backends.table import BACKENDS
from codecssl.tokenize.codec import Backend, Codec, CodecCard
from codecssl.tokenize.common.errors import UserError, one_line
from codecssl.tokenize.common.trusted_weights import given, is_known, remember

GROUP = "codecssl.codecs"
"""Entry-point group of codecs in other packages."""


def names() -> list[str]:
    """Return the names of all codecs, built-in ones first. Modules of other packages are not imported."""
    return [*BACKENDS, *(name for name in _entry_points() if name not in BACKENDS)]


def backend(name: str) -> Backend:
    """Return the description of a codec. Raises KeyError for an unknown name, UserError for a broken plug-in."""
    if name in BACKENDS:
        return BACKENDS[name]
    entry = _entry_points()[name]
    package = entry.dist.name if entry.dist else entry.module
    try:
        found = entry.load()
    except Exception as error:  # importing another package's module may raise anything
        why = one_line(error)
        raise UserError(f"codec {name}: {entry.value} of package {package} cannot be imported ({why})") from error
    if not isinstance(found, Backend):
        raise UserError(f"codec {name}: {entry.value} of package {package} is a {type(found).__name__}, not a Backend")
    return found


def backends() -> dict[str, Backend]:
    """Return descriptions of all codecs by name. Plug-ins that cannot be imported are skipped with a warning."""
    found = {}
    for name in names():
        try:
            found[name] = backend(name)
        except UserError as error:
            warnings.warn(str(error), stacklevel=2)
    return found


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def load_codec(name_or_path: str, *, num_codebooks: int | None = None, device: str = "cpu") -> Codec:
    """Load a codec by NAME, by the PATH or URL of its weights, or by NAME@PATH if a path alone is ambiguous.

    num_codebooks keeps the first (coarsest) codebooks; the default is the backend's own.
    Use it only for names given by the user: a path is recorded in `trusted_weights`. For cards, use `load_codec_for`.
    Raises UserError for an unknown name, missing weights, a count out of range, or a device that is not available.
    """
    from codecssl.tokenize.backends.parts.weights import download, is_url, local

    check_device(device)
    name, _, path = name_or_path.partition("@")
    if name in names():
        path = str(download(path)) if is_url(path) else local(path) if path else ""
        return _load_given(name, path, num_codebooks, device)
    if is_url(name_or_path):
        name_or_path = str(download(name_or_path))
    if Path(name_or_path).exists():
        return _load_given(identify(Path(name_or_path)), local(name_or_path), num_codebooks, device)
    if "/" in name_or_path or name_or_path.startswith("."):
        raise UserError(f"codec {name_or_path!r}: no such file or folder; give a path that exists or a codec's name")
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"unknown codec {name_or_path!r}: give a path or one of {', '.join(sorted(names()))}{hint}")


def load_codec_for(card: CodecCard, *, device: str = "cpu", weights: str | None = None) -> Codec:
    """Load the codec that wrote `card`, from `weights` if the card's own source has moved.

    Without `weights`, the sources of `--codec-weights` are tried first (`trusted_weights.given`). Then only the card
    names them, and it may be untrusted. Only the codec's own weights are downloaded, by its name. A path must be one
    that the user named before (`trusted_weights`).
    Raises UserError for another source, and if the weights differ from the card's (by sha256).
    """
    check_device(device)
    named_source(card, weights or card.name)  # an unknown codec
    if weights is not None:
        return _checked(card, weights, device)
    reasons = []
    for source in given():
        try:
            return _checked(card, source, device)
        except UserError as error:
            reasons.append(f"--codec-weights {source}: {error}")
    try:
        return _checked(card, None, device)
    except UserError as error:
        hint = "" if reasons else "; where they have moved, give --codec-weights PATH"
        raise UserError("; ".join([*reasons, str(error)]) + hint) from error


def _checked(card: CodecCard, weights: str | None, device: str) -> Codec:
    """Load the codec of `card` from `weights`, or from the card's own source, and compare the weights with the card."""
    from codecssl.tokenize.backends.parts.weights import cache_only

    by_card = weights is None and card.weights not in names()
    with cache_only() if by_card else nullcontext():
        codec = load_codec(named_source(card, weights), num_codebooks=card.num_codebooks, device=device)
    if codec.card.weights_sha256 != card.weights_sha256:
        raise UserError(
            f"codec {card.name}: {weights or card.weights} has weights {codec.card.weights_sha256[:12]}, the data was "
            f"written with {card.weights_sha256[:12]}; give the original weights"
        )
    return codec


def named_source(card: CodecCard, source: str | None = None) -> str:
    """Return `source`, by default the card's weights, as an argument of `load_codec`: NAME or NAME@PATH.

    Raises UserError if the card itself names a path or a URL that the user has not given before.
    """
    named = source or card.weights
    name, _, path = (named if named.partition("@")[0] in names() else f"{card.name}@{named}").partition("@")
    if name not in names():
        raise UserError(f"unknown codec {name!r}: the data was written with it; install the package that has it")
    if source is None and path:
        _check_known(name, path)
    return f"{name}@{path}" if path else name


def _check_known(name: str, path: str) -> None:
    """Refuse a path or a URL that only a card names."""
    from codecssl.tokenize.backends.parts.weights import downloaded, is_url

    place = downloaded(path) if is_url(path) else Path(path)
    try:
        known = is_known(str(place)) if is_url(path) or os.path.lexists(place) else True
    except (OSError, ValueError):  # a name that no file can have
        known = False
    if not known:
        raise UserError(
            f"codec {name}: the data names its weights by {path!r}, which you have not given on this machine, or which "
            f"changed since; if you trust it, load it once by `codecssl-tokenize codecs {name}@PATH`"
        )


def check_device(device: str) -> None:
    """Raise UserError unless `device` is cpu or a GPU of this machine."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UserError(f"device {device!r}: give cpu, cuda, or cuda:1 for the second GPU")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= count:
        raise UserError(f"device {device!r}: torch finds {count} CUDA devices on this machine; give cpu")


def identify(path: Path) -> str:
    """Return the name of the codec whose weights are at `path`. Raises UserError if none is recognized."""
    known = backends()
    config = path / "config.json"
    if config.exists():
        try:
            values = dict(json.loads(config.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{config}: not a model's configuration ({error})") from error
        kind, rate = values.get("model_type"), values.get("sampling_rate") or values.get("sample_rate")
        kind = kind or ("snac" if "vq_strides" in values else None)  # the snac package writes no model_type
        for name, entry in known.items():
            if kind and entry.model_type == kind and (not entry.sample_rates or rate in entry.sample_rates):
                return name
    for name, entry in known.items():
        if path.is_dir() and entry.contains and any(path.rglob(entry.contains)):
            return name
    matching = [name for name, entry in known.items() if path.is_file() and entry.file and path.match(entry.file)]
    if matching:
        return max(matching, key=lambda name: len(known[name].file))  # the most specific pattern
    if config.exists():
        raise UserError(f"{path}: model_type {kind!r} at {rate} Hz is not a known codec; known are {', '.join(known)}")
    raise UserError(f"{path}: no codec recognised; say which with NAME@{path}, NAME one of {', '.join(known)}")


def _load_given(name: str, path: str, num_codebooks: int | None, device: str) -> Codec:
    """Load from a path given by the user ("" for the codec's own weights) and record it in `trusted_weights`."""
    codec = _load(name, path or None, num_codebooks, device)
    if path:
        remember(path)
    return codec


def _load(name: str, weights: str | None, num_codebooks: int | None, device: str) -> Codec:
    codec: Codec = importlib.import_module(backend(name).module).load(name, weights, num_codebooks, device)
    return codec
