"""Fields of a `CodecCard` that most codecs fill in the same way."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch


def policies(
    chunk: str,
    device: str,
    *,
    channels: str = "mean",
    padding: str = "zeros to a whole frame",
    precision: str = "float32",
    **more: str,
) -> dict[str, str]:
    """Return `CodecCard.policies`. The texts are part of a card's fingerprint: do not reword them.

    chunk: how a wave is cut. device: a torch device name; only its type is kept. more: policies specific to this codec.
    """
    return {
        "channels": channels,
        "resample": "soxr HQ, whole file",
        "padding": padding,
        "chunk": chunk,
        "precision": precision,
        **more,
        "device": torch.device(device).type,
    }


def versions(*libraries: str) -> dict[str, str]:
    """Return `CodecCard.versions` of the installed libraries."""
    found = {}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
