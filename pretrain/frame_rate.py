"""Conversion of the lengths in a config from seconds to frames of the data's codec.

A config states lengths in seconds, which suit codecs of any frame rate. The code works in frames. A length that the
config states in frames (`data.crop_frames` above 0, for example) is used as it is.
"""

from dataclasses import replace
from fractions import Fraction
from typing import Any

from codecssl.pretrain.config import DataConfig, MaskConfig, RunConfig
from codecssl.tokenize.common.errors import UserError

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

_DEFAULTS: dict[str, Any] = {"data": DataConfig(), "mask": MaskConfig()}


def at_frame_rate(config: RunConfig, rate: Fraction | float) -> RunConfig:
    """Return the config with every length in frames, for a codec of `rate` frames per second.

    Lengths in seconds become those of the rounded frames. Two configs of equal frames are therefore equal, and the
    result is the same if it is converted again. Raises UserError if a length is stated in seconds and, differently, in
    frames, and for lengths that do not fit each other.
    """
    hz = float(rate)
    span = _frames("mask", "span", config.mask, hz)
    start = config.mask.start_probability or min(1.0, config.mask.starts_per_second / hz)
    _no_contradiction("mask", config.mask, "start_probability", start, "starts_per_second", start * hz)
    lengths = {key: _frames("data", key, config.data, hz) for key in ("crop", "min", "batch", "valid")}
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


def _frames(section: str, key: str, config: Any, hz: float) -> int:
    """Return a length in frames, at least 1."""
    seconds: float = getattr(config, f"{key}_seconds")
    frames: int = getattr(config, f"{key}_frames") or max(1, round(seconds * hz))
    _no_contradiction(section, config, f"{key}_frames", frames, f"{key}_seconds", frames / hz)
    return frames


def _no_contradiction(section: str, config: Any, key: str, value: float, other: str, implied: float) -> None:
    """Raise UserError if `key` is given, and `other` was changed to something that is not `implied` by it."""
    stated: float = getattr(config, other)
    if not getattr(config, key) or stated == getattr(_DEFAULTS[section], other):
        return
    if abs(stated - implied) > 1e-6 * implied:
        raise UserError(
            f"{section}.{key}: {value:g}, which at the data's frame rate is {section}.{other} {implied:g}, but"
            f" {section}.{other} is {stated:g}; give one of the two"
        )
