"""Tasks of mini-SUPERB beyond SUPERB's ten: env from the manifest's clips, inst and pitch from synthesised notes."""

from collections.abc import Iterator

from codecssl.superb.mini.builder import TRIPLE, MiniBuilder, require
from codecssl.superb.mini.manifest import by_utterance, grouped
from codecssl.superb.rows import ManifestRow
from codecssl.superb.sounds.clips import SynthesisedClip, notes
from codecssl.superb.sounds.notes import SAMPLE_RATE

LEAST_CLIPS = 5
"""Clips without which an environmental class is left out: three train, one validates, one tests."""


def env(builder: MiniBuilder) -> list[ManifestRow]:
    """Build env: environmental sounds. Every class is in every split."""
    classes = grouped(builder.data.of("env", needs=("label",)), "label")
    kept = {name: rows for name, rows in classes.items() if len(rows) >= LEAST_CLIPS}
    require(len(kept) > 1, f"rows of task env with a label, {LEAST_CLIPS} of each of two classes")
    if len(kept) < len(classes):
        builder.note("env", f"{len(classes) - len(kept)} classes of fewer than {LEAST_CLIPS} clips left out.")
    made = []
    for name, rows in sorted(kept.items()):
        splits = by_utterance(rows, builder.shares, builder.rng(f"env {name}"))
        made += [builder.referenced("env", split, row, label=name) for split in TRIPLE for row in splits[split]]
    return sorted(made, key=lambda row: TRIPLE.index(row["splits"]["env"]))


def inst(builder: MiniBuilder) -> list[ManifestRow]:
    """Build inst: instruments of synthesised notes, tested on pitches that did not train."""
    return list(_notes(builder, "inst", "instrument"))


def pitch(builder: MiniBuilder) -> list[ManifestRow]:
    """Build pitch: pitches of synthesised notes, tested on an instrument that did not train."""
    return list(_notes(builder, "pitch", "pitch"))


def _notes(builder: MiniBuilder, task: str, column: str) -> Iterator[ManifestRow]:
    source = {"origin": "synthesised notes", "licence": "as codecssl"}
    clips: list[SynthesisedClip] = sorted(notes(1, builder.seed), key=lambda clip: TRIPLE.index(clip.splits[task]))
    for clip in clips:
        path = f"notes/{clip.name}.flac"
        if not (builder.audio.folder / path).exists():  # inst and pitch share the notes
            builder.audio.write(path, clip.wave)
        seconds = len(clip.wave) / SAMPLE_RATE
        yield builder.row(task, clip.splits[task], path, seconds, source, **{column: clip.labels[column]})
