"""Fluent Speech Commands as rows, for ic."""

import csv
import io
from pathlib import Path

from codecssl.superb.corpora.place import Place, check_files, guarded, make_row, read_text
from codecssl.superb.rows import ManifestRow

SLOTS = ("action", "object", "location")
COLUMNS = ("path", "speakerId", "transcription", *SLOTS)


def ic_rows(place: Place) -> list[ManifestRow]:
    """Fluent Speech Commands: `slots` (action, object, location), `text` and `speaker`; its own three lists."""
    corpus = place.corpus("Fluent Speech Commands", ("fluent_speech_commands_dataset",), ("wavs", "data"))
    rows = []
    for split in ("train", "valid", "test"):
        source = "the corpus's archive (folder data)"
        listed = place.file((f"data/{split}_data.csv",), source, corpus)
        lines = _table(listed)
        check_files((corpus / line["path"] for line in lines), listed)
        for line in lines:
            path, slots = corpus / line["path"], {slot: line[slot] for slot in SLOTS}
            columns = {"speaker": line["speakerId"], "text": line["transcription"], "slots": slots}
            rows.append(make_row("ic", split, path, id=path.stem, **columns))
    return rows


def _table(listed: Path) -> list[dict[str, str]]:
    """Rows of a list, whose columns are separated by commas, or by semicolons as some spreadsheets write them."""
    text = read_text(listed)
    header = text.split("\n", 1)[0]
    reader, rows = csv.reader(io.StringIO(text, newline=""), delimiter=";" if ";" in header else ","), []
    names = next(reader, [])
    with guarded(f"{listed}:1", header, f"a header with {', '.join(COLUMNS)}"):
        if missing := [name for name in COLUMNS if name not in names]:
            raise ValueError(f"{missing[0]} is missing")
    for fields in reader:
        if fields:
            with guarded(f"{listed}:{reader.line_num}", ", ".join(fields), f"a row of {len(names)} columns"):
                row = dict(zip(names, fields, strict=True))
                if empty := [name for name in COLUMNS if not row[name].strip()]:
                    raise ValueError(f"{empty[0]} is empty")
                rows.append(row)
    return rows
