"""Lazy access to encoded or decoded audio in rows of Arrow tables."""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError, one_line
from codecssl.tokenize.sources.open_audio import Held, open_file


@lru_cache(maxsize=16)
def mapped(file: str) -> pa.Table:
    """Memory-map an Arrow file."""
    return pa.ipc.open_stream(pa.memory_map(file)).read_all()


def open_row(file: str, column: str, row: int, name: str) -> BinaryIO:
    """Open the audio of one row of an Arrow file. Raises UserError if there is none."""
    try:
        value = mapped(file).column(column)[row]
    except (OSError, KeyError, IndexError, pa.ArrowException) as error:
        raise UserError(f"cannot read row {row} of {file}: {one_line(error)}") from error
    content = content_of(value)
    if isinstance(content, bytes):
        return Held(content, name)
    return open_url(content, name) if "://" in content else open_file(content, name)


def open_url(url: str, name: str) -> BinaryIO:
    """Download a file of a remote dataset or inside an archive (`zip://a.wav::x.zip`). Raises UserError on failure."""
    from datasets.utils.file_utils import xopen

    try:
        with xopen(url, "rb") as file:
            return Held(file.read(), name)
    except Exception as error:  # each file system has its own exceptions
        raise UserError(f"cannot read {url}: {one_line(error)}") from error


def content_of(value: pa.Scalar) -> bytes | str:
    """Return encoded audio or the path of an audio file. Raises UserError for other values."""
    if not value.is_valid:
        raise UserError("this row has no audio")
    if not pa.types.is_struct(value.type):
        content = value.as_py()
        if isinstance(content, (bytes, str)):
            return content
        raise UserError(f"audio of type {value.type}: must be bytes, a path, or an array with its sampling_rate")
    fields = {name for name in value.type.names if value[name].is_valid}
    if "bytes" in fields:
        return bytes(value["bytes"].as_py())
    if {"array", "sampling_rate"} <= fields:
        return wav_bytes(_samples(value["array"]), value["sampling_rate"].as_py())
    if "path" in fields:
        return str(value["path"].as_py())
    raise UserError(f"this row has no audio: it holds {', '.join(sorted(fields)) or 'nothing'}")


def _samples(array: pa.Scalar) -> NDArray[Any]:
    """Convert a list to samples [n], or nested lists to [n, C]; `datasets` stores channels first."""
    if not is_list(array.values.type):
        return array.values.to_numpy(zero_copy_only=False)
    rows = [row.values.to_numpy(zero_copy_only=False) for row in array.values]
    if len({len(row) for row in rows}) > 1:
        raise UserError("array with channels of unlike lengths")
    stacked = np.stack(rows) if rows else np.zeros((0, 1))
    return stacked.T if len(stacked) < stacked.shape[1] else stacked


def wav_bytes(samples: NDArray[Any], sample_rate: int) -> bytes:
    """Encode samples [n] or [n, C], floats or 16- or 32-bit integers, as WAV.

    libsndfile is not used because its files contain the time of day. Raises UserError for other integers, whose
    full scale is unknown.
    """
    if samples.dtype.kind == "f":
        samples, code = samples.astype("<f4"), 3  # WAVE_FORMAT_IEEE_FLOAT
    elif samples.dtype in (np.int16, np.int32):
        samples, code = samples.astype(f"<i{samples.dtype.itemsize}"), 1
    else:
        raise UserError(f"array of {samples.dtype}: must be float, int16 or int32")
    channels, width = 1 if samples.ndim == 1 else samples.shape[1], samples.dtype.itemsize
    data = np.ascontiguousarray(samples).tobytes()
    if len(data) >= 1 << 32:
        raise UserError(f"array of {len(samples)} samples: above the 4 GB of a .wav; store it as encoded audio")
    frame = channels * width
    form = struct.pack("<HHIIHH", code, channels, int(sample_rate), int(sample_rate) * frame, frame, 8 * width)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


# ---------------------------------------------------------------- columns


def is_list(type: pa.DataType) -> bool:
    """True for list types of variable or fixed length."""
    return pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)


def sizes_of(audio: Any) -> list[int | None]:
    """Return the size of each row from the offsets alone: bytes of encoded audio, or samples of an array."""
    found = next((p for p in (_part(audio, "bytes"), _part(audio, "array")) if p is not None), audio)
    if pa.types.is_binary(found.type) or pa.types.is_large_binary(found.type):
        return pc.binary_length(found).to_pylist()
    return pc.list_value_length(found).to_pylist() if is_list(found.type) else [None] * len(found)


def paths_of(audio: Any, root: Path) -> list[str]:
    """Return the names of the rows' audio files, relative to the dataset's folder if inside it."""
    found = _part(audio, "path")
    if found is None:
        is_text = pa.types.is_string(audio.type) or pa.types.is_large_string(audio.type)
        found = audio if is_text else pa.nulls(len(audio), pa.string())
    return [_relative(path, root) if path else "" for path in found.to_pylist()]


def _relative(path: str, root: Path) -> str:
    if "://" in path:
        return path.partition("::")[0].rpartition("/")[2]
    if not Path(path).is_absolute():
        return path
    root = root.absolute()
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else Path(path).name


def _part(audio: Any, name: str) -> Any:
    """Return a field of a struct column as an array; None if there is no such field."""
    if not pa.types.is_struct(audio.type) or audio.type.get_field_index(name) < 0:
        return None
    return pc.struct_field(audio, name)
