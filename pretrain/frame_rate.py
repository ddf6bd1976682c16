"""Conversion of the lengths in a config from seconds to frames of the data's codec.

A config states lengths in seconds, which suit codecs of any frame rate. The code works in frames. A length that the
config states in frames (`data.crop_frames` above 0, for example) is used as it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from codecssl.pretrain.config import RunConfig

IN_FRAMES = (
    *(f"data.{key}_frames" for key in ("crop", "min", "batch", "valid")),
    *("mask.span_frames", "mask.start_probability"),
)
"""Settings that `at_frame_rate` derives."""
IN_SECONDS = (
    *(f"data.{key}_seconds" for key in ("crop", "min", "batch", "valid")),
    *("mask.span_seconds", "mask.starts_per_second"),
)
"""The settings from which they are derived."""


def at_frame_rate(config: RunConfig, rate: Fraction | float) -> RunConfig:
    """Return the config with every length in frames, for a codec of `rate` frames per second.

    Lengths in seconds become those of the rounded frames. Two configs of equal frames are therefore equal, and the
    result is the same if it is converted again. Raises UserError for lengths that do not fit each other.
    """
    hz = float(rate)
    span = _frames("span", config.mask, hz)
    start = config.mask.start_probability or min(1.0, config.mask.starts_per_second / hz)
    lengths = {key: _frames(key, config.data, hz) for key in ("crop", "min", "batch", "valid")}
    if not config.data.min_frames:  # rounded at a low rate, two spans may be longer
        lengths["min"] = max(lengths["min"], 2 * span)
    data: dict[str, Any] = {f"{key}_frames": frames for key, frames in lengths.items()}
    data |= {f"{key}_seconds": frames / hz for key, frames in lengths.items()}
    mask = replace(
        config.mask,
        span_frames=span,
        span_seconds=span / hz,
        start_probability=start,
        starts_per_second=start * hz,
    )
    return replace(config, data=replace(config.data, **data), mask=mask)


def frames_replaced(overrides: Sequence[str]) -> list[str]:
    """Complete command line overrides: a length in seconds replaces one in frames that the config file states."""
    given = {word.partition("=")[0].removeprefix("--") for word in overrides}
    pairs = zip(IN_SECONDS, IN_FRAMES, strict=True)
    cleared = [frames for seconds, frames in pairs if seconds in given and frames not in given]
    return [*overrides, *(f"--{frames}=0" for frames in cleared)]


def _frames(key: str, config: Any, hz: float) -> int:
    """Return a length in frames, at least 1."""
    frames: int = getattr(config, f"{key}_frames") or max(1, round(getattr(config, f"{key}_seconds") * hz))
    return frames
