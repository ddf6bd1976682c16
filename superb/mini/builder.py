"""State shared by the task builders of mini-SUPERB: manifest, recipe, seeded generators, rows, notes."""

import functools
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codecssl.superb.mini.audio import AudioWriter
from codecssl.superb.mini.manifest import LabelledManifest, Splits, by_speaker, pick
from codecssl.superb.mini.recipe import Recipe
from codecssl.superb.rows import ManifestRow

TRIPLE = ("train", "valid", "test")
KEPT = ("speaker", "gender", "origin", "licence")
"""Source columns that every new row keeps."""


class LackingError(Exception):
    """The manifest lacks data for a task. The message names it."""


@dataclass(frozen=True, kw_only=True)
class MiniBuilder:
    """Context of the task builders. `notes` are sentences for the corpus card."""

    data: LabelledManifest
    recipe: Recipe
    audio: AudioWriter
    seed: int
    notes: dict[str, list[str]] = field(default_factory=dict)

    def rng(self, name: str) -> np.random.Generator:
        """Return a separate generator per task, independent of the draws of other tasks."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    @property
    def shares(self) -> dict[str, float]:
        return dict(zip(TRIPLE, self.recipe.shares, strict=True))

    @functools.cached_property
    def voices(self) -> dict[str, str]:
        """Split of each speaker of sentences, shared by pr, asr, sd and the unknown words of ks."""
        return by_speaker(self.data.speech(), self.shares, self.rng("voices"))

    def note(self, task: str, text: str) -> None:
        self.notes.setdefault(task, []).append(text)

    def referenced(self, task: str, split: str, row: ManifestRow, **columns: Any) -> ManifestRow:
        """Build the manifest row of an unmodified clip."""
        return self.row(task, split, self.audio.place(row), row["seconds"], row, **columns)

    def written(self, task: str, split: str, name: str, wave: Any, source: ManifestRow, **columns: Any) -> ManifestRow:
        """Write a new clip to `task`/`name`.flac and build its manifest row."""
        path = self.audio.write(f"{task}/{name}.flac", wave)
        return self.row(task, split, path, round(len(wave) / 16_000, 4), source, **columns)

    def row(self, task: str, split: str, path: str, seconds: float, source: ManifestRow, **columns: Any) -> ManifestRow:
        kept = {name: source[name] for name in KEPT if source.get(name) not in (None, "")}
        head = {"path": path, "seconds": seconds, "sample_rate": 16_000, "task": task, "splits": {task: split}}
        return {**head, **kept, **columns}

    def capped(self, splits: Splits, counts: Iterable[int], rng: np.random.Generator) -> Splits:
        return {name: pick(splits[name], most, rng) for name, most in zip(TRIPLE, counts, strict=True)}


def require(rows: Any, what: str) -> None:
    """Raise LackingError if `rows` is empty."""
    if not rows:
        raise LackingError(what)
