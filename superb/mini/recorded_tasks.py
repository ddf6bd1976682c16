"""Tasks of mini-SUPERB with unmodified clips: pr, asr, sid, asv, er, ic."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np

from codecssl.superb.mini.builder import TRIPLE, LackingError, MiniBuilder, require
from codecssl.superb.mini.manifest import Splits, by_speaker, by_utterance, grouped, pick
from codecssl.superb.rows import ManifestRow, TrialLine

FOLDS = 5
INTENT = ("action", "object", "location")
"""SUPERB's names of an intent's three slots, as s3prl's task reads them."""
NONE = "none"


def pr(builder: MiniBuilder) -> list[ManifestRow]:
    """Build pr: phones without stress and word position, as in SUPERB's lexicon. No speaker is in two splits."""
    rows = [row for row in builder.data.speech() if row.get("phones")]
    require(rows, "rows of task pr with phones, text and speaker")
    splits = builder.capped(_dealt(rows, builder.voices), builder.recipe.pr_utterances, builder.rng("pr"))
    return [
        builder.referenced("pr", split, row, text=row["plain"], phones=plain_phones(row["phones"]))
        for split in TRIPLE
        for row in splits[split]
    ]


def plain_phones(phones: list[str] | str) -> list[str]:
    """Remove stress and word position, e.g. AY0_I -> AY."""
    return [re.sub(r"\d?(_[BIES])?$", "", phone) for phone in (phones.split() if isinstance(phones, str) else phones)]


def asr(builder: MiniBuilder) -> list[ManifestRow]:
    """Build asr: sentences in capitals. No speaker is in two splits; no test or validation text is in training."""
    rows = builder.data.speech()
    require(rows, "rows of task asr with text and speaker")
    splits = _dealt(rows, builder.voices)
    known = {row["plain"] for row in splits["train"]}
    for split in ("valid", "test"):
        fresh = [row for row in splits[split] if row["plain"] not in known]
        if len(fresh) < len(splits[split]):
            builder.note("asr", f"{len(splits[split]) - len(fresh)} of {split} left out: their text is in train.")
        splits[split] = fresh
        known |= {row["plain"] for row in fresh}
    splits = builder.capped(splits, builder.recipe.asr_utterances, builder.rng("asr"))
    return [builder.referenced("asr", split, row, text=row["plain"]) for split in TRIPLE for row in splits[split]]


def _dealt(rows: list[ManifestRow], voices: dict[str, str]) -> Splits:
    splits: Splits = {split: [row for row in rows if voices[row["speaker"]] == split] for split in TRIPLE}
    for split, found in splits.items():
        require(found, f"speakers enough for a {split} split")
    return splits


def _voiced(builder: MiniBuilder, least: int, most: int, task: str, seconds: float) -> list[ManifestRow]:
    """Return at most `most` clips of each speaker with at least `least` clips."""
    rows = [row for row in builder.data.of("sid", "asv", needs=("speaker",)) if row["seconds"] >= seconds]
    speakers = {name: clips for name, clips in grouped(rows, "speaker").items() if len(clips) >= least}
    if len(speakers) < 4:
        raise LackingError(
            f"rows of task sid with four speakers of {least} clips or more, each of {seconds:g} s or more"
        )
    return [clip for name in sorted(speakers) for clip in pick(speakers[name], most, builder.rng(f"{task} {name}"))]


def sid(builder: MiniBuilder) -> list[ManifestRow]:
    """Build sid. As in SUPERB, utterances are split and every speaker is in every split."""
    rows = _voiced(builder, builder.recipe.sid_least, builder.recipe.sid_most, "sid", 1.0)
    made = []
    for name, clips in grouped(rows, "speaker").items():
        splits = by_utterance(clips, builder.shares, builder.rng(f"sid splits {name}"))
        made += [builder.referenced("sid", split, row) for split in TRIPLE for row in splits[split]]
    _note_channels(builder, "sid", rows)
    return sorted(made, key=lambda row: TRIPLE.index(row["splits"]["sid"]))


def _note_channels(builder: MiniBuilder, task: str, rows: list[ManifestRow]) -> None:
    origins = Counter(str(row.get("origin", "one source")) for row in rows)
    if len(origins) > 1:
        counts = ", ".join(f"{count} from {name}" for name, count in sorted(origins.items()))
        builder.note(
            task, f"Clips come from different recording conditions ({counts}); a channel can reveal a speaker."
        )


def asv(builder: MiniBuilder) -> tuple[list[ManifestRow], list[TrialLine]]:
    """Build rows and trials of asv. Tested speakers are not in training.

    Different speakers of a trial have the same source and, if known for both, the same gender. Neither channel nor
    pitch alone decides a trial.
    """
    rows = _voiced(builder, builder.recipe.asv_least, builder.recipe.asv_most, "asv", 1.5)
    rows = [row for row in rows if not re.search(r"\s", row["path"])]
    share = builder.recipe.asv_share
    split = by_speaker(rows, {"train": share, "test": 1 - share}, builder.rng("asv"))
    made = [builder.referenced("asv", split[row["speaker"]], row) for row in rows]
    tests = [row for row in made if row["splits"]["asv"] == "test"]
    trials = _trials(tests, builder.recipe.asv_trials, builder.rng("asv trials"))
    if not trials:
        raise LackingError("two speakers of one source to try")
    tried = {path for _, *both in trials for path in both}
    kept = [row for row in made if row["splits"]["asv"] == "train" or row["path"] in tried]
    return sorted(kept, key=lambda row: row["splits"]["asv"] != "train"), trials


def _trials(rows: list[ManifestRow], most: int, rng: np.random.Generator) -> list[TrialLine]:
    pairs = list(combinations(rows, 2))
    same = [pair for pair in pairs if pair[0]["speaker"] == pair[1]["speaker"]]
    other = [pair for pair in pairs if pair[0]["speaker"] != pair[1]["speaker"] and _alike(*pair)]
    count = min(most, len(same), len(other))
    chosen = [(1, pair) for pair in pick(same, count, rng)] + [(0, pair) for pair in pick(other, count, rng)]
    return [(label, pair[0]["path"], pair[1]["path"]) for label, pair in chosen]


def _alike(one: ManifestRow, other: ManifestRow) -> bool:
    genders = {str(row["gender"])[0].lower() for row in (one, other) if row.get("gender")}
    return one.get("origin") == other.get("origin") and len(genders) < 2


def er(builder: MiniBuilder) -> list[ManifestRow]:
    """Build er: five folds of speakers with similar numbers of clips. Fold 1 is the test set, fold 2 validates."""
    rows = builder.data.of("er", needs=("label", "speaker"))
    sizes = Counter(row["speaker"] for row in rows)
    if len(sizes) < FOLDS:
        raise LackingError(f"rows of task er with label and speaker, of {FOLDS} speakers or more")
    rng, filled, fold_of = builder.rng("er"), [0] * FOLDS, {}
    for name in sorted((str(s) for s in rng.permutation(sorted(sizes))), key=lambda name: -sizes[name]):
        fold = int(np.argmin(filled))
        fold_of[name], filled[fold] = fold + 1, filled[fold] + sizes[name]
    made = []
    for row in rows:
        fold, label = fold_of[row["speaker"]], str(row.get("style") or row["label"])
        split = {1: "test", 2: "valid"}.get(fold, "train")
        made.append(builder.referenced("er", split, row, label=label, fold=fold))
    return made


def ic(builder: MiniBuilder) -> list[ManifestRow]:
    """Build ic: three slots per utterance, all of which must be correct. Split by utterance: speakers are unknown."""
    rows = [row for row in builder.data.of("ic") if isinstance(row.get("slots"), dict) and row["slots"]]
    if len(rows) < 10:
        raise LackingError("ten rows of task ic with slots")
    names = _three_slots(rows)
    if names != INTENT:
        renamed = ", ".join(f"{new} is {old}" for new, old in zip(INTENT, names, strict=False))
        note = f"Of the slots, those with the fewest values are used: {renamed}; `{NONE}` where a slot is not spoken."
        builder.note("ic", note)

    def slots(row: ManifestRow) -> dict[str, str]:
        values = {name: str(row["slots"].get(name) or NONE).strip() for name in names}
        return {new: values.get(old, NONE) for new, old in zip(INTENT, (*names, "", "")[:3], strict=True)}

    known = all(row["speaker"] for row in rows)
    if known and len({row["speaker"] for row in rows}) >= FOLDS:
        split = by_speaker(rows, builder.shares, builder.rng("ic"))
        splits = {name: [row for row in rows if split[row["speaker"]] == name] for name in TRIPLE}
        splits = _seen(builder, splits, slots)
    else:
        builder.note("ic", "Speakers are not known: the same voice may be in train and test.")
        splits = by_utterance(rows, builder.shares, builder.rng("ic"), lambda row: slots(row).items())
    return [builder.referenced("ic", split, row, slots=slots(row)) for split in TRIPLE for row in splits[split]]


def _seen(builder: MiniBuilder, splits: Splits, slots: Callable[[ManifestRow], dict[str, str]]) -> Splits:
    """Remove rows of valid and test with a slot value that train lacks."""
    known = {item for row in splits["train"] for item in slots(row).items()}
    for split in ("valid", "test"):
        kept = [row for row in splits[split] if set(slots(row).items()) <= known]
        if len(kept) < len(splits[split]):
            builder.note("ic", f"{len(splits[split]) - len(kept)} of {split} left out: a slot's value is not in train.")
        splits[split] = kept
    return splits


def _three_slots(rows: list[ManifestRow]) -> tuple[str, ...]:
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row["slots"].items():
            values.setdefault(name, set()).add(str(value).strip())
    if set(values) <= set(INTENT):
        return INTENT
    return tuple(sorted(values, key=lambda name: (len(values[name]), name))[:3])
