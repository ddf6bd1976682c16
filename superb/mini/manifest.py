"""Labelled manifest from which mini-SUPERB is built, and splits of its rows by speaker or utterance."""

import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError

Splits = dict[str, list[ManifestRow]]
Shares = Mapping[str, float]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = {"ks": "kws", "keywords": "kws", "digit": "digits"}
"""Aliases of tasks in manifests."""
USED = {"asr", "pr", "sid", "asv", "kws", "digits", "env", "er", "ic", "sf"}
"""Manifest tasks that are used. The audio of other rows is not opened."""


@dataclass(frozen=True, kw_only=True)
class LabelledManifest:
    """Rows with absolute paths, by task. `dropped` counts rows left out, by reason."""

    path: Path
    rows: list[ManifestRow]
    dropped: Counter[str] = field(default_factory=Counter)

    def of(self, *tasks: str, needs: Iterable[str] = ()) -> list[ManifestRow]:
        """Return the rows of any of `tasks` with a value in every column of `needs`."""
        return [r for r in self.rows if r["tasks"] & set(tasks) and all(r.get(n) not in (None, "") for n in needs)]

    def speech(self) -> list[ManifestRow]:
        """Return English sentences of 1 to 20 s with their text in `plain`. Rows of task lid are other languages."""
        rows = [r for r in self.of("asr", "pr", needs=("text", "speaker")) if "lid" not in r["tasks"]]
        return [r for r in rows if r["plain"] and 1 <= r["seconds"] <= 20]


def read_manifest(path: Path) -> LabelledManifest:
    """Read the rows of used tasks whose audio can be opened.

    A row has path, task (comma-separated) and the columns of its tasks. Raises UserError if the file is missing, a
    line is not a JSON object with path and task, or no audio exists.
    """
    path = path / "manifest.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"manifest {path}: no such file; give a .jsonl with path, task and label columns")
    kept, dropped = [], Counter[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = _row(path, number, line)
            if row["tasks"] & USED:
                reason = _unfit(row)
                kept += [] if reason else [row]
                dropped.update([reason] if reason else [])
    if not kept:
        found = f"{dropped.most_common(1)[0][0]}, {dropped.total()} times" if dropped else "no row of a known task"
        raise UserError(f"manifest {path}: nothing to build from ({found}); tasks are {', '.join(sorted(USED))}")
    return LabelledManifest(path=path, rows=kept, dropped=dropped)


def _row(path: Path, number: int, line: str) -> ManifestRow:
    try:
        row: ManifestRow = json.loads(line)
        tasks = {NAMES.get(task.strip(), task.strip()) for task in row["task"].split(",")}
        return {**row, "path": str((path.parent / row["path"]).resolve()), "tasks": tasks}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}:{number}: not a JSON object with path and task ({error})") from error


def _unfit(row: ManifestRow) -> str | None:
    """Return the reason why a row is unusable. Fills in seconds, rate, speaker and plain text if possible."""
    import soundfile

    try:
        info = soundfile.info(row["path"])
    except (soundfile.LibsndfileError, OSError):
        return "no such file" if not Path(row["path"]).is_file() else "audio that cannot be opened"
    row["seconds"], row["rate"], row["channels"] = round(float(info.duration), 3), info.samplerate, info.channels
    row["speaker"] = str(row["speaker"]) if row.get("speaker") not in (None, "") else None
    row["plain"] = plain_text(str(row.get("text") or ""))
    return None


def plain_text(text: str) -> str:
    """Convert text to upper-case A to Z and apostrophes, as in LibriSpeech; "" if digits or other letters remain."""
    text = text.replace("\u2019", "'").replace("-", " ")
    folded = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).upper()
    kept = "".join(c for c in folded if c.isalnum() or c in "' ")
    words = [word.strip("'") for word in kept.split()]
    joined = " ".join(word for word in words if word)
    return joined if re.fullmatch("[A-Z' ]*", joined) else ""


def keyword_of(row: ManifestRow) -> str:
    """Return the word of a row's label. Digits are spelled out."""
    label = str(row.get("keyword") or row.get("label"))
    return DIGITS[int(label)] if re.fullmatch("[0-9]", label) else label


def by_speaker(rows: Sequence[ManifestRow], shares: Shares, rng: np.random.Generator) -> dict[str, str]:
    """Assign each speaker to one split.

    Speakers are taken in an order drawn by `rng`. Each is assigned to the split whose share it exceeds least, and the
    last ones to empty splits. Speakers with phones are assigned first to balance pr too.
    """
    sizes = Counter(row["speaker"] for row in rows)
    speakers = [str(speaker) for speaker in rng.permutation(sorted(sizes))]
    phoned = {row["speaker"] for row in rows if row.get("phones")}
    speakers.sort(key=lambda speaker: speaker not in phoned)
    total = {True: 0.0, False: 0.0}
    for speaker in speakers:
        total[speaker in phoned] += sizes[speaker]
    found: dict[str, str] = {}
    for group in (True, False):
        members = [speaker for speaker in speakers if (speaker in phoned) is group]
        filled = dict.fromkeys(shares, 0.0)
        for left, speaker in zip(range(len(members), 0, -1), members, strict=True):
            share = sizes[speaker] / total[group]
            empty = [split for split in shares if not filled[split]]
            found[speaker] = _least_filled(empty if left <= len(empty) else list(shares), filled, shares, share)
            filled[found[speaker]] += share
    return found


def _least_filled(splits: list[str], filled: Mapping[str, float], shares: Shares, share: float) -> str:
    return min(splits, key=lambda split: (round((filled[split] + share) / shares[split], 9), filled[split]))


def by_utterance(
    rows: Sequence[ManifestRow],
    shares: Shares,
    rng: np.random.Generator,
    labels: Callable[[ManifestRow], Iterable[Any]] | None = None,
) -> Splits:
    """Split rows in an order drawn by `rng`. With `labels`, valid and test have no labels that train lacks."""
    order = [rows[i] for i in rng.permutation(len(rows))]
    first, *others = shares
    if labels is not None:
        seen: set[Any] = set()
        news = []
        for row in order:
            if set(labels(row)) - seen:
                news.append(row)
                seen |= set(labels(row))
        order = news + [row for row in order if not any(row is new for new in news)]
    splits, taken = {}, len(rows)
    for split in reversed(others):
        count = max(1, round(shares[split] * len(rows))) if len(rows) > len(shares) else 0
        splits[split], taken = order[taken - count : taken], taken - count
    return {first: order[:taken], **{split: splits[split] for split in others}}


def grouped(rows: Iterable[ManifestRow], column: str) -> dict[str, list[ManifestRow]]:
    """Group rows by a column's value, keeping their order."""
    groups: dict[str, list[ManifestRow]] = defaultdict(list)
    for row in rows:
        groups[str(row[column])].append(row)
    return dict(groups)


def pick(rows: Sequence[Any], count: int, rng: np.random.Generator) -> list[Any]:
    """Sample at most `count` rows, keeping their order."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in sorted(rng.permutation(len(rows))[:count])]
