"""Result rows on disk: one file per finished run, appearing whole, and results.jsonl made of them."""

import json
from pathlib import Path
from typing import Any

from codecssl.superb.rows import ResultRow
from codecssl.tokenize.common.files import write_atomic

FOLDERS = {"runs": "runs/*/*/*", "probes": "probes/*/*"}
"""Folders of rows: runs/UPSTREAM/TASK/NAME and probes/NAME/DIGEST. Other processes create and delete files below these
while they train, so a search of all folders (**) may fail.
"""


def write_json(path: Path, value: Any) -> None:
    """Write by rename: a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a file of `write_json`; None if it does not exist."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_rows(output: Path, *kinds: str) -> list[ResultRow]:
    """Rows of finished results under `output`, by name. kinds: runs, probes, or both."""
    found = (path for kind in kinds or FOLDERS for path in output.glob(f"{FOLDERS[kind]}/result.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(found)]


def publish(output: Path) -> list[ResultRow]:
    """Write results.jsonl from all that finished; safe while other processes finish theirs."""
    rows = read_rows(output)
    write_text(output / "results.jsonl", "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    return rows


def write_text(path: Path, text: str) -> None:
    """Write by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode(errors="backslashreplace"))
