"""Tasks of mini-SUPERB with clips spliced from real ones: ks, sf, and ic if there are few sentences."""

from collections.abc import Iterator

import numpy as np

from codecssl.superb.mini import recorded_tasks
from codecssl.superb.mini.audio import RATE, Wave, at_level, loudest_part, quiet_part, trimmed
from codecssl.superb.mini.builder import TRIPLE, LackingError, MiniBuilder, require
from codecssl.superb.mini.manifest import Splits, by_speaker, by_utterance, grouped, keyword_of, pick
from codecssl.superb.rows import ManifestRow

SILENCE, UNKNOWN = "_silence_", "_unknown_"
LONGEST = 1.0
"""Maximum seconds of a clip of ks, as in Speech Commands."""
NOISE_LEVELS = (-50.0, -30.0)  # dBFS
FEWEST_SPEAKERS = 3
PAUSES = (0.1, 0.3)
"""Range of the pauses in seconds between the words of a spliced command."""


def band_of(builder: MiniBuilder) -> int:
    """Return the lowest sample rate of the word clips. All clips compared with them are limited to its band."""
    words = words_of(builder)
    require(words, "rows of task kws or digits with labels")
    return min(RATE, *(row["rate"] for row in words))


def words_of(builder: MiniBuilder) -> list[ManifestRow]:
    return [row for row in builder.data.of("kws", "digits") if row.get("keyword") or row.get("label") not in (None, "")]


def word_splits(builder: MiniBuilder) -> Splits:
    """Split word clips by speaker if a task has at least three known ones. Clips without speaker split by utterance."""
    splits: Splits = {split: [] for split in TRIPLE}
    for task in ("kws", "digits"):
        rows = [row for row in words_of(builder) if task in row["tasks"]]
        known = [row for row in rows if row["speaker"]]
        if len({row["speaker"] for row in known}) < FEWEST_SPEAKERS:
            known = []
        split = by_speaker(known, builder.shares, builder.rng(f"words {task}")) if known else {}
        for row in known:
            splits[split[row["speaker"]]].append(row)
        others = [row for row in rows if not known or not row["speaker"]]
        for word, clips in sorted(by_word(others).items()):
            dealt = by_utterance(clips, builder.shares, builder.rng(f"words {task} {word}"))
            for name in TRIPLE:
                splits[name] += dealt[name]
    return splits


def by_word(rows: list[ManifestRow]) -> dict[str, list[ManifestRow]]:
    return grouped([{**row, "word": keyword_of(row)} for row in rows], "word")


def ks(builder: MiniBuilder) -> list[ManifestRow]:
    """Build ks: words of at most a second, `_unknown_` from running speech, `_silence_` from noises and quiet segments.

    All clips have the same band, and `_unknown_` and `_silence_` have the lengths of the words. Neither bandwidth nor
    length distinguishes the classes.
    """
    band, splits = band_of(builder), word_splits(builder)
    noises = (
        by_utterance(builder.data.of("env"), builder.shares, builder.rng("noises")) if builder.data.of("env") else {}
    )
    found = {
        split: _spotted(builder, split, most, splits[split], noises.get(split, []), band)
        for split, most in zip(TRIPLE, builder.recipe.ks_per_word, strict=True)
    }
    kept = _complete(builder, {split: {word for word, _, _ in clips} for split, clips in found.items()})
    made = []
    for split, clips in found.items():
        for number, (word, wave, row) in enumerate(clip for clip in clips if clip[0] in kept):
            made.append(builder.written("ks", split, f"{split}-{number:04d}", wave, row, keyword=word))
    builder.note(
        "ks", f"Every clip is limited to the band below {band // 2} Hz, the narrowest of the words' recordings."
    )
    return made


def _spotted(
    builder: MiniBuilder, split: str, most: int, rows: list[ManifestRow], noises: list[ManifestRow], band: int
) -> list[tuple[str, Wave, ManifestRow]]:
    """Return (word, wave, source) of a split's clips."""
    rng, clips = builder.rng(f"ks {split}"), by_word(rows)
    chosen = [row for word in sorted(clips) for row in pick(clips[word], most, rng)]
    words = [(row["word"], cut(builder.audio.read(row, band)), row) for row in chosen]
    lengths = [len(wave) / RATE for _, wave, _ in words]
    if UNKNOWN not in clips and lengths:
        words += [(UNKNOWN, *item) for item in _unknown(builder, split, most, lengths, band, rng)]
    if SILENCE not in clips and lengths:
        words += [(SILENCE, *item) for item in _silences(builder, chosen, noises, most, lengths, band, rng)]
    return words


def _complete(builder: MiniBuilder, words: dict[str, set[str]]) -> set[str]:
    """Return the words that occur in every split, and note the others."""
    complete, known = set.intersection(*words.values()), set.union(*words.values())
    if len(complete - {SILENCE, UNKNOWN}) < 2:
        raise LackingError("two words or more with clips for every split (three speakers or clips of each)")
    for word in sorted((known | {SILENCE, UNKNOWN}) - complete):
        builder.note("ks", f"No `{word}`: the manifest has no clips of it for every split.")
    return complete


def cut(wave: Wave) -> Wave:
    return loudest_part(trimmed(wave) if len(wave) > LONGEST * RATE else wave, LONGEST)


def _unknown(
    builder: MiniBuilder, split: str, count: int, lengths: list[float], band: int, rng: np.random.Generator
) -> Iterator[tuple[Wave, ManifestRow]]:
    """Yield the loudest segments of this split's sentences without keywords."""
    keywords = {keyword_of(row).upper() for row in words_of(builder)}
    rows = [row for row in builder.data.speech() if builder.voices[row["speaker"]] == split]
    rows = [row for row in rows if not keywords & set(row["plain"].split())]
    for row in pick(rows, count, rng):
        yield loudest_part(builder.audio.read(row, band), float(rng.choice(lengths))), row


def _silences(
    builder: MiniBuilder,
    words: list[ManifestRow],
    noises: list[ManifestRow],
    count: int,
    lengths: list[float],
    band: int,
    rng: np.random.Generator,
) -> Iterator[tuple[Wave, ManifestRow]]:
    """Yield silence: half quiet environmental noise, half pauses next to the words, as far as available."""
    long_words = [(row, builder.audio.read(row, band)) for row in words if row["seconds"] > LONGEST]
    order = rng.permutation(len(long_words))
    quiet = [(quiet_part(long_words[i][1], float(rng.choice(lengths))), long_words[i][0]) for i in order]
    found = [(wave, row) for wave, row in quiet if wave is not None]
    loud = pick(noises, count - min(len(found), count // 2), rng)
    for row in loud:
        noise = loudest_part(builder.audio.read(row, band), float(rng.choice(lengths)))
        yield at_level(noise, float(rng.uniform(*NOISE_LEVELS))), row
    yield from found[: count - len(loud)]


def ic(builder: MiniBuilder) -> list[ManifestRow]:
    """Build ic from the manifest's sentences, or from words if there are fewer than the recipe's `ic_least`."""
    sentences = [row for row in builder.data.of("ic") if isinstance(row.get("slots"), dict) and row["slots"]]
    made = [] if len(sentences) >= builder.recipe.ic_least else list(_intents(builder))
    if not made:
        return recorded_tasks.ic(builder)
    builder.note(
        "ic",
        f"{len(sentences)} sentences with slots are too few for a head to learn from. The commands are made, real "
        f"clips in a row: a keyword (action) and a digit (object); `{recorded_tasks.NONE}` is the only location.",
    )
    return made


def _intents(builder: MiniBuilder) -> Iterator[ManifestRow]:
    """Yield commands KEYWORD DIGIT of words in all splits, each pair equally often. Requires two of each."""
    splits = {split: by_word(rows) for split, rows in word_splits(builder).items()}
    common = set.intersection(*(set(clips) for clips in splits.values())) - {SILENCE, UNKNOWN}
    keywords, digits = (
        sorted(common & {keyword_of(row) for row in words_of(builder) if task in row["tasks"]})
        for task in ("kws", "digits")
    )
    pairs = [(keyword, digit) for keyword in keywords for digit in digits]
    if min(len(keywords), len(digits)) < 2:
        return
    band = band_of(builder)
    for split, count in zip(TRIPLE, builder.recipe.ic_commands, strict=True):
        rng, clips = builder.rng(f"ic {split}"), splits[split]
        for number in range(count):
            pair = pairs[number % len(pairs)]
            chosen = [clips[word][int(rng.integers(len(clips[word])))] for word in pair]
            wave = in_a_row([at_level(cut(builder.audio.read(row, band)), -25.0) for row in chosen], rng)
            slots = dict(zip(recorded_tasks.INTENT, (*pair, recorded_tasks.NONE), strict=True))
            columns = {"slots": slots, "speaker": chosen[1]["speaker"]}
            yield builder.written("ic", split, f"{split}-{number:04d}", wave, chosen[0], **columns)


def sf(builder: MiniBuilder) -> list[ManifestRow]:
    """Build sf: text with one IOB tag per word.

    Rows with text and iob are used unmodified. Without such rows, two sources are used. Orders whose slot sequence is
    in the recipe are real sentences; their text holds only the slots' words. Commands are spliced from one keyword
    and one to three digits.
    """
    ready = [row for row in builder.data.of("sf") if row.get("text") and row.get("iob") and row["speaker"]]
    if ready:
        split = by_speaker(ready, builder.shares, builder.rng("sf"))
        rows = [builder.referenced("sf", split[r["speaker"]], r, text=r["text"], iob=r["iob"]) for r in ready]
        return sorted(rows, key=lambda row: TRIPLE.index(row["splits"]["sf"]))
    made = [*_orders(builder), *_commands(builder)]
    require(made, "rows with text and iob, with slots in an order of the recipe, or with keywords and digits")
    return sorted(made, key=lambda row: TRIPLE.index(row["splits"]["sf"]))


def _orders(builder: MiniBuilder) -> Iterator[ManifestRow]:
    groups = builder.recipe.slot_order
    rows = [row for row in builder.data.of("ic") if isinstance(row.get("slots"), dict)]
    known = [row for row in rows if row["slots"] and _in_order(row["slots"], groups)]
    if not known:
        return
    builder.note(
        "sf",
        f"{len(known)} real sentences out of {len(rows)}: those whose slots can come in one order only. No transcript "
        "is known, so the text holds the words of the slots but not the rest of the sentence.",
    )
    splits = by_utterance(known, builder.shares, builder.rng("sf orders"), lambda row: row["slots"])
    for split in TRIPLE:
        for row in splits[split]:
            spoken = [
                (name, str(row["slots"][name]).split()) for group in groups for name in group if name in row["slots"]
            ]
            words = [(word, name, i) for name, text in spoken for i, word in enumerate(text)]
            tags = " ".join(f"{'I' if i else 'B'}-{name}" for _, name, i in words)
            text = " ".join(word.upper() for word, _, _ in words)
            yield builder.referenced("sf", split, row, text=text, iob=tags)


def _in_order(slots: dict[str, str], groups: list[list[str]]) -> bool:
    named = [sum(name in slots for name in group) for group in groups]
    return sum(named) == len(slots) and max(named, default=0) <= 1


def _commands(builder: MiniBuilder) -> Iterator[ManifestRow]:
    """KEYWORD DIGIT DIGIT: digits by one speaker, faint noise in the pauses."""
    splits = word_splits(builder)
    if not all("kws" in r["tasks"] for r in splits["train"][:1]) or not builder.data.of("digits"):
        return
    band = band_of(builder)
    builder.note(
        "sf", "The other sentences are concatenations of real clips: a keyword and one to three digits of one speaker."
    )
    for split, count in zip(TRIPLE, builder.recipe.sf_commands, strict=True):
        rng, rows = builder.rng(f"sf {split}"), splits[split]
        keywords = [r for r in rows if "kws" in r["tasks"] and not keyword_of(r).startswith("_")]
        voices = grouped([r for r in rows if "digits" in r["tasks"] and r["speaker"]], "speaker")
        if not keywords or not voices:
            return
        for number in range(count):
            first = keywords[int(rng.integers(len(keywords)))]
            digits = voices[sorted(voices)[int(rng.integers(len(voices)))]]
            chosen = [first, *(digits[int(i)] for i in rng.integers(len(digits), size=int(rng.integers(1, 4))))]
            wave = in_a_row([at_level(cut(builder.audio.read(row, band)), -25.0) for row in chosen], rng)
            tags = ["B-device", "B-number", *["I-number"] * (len(chosen) - 2)]
            text = " ".join(keyword_of(row).upper() for row in chosen)
            columns = {"text": text, "iob": " ".join(tags), "speaker": digits[0]["speaker"]}
            yield builder.written("sf", split, f"{split}-{number:04d}", wave, first, **columns)


def in_a_row(waves: list[Wave], rng: np.random.Generator) -> Wave:
    """Concatenate waves with short pauses around them, over faint white noise (-65 dBFS)."""
    parts: list[Wave] = []
    for wave in waves:
        parts += [np.zeros(round(float(rng.uniform(*PAUSES)) * RATE), np.float32), wave]
    whole = np.concatenate([*parts, np.zeros(round(PAUSES[0] * RATE), np.float32)])
    return np.asarray(whole + 10 ** (-65 / 20) * rng.standard_normal(len(whole)), np.float32)
