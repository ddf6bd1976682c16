"""`codecssl-tokenize verify`: checks that every byte of a dataset is as written, and every input is accounted for.

Each tar has its sha256 and each block its crc32. The other files only repeat data of the shards and are compared with
them while these are read. Everything is read once, in bounded memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.layout import FORMAT, FORMAT_VERSION, load_json, read_header, shard_path
from codecssl.tokenize.format.validate import check_header, check_plan
from codecssl.tokenize.integrity.index_check import SUMS, SideFiles
from codecssl.tokenize.integrity.shard_check import Damage, check_shard, read_document
from codecssl.tokenize.sources.sources import read_source

__all__ = ["Damage", "Findings", "examine"]

OWN = ("format", "format_version", "sha256", "totals")
"""Fields of dataset.json in addition to the plan."""

MOST_MISSING = 10_000
"""Maximum number of missing shards; each one is reported."""

STDIN = "stdin.jsonl"
MADE = ("codec", "sources", "compression", "mel")
"""All plan fields of dataset.json if the codes were imported."""

OnShards = Callable[[int, int], None]
"""Callback with (shards checked, total shards)."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Damages, none in an intact dataset, and additional notes for the user."""

    damages: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(
    root: Path, *, sample: int = 0, weights: str | None = None, on_progress: OnShards = lambda done, total: None
) -> Findings:
    """Check everything. For an intact dataset, also encode `sample` utterances again if codec and sources exist.

    `weights`: of the codec, if they have moved. Raises UserError if `root` is not a finished dataset.
    """
    statements = read_statements(root)
    if statements.plan is None:
        return Findings(damages=statements.damages)
    present = sum(1 for _ in (root / "shards").glob("*"))
    if statements.shards > present + MOST_MISSING:
        raise UserError(f"{root}: dataset.json says {statements.shards} shards, it has {present} files: no dataset")
    card, index_files, damages = _card(root, statements), SideFiles(root), list(statements.damages)
    for shard in range(statements.shards):
        checked = check_shard(root, shard, card, statements.version)
        damages += checked.damages
        index_files.take(checked)
        on_progress(shard + 1, statements.shards)
    damages = index_files.settle(damages, statements.header) + list(index_files.finish(statements.header, card))
    damages += _check_list(root, statements)
    if damages:
        return Findings(damages=damages)
    from codecssl.tokenize.integrity.reencode import coder_agrees, read_some, spot_check

    damages = list(read_some(root)) or list(coder_agrees(root))
    if damages or not sample:
        return Findings(damages=damages)
    damages, notes = spot_check(root, statements.plan, sample, weights)
    return Findings(damages=damages, notes=notes)


def _check_list(root: Path, statements: Statements) -> list[Damage]:
    """Compare the input list that was read from standard input, if the dataset was made of one, with the records."""
    plan = statements.plan or {}
    sources = plan.get("sources", [])
    if len(sources) != 1 or Path(sources[0]).name != STDIN or not plan.get("shard_inputs"):
        return []
    try:
        for shard, group in groupby(enumerate(read_source(str(root / STDIN))), lambda p: p[0] // plan["shard_inputs"]):
            digest = hashlib.sha256()
            for _, item in group:
                digest.update(item.digest())
            if load_json(shard_path(root, shard).with_suffix(".json"))["inputs_sha256"] != digest.hexdigest():
                return [Damage(file=STDIN, what=f"its rows are not those that shard {shard:05d} was made of")]
    except (UserError, OSError, KeyError) as error:
        return [Damage(file=STDIN, what=f"is damaged: {error}")]
    return []


# ---------------------------------------------------------------- what dataset.json and plan.json say


@dataclass(frozen=True, kw_only=True)
class Statements:
    """dataset.json and plan.json; None if one is missing or damaged."""

    header: dict[str, Any] | None
    begun: dict[str, Any] | None
    damages: list[Damage]

    @property
    def plan(self) -> dict[str, Any] | None:
        """The plan of the run, from the readable file."""
        if self.begun is not None:
            return self.begun
        return None if self.header is None else plan_of(self.header)

    @property
    def agree(self) -> bool:
        """Return True if the two files agree, as far as both can be read."""
        return self.begun is None or self.header is None or self.begun == plan_of(self.header)

    @property
    def version(self) -> int:
        """Format version, as the writer chooses it."""
        for value in (self.header, self.begun):
            if value is not None and value.get("format_version") == (version := version_of(value)):
                return version
        return version_of(self.plan or {})

    @property
    def shards(self) -> int:
        """Expected number of shards."""
        if self.header is not None and shards_of(self.header) in (None, self.header["totals"]["shards"]):
            return int(self.header["totals"]["shards"])
        return shards_of(self.plan or {}) or 0


def version_of(plan: dict[str, Any]) -> int:
    """Format version of a plan's dataset."""
    return FORMAT_VERSION if plan.get("compression") else 1


def shards_of(plan: dict[str, Any]) -> int | None:
    """Number of shards of a plan; None if its inputs were not counted."""
    inputs, size = plan.get("inputs"), plan.get("shard_inputs")
    return -(-inputs // size) if isinstance(inputs, int) and isinstance(size, int) and size > 0 else None


def plan_of(header: dict[str, Any]) -> dict[str, Any]:
    """Extract the plan from dataset.json."""
    return {key: value for key, value in header.items() if key not in OWN}


def read_statements(root: Path) -> Statements:
    """Read both files. Raises UserError if `root` is not a finished dataset or has a newer format."""
    if not (root / "dataset.json").exists():
        read_header(root)  # raises with the reason
    read, damages = {}, []
    for name in ("dataset.json", "plan.json"):
        try:
            read[name] = _read_statement(root / name)
        except FileNotFoundError:
            continue
        except UserError as error:
            damages.append(Damage(file=name, what=str(error)))
    header, begun = read.get("dataset.json"), read.get("plan.json")
    if header is not None and header["format_version"] > FORMAT_VERSION:
        read_header(root)  # raises
    header, begun = _without_odd_keys(header, begun, damages)
    if header is not None and header.get("sources") and not (root / "plan.json").exists():
        damages.append(Damage(file="plan.json", what="is missing"))
    statements = Statements(header=header, begun=begun, damages=damages)
    if header is not None and header["format_version"] != statements.version:
        what = f"format version {header['format_version']}, expected {statements.version}"
        damages.append(Damage(file="dataset.json", what=what))
    if header is not None and begun is not None and not statements.agree:
        plan = plan_of(header)
        keys = sorted(key for key in plan.keys() | begun.keys() if plan.get(key) != begun.get(key))
        what = f"differs from dataset.json in {', '.join(keys)}: one of the two is damaged"
        damages.append(Damage(file="plan.json", what=what))
    return statements


def _without_odd_keys(
    header: dict[str, Any] | None, begun: dict[str, Any] | None, damages: list[Damage]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Return both files' contents, with None for one that has a key which the other lacks."""
    if header is None:
        return header, begun
    own = plan_of(header).keys()
    theirs = begun.keys() if begun is not None else own if header.get("sources") else own & set(MADE)
    if own > theirs:
        damages.append(Damage(file="dataset.json", what=f"unknown key {min(own - theirs)!r}"))
        return None, begun
    if own < theirs:
        damages.append(Damage(file="plan.json", what=f"unknown key {min(theirs - own)!r}"))
        return header, None
    return header, begun


def _read_statement(path: Path) -> dict[str, Any]:
    value = read_document(path)
    try:
        (check_header if path.name == "dataset.json" else check_plan)(value, path)
        if path.name == "dataset.json":
            if value["format"] != FORMAT:
                raise UserError(f"{path}: format {value['format']!r}, expected {FORMAT!r}")
            totals = value["totals"]
            _ = value["format_version"] + totals["hours"] + sum(totals[key] for key in (*SUMS, "failed", "shards"))
            _ = value["sha256"].encode()
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__} {error})") from error
    return value


def _card(root: Path, statements: Statements) -> CodecCard:
    """Read the codec card. If dataset.json and plan.json differ, use the one that fits the first shard better."""
    cards = [
        CodecCard.from_dict(value["codec"]) for value in (statements.begun, statements.header) if value is not None
    ]
    return min(
        cards, key=lambda card: len(check_shard(root, 0, card, statements.version).damages) if len(cards) > 1 else 0
    )
