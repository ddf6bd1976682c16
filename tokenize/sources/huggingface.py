"""Read Hugging Face `datasets`: rows with encoded or decoded audio, without torchcodec or ffmpeg.

A dataset on disk is a few memory-mapped Arrow files. The main process lists rows without reading their audio. The
process that encodes a row maps the same file, without `datasets`, and reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from codecssl.tokenize.common.errors import UserError, one_line
from codecssl.tokenize.sources.arrow_audio import content_of, is_list, mapped, paths_of, sizes_of
from codecssl.tokenize.sources.columns import ENDS, STARTS, segment_of
from codecssl.tokenize.sources.inputs import Input, Seen, as_label, in_utf8, split_options

OPTIONS = ("audio", "id", "labels", "revision")
AUDIO_COLUMNS = ("audio", "file", "path", "speech", "wav", "flac", "mp3")
"""Column names tried in this order if no column has the type Audio."""
ID_COLUMNS = ("id", "utt_id", "utterance_id", "segment_id")
LABEL_ITEMS = 1000
"""Maximum length of a list label. Longer lists are features and are left out."""
BATCH_ROWS = 32
"""Number of rows of a stream held in memory with their audio."""

USAGE = "write hf:NAME[:CONFIG]:SPLIT, with [?audio=COLUMN&id=COLUMN&labels=A,B&revision=R] where needed"


# ---------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """The parts of `hf:NAME[:CONFIG]:SPLIT?OPTIONS`."""

    source: str
    stream: bool
    name: str
    config: str | None
    split: str
    options: dict[str, str]


def parse(source: str) -> Request:
    """Parse a source. Raises UserError if it is malformed."""
    spec, options = split_options(source, OPTIONS)
    kind, *parts = re.split(r":(?![^\[]*\])", spec)  # not the colon of train[:10%]
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"source {source!r}: {USAGE}")
    return Request(source, kind == "hf-stream", parts[0], parts[1] if len(parts) == 3 else None, parts[-1], options)


def read_hf(source: str, skip: int = 0) -> Iterator[Input]:
    """Yield inputs of `hf:NAME[:CONFIG]:SPLIT` or `hf-stream:...` except the first `skip`.

    Columns that select a segment or a channel are honoured as in manifests, unless `labels` names them. NAME is a
    dataset of the hub, a folder that `datasets` can load, or one written by `save_to_disk`. Ids come from an
    id column, or are row numbers. Raises UserError, also for a duplicate id.
    """
    request = parse(source)
    dataset = _load(request)
    columns = _choose(request, dataset.features)
    seen, row = Seen(), skip
    for batch in _batches(request, dataset, columns, skip):
        for item in _inputs(request, columns, batch, row):
            if not seen.add(item.id):
                raise UserError(
                    f"source {source!r}: row {row}: id {item.id!r} is there twice; name another column with "
                    "?id=COLUMN, or count rows with ?id="
                )
            yield item
            row += 1
    if not row:
        raise UserError(f"source {source!r}: no rows")


# ---------------------------------------------------------------- loading


def _load(request: Request) -> Any:
    """Load a Dataset, or an IterableDataset with known features."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"source {request.source!r}: needs `pip install datasets` ({error})") from error
    _spare_torchcodec(datasets.Audio)
    folder = Path(request.name)
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            dataset = _load_saved(datasets, request, folder)
        else:
            dataset = datasets.load_dataset(
                request.name,
                request.config,
                split=request.split,
                streaming=request.stream,
                revision=request.options.get("revision"),
            )
        if dataset.features is None:
            dataset = dataset._resolve_features()  # a JSON stream: from its first rows
        return dataset
    except UserError:
        raise
    except Exception as error:  # loaders may raise anything; reported in one line
        raise UserError(f"source {request.source!r}: cannot be loaded: {one_line(error)}") from error


def _load_saved(datasets: Any, request: Request, folder: Path) -> Any:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        if request.split not in splits:
            raise UserError(f"source {request.source!r}: no split {request.split!r}; there are {', '.join(splits)}")
        folder = folder / request.split
    dataset = datasets.load_from_disk(str(folder))
    if dataset.split is not None and request.split != str(dataset.split):
        raise UserError(f"source {request.source!r}: no split {request.split!r}; it is {dataset.split}")
    return dataset.to_iterable_dataset() if request.stream else dataset


def _spare_torchcodec(audio: Any) -> None:
    """Avoid torchcodec, which needs ffmpeg's libraries. datasets 4 and 5 import it even to store a path or bytes."""
    if hasattr(audio, "spared"):
        return
    original = audio.encode_example

    def encode_example(self: Any, value: Any) -> Any:
        if isinstance(value, (str, Path)):
            return {"bytes": None, "path": str(value)}
        if isinstance(value, dict) and "array" not in value and not str(value.get("path")).endswith("pcm"):
            return {"bytes": value.get("bytes"), "path": value.get("path")}
        return original(self, value)

    audio.encode_example, audio.spared = encode_example, True


# ---------------------------------------------------------------- columns


@dataclass(frozen=True)
class Columns:
    """Roles of the columns, and the features of the labels."""

    audio: str
    id: str | None
    labels: dict[str, Any]
    segment: tuple[str, ...] = ()
    """Columns that may select a segment or a channel, under the names of manifests."""

    @property
    def used(self) -> list[str]:
        return list(dict.fromkeys([self.audio, *([self.id] if self.id else []), *self.labels, *self.segment]))


def _choose(request: Request, features: Any) -> Columns:
    names, options = list(features), request.options

    def known(option: str, name: str) -> str:
        if name in names:
            return name
        raise UserError(f"source {request.source!r}: {option} {name!r}: the columns are {', '.join(names)}")

    audio = known("audio", options["audio"]) if "audio" in options else _find_audio(request, features)
    id = next((name for name in ID_COLUMNS if name in names), None)
    if "id" in options:
        id = known("id", options["id"]) if options["id"] else None
    if "labels" in options:
        chosen = [known("labels", name) for name in options["labels"].split(",") if name]
    else:
        chosen = [name for name in names if name not in (audio, id)]
    types = {name: features.arrow_schema.field(name).type for name in names}
    segment = [name for name in (*STARTS, *ENDS, "duration", "channel") if name in names and name not in (audio, id)]
    segment = [name for name in segment if "labels" not in options or name not in chosen]  # named there: a label
    labels = {name: features[name] for name in chosen if _is_label(types[name])}
    return Columns(audio, id, labels, tuple(name for name in segment if _is_label(types[name])))


def _find_audio(request: Request, features: Any) -> str:
    typed = [name for name, feature in features.items() if _is_audio(feature)]
    if len(typed) == 1:
        return typed[0]
    named = [name for name in AUDIO_COLUMNS if name in (typed or features)]
    if named and (not typed or named[0] == "audio"):
        return named[0]
    what = "several columns of audio" if typed else "no column of audio"
    among = ", ".join(typed or features)
    raise UserError(f"source {request.source!r}: {what}; choose with ?audio=COLUMN among {among}")


def _is_audio(feature: Any) -> bool:
    return type(feature).__name__ == "Audio"


def _is_label(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return all(_is_label(type.field(i).type) for i in range(type.num_fields))
    if is_list(type):
        return _is_label(type.value_type)
    return pa.types.is_primitive(type) or pa.types.is_string(type) or pa.types.is_large_string(type)


def _named(feature: Any, value: Any) -> Any:
    """Replace the integers of a ClassLabel in `value` with their names."""
    if value is None:
        return None
    if hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None  # -1 is an unknown label
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _named(feature.get(key), v) for key, v in value.items()}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_named(inner, v) for v in value]
    return value


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class RowBatch:
    """Rows and their location: from row `first` of `file`, or "" if only in memory."""

    table: Any
    file: str = ""
    first: int = 0


def _batches(request: Request, dataset: Any, columns: Columns, skip: int) -> Iterator[RowBatch]:
    files = [] if request.stream else _arrow_files(dataset, columns)
    for file in files:
        first = 0
        for batch in mapped(file).to_batches(max_chunksize=1000):
            yield RowBatch(batch, file, first)
            first += len(batch)
    if files:
        return
    names = columns.used
    schema = pa.schema([dataset.features.arrow_schema.field(name) for name in names])
    rows = iter(_undecoded(dataset.skip(skip) if skip else dataset, columns))
    while True:
        try:
            some = list(islice(rows, BATCH_ROWS))
        except Exception as error:  # of the network or the loader
            raise UserError(
                f"source {request.source!r}: reading stopped: {one_line(error)}; run the same command again"
            ) from error
        if not some:
            return
        yield RowBatch(pa.Table.from_pylist(some, schema=schema))


def _undecoded(dataset: Any, columns: Columns) -> Any:
    """Yield rows as dicts. With tables, datasets guesses types per row, and a missing label breaks the stream."""
    dataset = dataset.select_columns(columns.used)
    feature = dataset.features[columns.audio]
    return dataset.cast_column(columns.audio, type(feature)(decode=False)) if _is_audio(feature) else dataset


def _arrow_files(dataset: Any, columns: Columns) -> list[str]:
    """Return the files that hold the dataset's rows, in order. Empty for a slice, a selection or data in memory."""
    files = [entry["filename"] for entry in dataset.cache_files]
    whole = files and sum(len(mapped(file)) for file in files) == len(dataset)
    return files if whole and all(set(columns.used) <= set(mapped(file).column_names) for file in files) else []


def _inputs(request: Request, columns: Columns, batch: RowBatch, number: int) -> Iterator[Input]:
    """Yield the inputs of a batch. `number` is the index of its first row in the split."""
    table, count = batch.table, len(batch.table)
    labels = {name: _values(feature, table.column(name)) for name, feature in columns.labels.items()}
    ids = table.column(columns.id).to_pylist() if columns.id else [None] * count
    audio = table.column(columns.audio)
    sizes, paths = sizes_of(audio), paths_of(audio, Path(request.name))
    segments = {name: table.column(name).to_pylist() for name in columns.segment}
    for i in range(count):
        where = f"source {request.source!r}, row {number + i}"
        place = {name: values[i] for name, values in segments.items()}
        try:
            segment, used = segment_of(where, place)
        except UserError as error:
            others = ",".join(name for name in columns.labels if name not in columns.segment)
            raise UserError(f"{error}; with ?labels={others or 'NAME'},... such a column is a label") from error
        id = f"{number + i:08d}" if ids[i] in (None, "") else in_utf8(str(ids[i]))
        selecting = {name for name in place if name in used or place[name] is None}
        common: dict[str, Any] = {
            "id": id,
            "path": paths[i] or f"{number + i:08d}",
            "labels": {name: values[i] for name, values in labels.items() if name not in selecting},
            "size": sizes[i],
            **segment,
        }
        if batch.file:
            yield Input(**common, file=batch.file, row=batch.first + i, column=columns.audio)
        else:
            yield _carrying(audio[i], common)


def _carrying(value: pa.Scalar, common: dict[str, Any]) -> Input:
    """Build an input that holds its audio, if it cannot be read again, or names the audio file."""
    try:
        content = content_of(value)
    except UserError as error:
        return Input(**common, file="", problem=str(error))
    return Input(**common, file="", data=content) if isinstance(content, bytes) else Input(**common, file=content)


def _values(feature: Any, column: Any) -> list[Any]:
    if is_list(column.type):
        kept = [v.as_py() if v.is_valid and len(v.values) <= LABEL_ITEMS else None for v in column]
    else:
        kept = column.to_pylist()
    return [as_label(_named(feature, value)) for value in kept]
