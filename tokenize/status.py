"""`codecssl-tokenize status`: how far a run is, read from its files while it runs or after it died."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.errors import UserError
from codecssl.tokenize.shards import load_json


def status(root: Path) -> dict[str, Any]:
    """Counts over finished shards and over the finished blocks of the others. Raises UserError for another folder."""
    if not (root / "plan.json").exists() and not (root / "dataset.json").exists():
        raise UserError(f"{root}: no plan.json; no `codecssl-tokenize run` wrote here")
    plan = load_json(root / "plan.json") if (root / "plan.json").exists() else load_json(root / "dataset.json")
    card = CodecCard.from_dict(plan["codec"])
    marks = [load_json(path) for path in sorted((root / "shards").glob("*.json"))]
    parts = [load_json(path) for path in sorted((root / "work").glob("*/*.json"))]
    newest = max((f.stat().st_mtime for f in root.rglob("*.json")), default=time.time())
    samples = sum(row["samples"] for row in marks + parts)
    return {
        "finished": (root / "dataset.json").exists(),
        "shards": len(marks),
        "blocks": len(parts),
        "inputs": sum(row["inputs"] for row in marks + parts),
        "failed": sum(len(row["failed"]) for row in marks + parts),
        "hours": samples / card.sample_rate / 3600,
        "age_seconds": max(0.0, time.time() - newest),
    }
