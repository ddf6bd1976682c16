"""Fluent Speech Commands as rows, for ic."""

import csv

from codecssl.superb.corpora.place import Place, check_files, make_row
from codecssl.superb.rows import ManifestRow

SLOTS = ("action", "object", "location")


def ic_rows(place: Place) -> list[ManifestRow]:
    """Fluent Speech Commands: `slots` (action, object, location), `text` and `speaker`; its own three lists."""
    corpus = place.corpus("Fluent Speech Commands", ("fluent_speech_commands_dataset",), ("wavs", "data"))
    rows = []
    for split in ("train", "valid", "test"):
        source = "the corpus's archive (folder data)"
        listed = place.file((f"data/{split}_data.csv",), source, corpus)
        with listed.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        check_files((corpus / line["path"] for line in lines), listed)
        for line in lines:
            path, slots = corpus / line["path"], {slot: line[slot] for slot in SLOTS}
            columns = {"speaker": line["speakerId"], "text": line["transcription"], "slots": slots}
            rows.append(make_row("ic", split, path, id=path.stem, **columns))
    return rows
