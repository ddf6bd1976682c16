"""Read inputs from manifests (tables, JSON rows, Kaldi's and fairseq's files, lists) and from standard input."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import atomic_file
from codecssl.tokenize.sources.columns import PATHS, Rows, first_of, from_lhotse, segment_of, with_segments
from codecssl.tokenize.sources.inputs import MOST_DEPTH, Input, Seen, as_label, in_utf8

TABLES = (".tsv", ".csv", ".jsonl")
"""Suffixes of tables with named columns. They are suggested where a folder without audio holds such files."""
LISTS = (".txt", ".lst", ".list")
"""Suffixes of lists with one path per line."""
MANIFESTS = (*TABLES, ".jsonl.gz", ".json", ".scp", *LISTS)
"""Suffixes of all manifests. `read_manifest` has a branch for each."""


def read_manifest(manifest: Path) -> Iterator[Input]:
    """Yield inputs of a table with the columns path, [id, start, end] and labels. Paths are relative to its folder.

    The text is UTF-8 with or without a byte-order mark and with any line ends. A .jsonl may begin with
    {"root": FOLDER}, which replaces the table's folder. Other supported formats are NeMo's .json and .jsonl.gz (rows of
    JSON), Lhotse's MonoCuts and recordings, lists of paths (.txt, .lst, .list), Kaldi's wav.scp without pipes and the
    segments, utt2spk and text next to it, fairseq's .tsv with its root line, and Common Voice's .tsv next to clips/.
    Raises UserError for another suffix, and naming the line for an invalid one.
    """
    name, root = manifest.name.lower(), manifest.parent
    if name.endswith((".jsonl", ".jsonl.gz", ".json")):
        return _inputs(_json_rows(manifest), str(manifest), root)
    if name.endswith(".scp"):
        return _inputs(with_segments(manifest, _kaldi_rows(manifest)), str(manifest), root)
    if name.endswith(LISTS):
        return _inputs(_list_rows(manifest), str(manifest), root)
    if name.endswith(".tsv") and (folder := _fairseq_root(manifest)) is not None:
        return _inputs(_fairseq_rows(manifest), str(manifest), root / folder)
    if name.endswith((".tsv", ".csv")):
        return _inputs(_table_rows(manifest), str(manifest), root, clips=True)
    raise UserError(f"{manifest}: not a manifest by its name; it must end in one of {' '.join(MANIFESTS)}")


def read_list(stream: BinaryIO, name: str = "standard input") -> Iterator[Input]:
    """Yield inputs of a list with a path or a JSON row per line. Paths are relative to the working folder."""
    return _inputs(_listed(stream, name), name, Path())


def read_rows(manifest: Path, *columns: str) -> list[dict[str, Any]]:
    """Read the rows of a .jsonl manifest unchanged. Raises UserError naming an invalid line or a missing column."""
    if not manifest.is_file():
        raise UserError(f"manifest {manifest}: no such file; give a .jsonl with the columns {', '.join(columns)}")
    rows = []
    for number, row in _json_rows(manifest):
        if lacking := [column for column in columns if column not in row]:
            raise UserError(f"{manifest}, line {number}: no column {lacking[0]}; a row needs {', '.join(columns)}")
        rows.append(row)
    return rows


def spool_stdin(stream: BinaryIO, target: Path) -> str:
    """Copy a list on `stream` durably to the .jsonl manifest `target`, which a run reads again, and return its name.

    If `target` exists, an empty stream (or a terminal) means the same list again. Raises UserError for a different
    list, an empty one, and a line that is neither a path nor a row.
    """
    if target.exists() and stream.isatty():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        with atomic_file(target) as file:
            if not _spool(stream, file):
                what = "standard input: no paths; write one per line, or JSON rows with path, [id, start, end]"
                raise UserError(what)
        return str(target)
    with TemporaryFile(dir=target.parent, prefix=".", suffix=".tmp") as again, target.open("rb") as before:
        count = _spool(stream, again)
        again.seek(0)
        same = all(a == b for a, b in zip_longest(_chunks(again), _chunks(before)))
    if count and not same:
        raise UserError(
            f"standard input: another list, or from another folder, than {target} was begun with; give another --output"
        )
    return str(target)


def _spool(stream: BinaryIO, file: BinaryIO) -> int:
    """Write a list as JSON rows. Return their number."""
    count = 0
    file.write(json.dumps({"root": str(Path.cwd())}).encode() + b"\n")
    for _, row in _listed(stream, "standard input"):
        file.write(json.dumps(row).encode() + b"\n")  # ASCII keeps names that are not UTF-8 as escapes
        count += 1
    return count


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(1 << 20):
        yield chunk


# ---------------------------------------------------------------- rows


def _listed(stream: BinaryIO, name: str) -> Rows:
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
        if text.lstrip().startswith("{"):
            yield number, _json_row(name, number, text)
        elif text.strip():
            yield number, {"path": text}


def _list_rows(manifest: Path) -> Rows:
    with manifest.open("rb") as file:
        if b"\0" in file.read(4096):
            raise UserError(f"{manifest}: not a text file; a list has one path per line")
        file.seek(0)
        yield from _listed(file, str(manifest))


def _kaldi_rows(manifest: Path) -> Rows:
    """Read the lines `ID PATH` of a wav.scp."""
    for number, row in _list_rows(manifest):
        id, _, path = str(row.get("path", "")).strip().partition(" ")
        if path.rstrip().endswith("|"):
            raise UserError(
                f"{manifest}, line {number}: a command ({path[:60]}), and commands are not run; write its output to "
                "files, or give their paths with start, end and channel columns"
            )
        if not path:
            raise UserError(f"{manifest}, line {number}: must be an id and a path")
        yield number, {"id": id, "path": path.strip()}


def _fairseq_root(manifest: Path) -> str | None:
    """Return the folder in the first line of a fairseq .tsv. Its other lines are a path and a number of samples."""
    with manifest.open("rb") as file:
        first, second = file.readline(4096), file.readline(4096)
    fields = second.rstrip(b"\r\n").split(b"\t")
    if b"\t" in first or len(fields) != 2 or not fields[1].isdigit():
        return None
    return first.decode("utf-8", "surrogateescape").strip()


def _fairseq_rows(manifest: Path) -> Rows:
    with manifest.open("rb") as file:
        for number, line in enumerate(file, 1):
            path, _, samples = line.decode("utf-8", "surrogateescape").rstrip("\r\n").partition("\t")
            if number > 1 and path:
                is_count = samples.isdecimal() and len(samples) < 20
                yield number, {"path": path, "samples": int(samples) if is_count else samples}


def _json_rows(manifest: Path) -> Rows:
    opener = gzip.open if manifest.name.lower().endswith(".gz") else open
    with opener(manifest, "rt", encoding="utf-8-sig") as file:
        for number, line in enumerate(_decoded(file, manifest), 1):
            if line.strip():
                yield number, _json_row(str(manifest), number, line)


def _json_row(name: str, number: int, line: str) -> dict[str, Any]:
    where = f"{name}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg})") from error
    except ValueError as error:
        raise UserError(f"{where}: a number of more than {sys.get_int_max_str_digits()} digits; shorten it") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deep; a label may have {MOST_DEPTH} levels") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, this is {type(row).__name__}")
    return from_lhotse(where, row)


def _table_rows(manifest: Path) -> Rows:
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        lines = _decoded(file, manifest)
        if manifest.suffix.lower() == ".csv":
            reader = csv.DictReader(lines)
        else:  # a quotation mark is text in a TSV; otherwise one at the start of a transcript would join lines
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            for row in reader:
                if None in row or None in row.values():
                    where = f"{manifest}, line {reader.line_num}"
                    raise UserError(f"{where}: the number of fields differs from the header")
                yield reader.line_num, dict(row)
        except csv.Error as error:
            raise UserError(f"{manifest}, line {reader.line_num + 1}: {error}") from error


def _decoded(lines: Iterator[str], manifest: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise UserError(f"{manifest}: not UTF-8 ({error.reason} at byte {error.start}); convert it") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{manifest}: not a whole gzip file ({error}); make or copy it again") from error


# ---------------------------------------------------------------- inputs


def _inputs(rows: Rows, name: str, root: Path, *, clips: bool = False) -> Iterator[Input]:
    """Yield the inputs of `rows`. With `clips`, paths may be relative to clips/ next to the table (Common Voice)."""
    seen, first = Seen(), True
    for number, row in rows:
        if clips and first and (column := first_of(row, PATHS)) and not (root / str(row[column])).exists():
            root = root / "clips" if (root / "clips" / str(row[column])).exists() else root
        first = False
        where = f"{name}, line {number}"
        if number == 1 and list(row) == ["root"]:
            root = root / str(row["root"])
            continue
        item = _input(where, row, root)
        if not seen.add(item.id):
            raise UserError(f"{where}: id {item.id!r} is there twice; ids must be unique")
        yield item


def _input(where: str, row: dict[str, Any], root: Path) -> Input:
    if not (column := first_of(row, PATHS)):
        raise UserError(f"{where}: no 'path' column; the columns are {', '.join(row)}")
    path = str(row[column])
    segment, used = segment_of(where, row)
    start, end, channel = segment["start"], segment["end"], segment["channel"]
    suffix = "" if start is None and end is None else f"#{start or 0:.15g}-{'' if end is None else f'{end:.15g}'}"
    suffix += "" if channel is None else f"@{channel}"
    id = row.get("id")
    try:
        labels = {k: as_label(v) for k, v in row.items() if k not in ("id", column) and k not in used}
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return Input(
        id=in_utf8(path + suffix if id in (None, "") else str(id)),
        path=in_utf8(path),
        file=str(root / path),
        labels=labels,
        **segment,
    )
