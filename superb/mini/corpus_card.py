"""Corpus card of mini-SUPERB: contents, splits and missing tasks."""

from collections import Counter
from collections.abc import Mapping

from codecssl.superb.mini.manifest import LabelledManifest
from codecssl.superb.rows import ManifestRow

SPLITS = ("train", "valid", "test")
TITLES = {
    "pr": "phones",
    "asr": "words, as characters",
    "ks": "keyword, `_unknown_`, `_silence_`",
    "qbe": "does a sentence hold a spoken word",
    "sid": "which of the speakers",
    "asv": "same speaker or not (trials.txt)",
    "sd": "who speaks when, two speakers",
    "ic": "three slots",
    "sf": "words and their slots",
    "er": "emotion, five folds",
    "env": "environmental sound",
    "inst": "instrument of a synthesised note",
    "pitch": "pitch of a synthesised note",
}
RULES = {
    "pr": "by speaker",
    "asr": "by speaker; no text twice across splits",
    "ks": "words by speaker where known, else by utterance; `_unknown_` by speaker",
    "qbe": "by speaker where known, else by utterance; nothing is trained",
    "sid": "by utterance, every speaker in every split",
    "asv": "by speaker; no valid, as in SUPERB",
    "sd": "by speaker",
    "ic": "by speaker where known, else by utterance, made ones as their words; every value of a slot is in train",
    "sf": "as the words' and utterances' own splits",
    "er": "by speaker; fold 1 tests, fold 2 validates, or all five in turn",
    "env": "by clip, every class in every split",
    "inst": "by pitch",
    "pitch": "by instrument",
}
HEAD = """# mini-SUPERB

SUPERB's ten tasks in small, and environmental sounds, instruments and pitches, built by `codecssl-superb mini` from
`{manifest}` (seed {seed}, recipe `{recipe}`).

No figure from it is a SUPERB result, nor can be compared with a published one: the corpora are others, and small. It
compares upstreams with each other on the same rows. Give several seeds of the heads, and the spread.

Rows of `manifest.jsonl` name the audio where it lies, by absolute path; paths without a leading slash are audio made
here (16 kHz FLAC). The licences of the sources hold, row by row, in the column `licence`.
"""


def card(
    rows: list[ManifestRow],
    notes: Mapping[str, list[str]],
    missing: Mapping[str, str],
    data: LabelledManifest,
    seed: int,
    recipe: str,
) -> str:
    """Return the card as Markdown."""
    parts = [HEAD.format(manifest=data.path, seed=seed, recipe=recipe), "## Contents\n", _contents(rows), ""]
    parts += ["## Splits\n", *(f"- {task}: {RULES[task]}." for task in _tasks(rows)), ""]
    parts += ["## Notes\n", *(f"- {task}: {note}" for task in _tasks(rows) for note in notes.get(task, [])), ""]
    parts += ["## Classes\n", *_classes(rows), "", "## Sources\n", *_sources(rows), ""]
    left = [*(f"- {text}." for text in missing.values())]
    left += [f"- {count} rows of the manifest: {reason}." for reason, count in data.dropped.items()]
    return "\n".join([*parts, "## Left out\n", *(left or ["Nothing."])]) + "\n"


def _tasks(rows: list[ManifestRow]) -> list[str]:
    present = {row["task"] for row in rows}
    return [task for task in TITLES if task in present]


def _contents(rows: list[ManifestRow]) -> str:
    lines = ["| task | what | train | valid | test | minutes | speakers |", "|---|---|--:|--:|--:|--:|--:|"]
    for task in _tasks(rows):
        own = [row for row in rows if row["task"] == task]
        counts = Counter(row["splits"][task] for row in own)
        minutes = sum(row["seconds"] for row in own) / 60
        speakers = {name for row in own for name in row.get("speakers", [row.get("speaker")]) if name}
        figures = [*(str(counts[split]) for split in SPLITS), f"{minutes:.1f}", str(len(speakers) or "unknown")]
        lines.append(f"| {task} | {TITLES[task]} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _classes(rows: list[ManifestRow]) -> list[str]:
    """List utterances per class, train + valid + test."""
    lines = []
    for task, column in (("ks", "keyword"), ("er", "label"), ("env", "label")):
        own = [row for row in rows if row["task"] == task]
        counts = Counter((row[column], row["splits"][task]) for row in own)
        names = sorted({name for name, _ in counts})
        shown = ", ".join(f"{name} {' + '.join(str(counts[name, split]) for split in SPLITS)}" for name in names)
        lines += [f"- {task}: {shown}."] if own else []
    own = [row for row in rows if row["task"] == "ic"]
    for slot in own[0]["slots"] if own else []:
        counted = Counter(row["slots"][slot] for row in own)
        lines.append(f"- ic, {slot}: {', '.join(f'{name} {count}' for name, count in counted.most_common())}.")
    own = [row for row in rows if row["task"] == "qbe"]
    if own:
        terms = sorted({row["query"] for row in own if row["role"] == "query"})
        lines.append(f"- qbe, terms: {', '.join(terms)}.")
    return lines


def _sources(rows: list[ManifestRow]) -> list[str]:
    counted = Counter((row.get("origin", "unknown"), row.get("licence", "unknown")) for row in rows)
    return [f"- {origin}: {licence} ({count} rows)." for (origin, licence), count in sorted(counted.items())]
