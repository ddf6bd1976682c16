"""Make the spoken sample corpus with espeak-ng: `python -m codecssl.superb.sample.make --output OUTPUT.tar`.

A plan of all utterances (text, speaker, labels, splits) is made first, without espeak-ng. Each utterance is then
spoken with its own random generator (seed, index). The same versions of espeak-ng, numpy and soxr give the same
samples.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import platform
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from codecssl.superb.sample import text as sentences
from codecssl.superb.sample.voice import (
    MANNERS,
    SAMPLE_RATE,
    SPEAKERS,
    Speaker,
    Wave,
    coloured_noise,
    espeak_version,
    padded,
    phones,
    recorded,
    speak,
)
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import atomic_file

SEED = 20
SPLITS = {"train": SPEAKERS[:12], "valid": SPEAKERS[12:16], "test": SPEAKERS[16:]}
"""Splits of tasks that split by speaker."""
FOLDS = 5
GAP = SAMPLE_RATE // 20
"""Samples of silence between two utterances of one Opus file, which keep the codec from smearing across them."""

Pcm = npt.NDArray[np.int16]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A planned utterance. `kind` names its folder; `row` is its manifest row without path and length."""

    kind: str
    split: str
    speakers: tuple[Speaker, ...] = ()
    text: str = ""
    style: str = "neutral"
    row: dict[str, Any] = field(default_factory=dict)

    @property
    def bundle(self) -> str:
        return f"{self.speakers[0].name if len(self.speakers) == 1 else self.kind}.opus"


def plan(seed: int = SEED) -> list[Item]:
    """Return all utterances of the corpus, in the order of the manifest."""
    rng = np.random.default_rng(seed)
    texts: set[str] = set()
    items: list[Item] = []
    for index, speaker in enumerate(SPEAKERS):
        split = next(name for name, speakers in SPLITS.items() if speaker in speakers)
        items += _words(speaker, split, rng)
        items += _styles(speaker, split, 1 + index * FOLDS // len(SPEAKERS), rng)
        spoken = [*_sentences(speaker, split, texts, rng), *_intents(speaker, split, rng)]
        items += _with_sid_splits(spoken, rng)
    for split in ("valid", "test"):
        items += list(_queries(split, items, rng))
    for split, mixtures, silences in (("train", 20, 36), ("valid", 6, 8), ("test", 6, 8)):
        items += [_mixture(split, rng) for _ in range(mixtures)]
        labels = {"task": "ks", "splits": {"ks": split}, "keyword": "_silence_", "label": "_silence_"}
        items += [Item(kind="silence", split=split, row=labels) for _ in range(silences)]
    return items


def _item(
    kind: str, speaker: Speaker, split: str, text: str, tasks: str, *, style: str = "neutral", **row: Any
) -> Item:
    splits = dict.fromkeys(tasks.split(","), split)
    labels = {
        "task": tasks,
        "splits": splits,
        "speaker": speaker.name,
        "gender": speaker.gender,
        "text": text,
    }
    labels |= row
    if kind == "styles":
        labels["style"] = style
    return Item(kind=kind, split=split, speakers=(speaker,), text=text, style=style, row=labels)


def _words(speaker: Speaker, split: str, rng: np.random.Generator) -> Iterator[Item]:
    """Plan keywords (3 times per training speaker, else 2), digits once, and other words."""
    train = split == "train"
    for word in sentences.KEYWORDS:
        for _ in range(3 if train else 2):
            yield _item("words", speaker, split, word, "ks", keyword=word, label=word)
    unknown_digits = rng.permutation(10)[: 2 if train else 1]
    for number, word in enumerate(sentences.DIGITS):
        unknown = number in unknown_digits
        extra = {"keyword": "_unknown_"} if unknown else {}
        tasks = "digits,ks" if unknown else "digits"
        yield _item("words", speaker, split, word, tasks, digit=word, label=word, **extra)
    for index in rng.permutation(len(sentences.OTHER_WORDS))[: 1 + train]:
        word = sentences.OTHER_WORDS[index]
        yield _item("words", speaker, split, word, "ks", keyword="_unknown_", label="_unknown_")


def _styles(speaker: Speaker, split: str, fold: int, rng: np.random.Generator) -> Iterator[Item]:
    for index in rng.permutation(len(sentences.STYLE_SENTENCES))[:3]:
        text = sentences.STYLE_SENTENCES[index]
        for style in sentences.STYLES:
            yield _item("styles", speaker, split, text, "er", style=style, label=style, fold=fold)


def _sentences(speaker: Speaker, split: str, texts: set[str], rng: np.random.Generator) -> Iterator[Item]:
    """Plan eight sentences and eight requests with slots, all with different texts."""
    tasks = ["asr", "pr", "sid", "asv"] + (["qbe"] if split != "train" else [])
    for count in range(16):
        while True:
            text, iob = (sentences.sentence(rng), "") if count < 8 else sentences.slot_sentence(rng)
            if text not in texts:
                break
        texts.add(text)
        extra: dict[str, Any] = {"iob": iob} if iob else {}
        if "qbe" in tasks:
            extra |= {"role": "document", "queries": sentences.query_terms_in(text)}
        kind = "requests" if iob else "sentences"
        item = _item(kind, speaker, split, text, ",".join(tasks + ["sf"] * bool(iob)), **extra)
        # Verification has no development set in SUPERB: all unseen speakers are its test.
        item.row["splits"]["asv"] = "train" if split == "train" else "test"
        yield item


def _intents(speaker: Speaker, split: str, rng: np.random.Generator) -> Iterator[Item]:
    """Plan twelve of the sixteen intents, each in one of its wordings."""
    for index in rng.permutation(len(sentences.INTENTS))[:12]:
        intent = sentences.INTENTS[index]
        text = sentences.pick(rng, intent.phrases)
        label = "_".join(intent.slots.values())
        yield _item("commands", speaker, split, text, "ic,sid", slots=intent.slots, label=label)


def _with_sid_splits(items: list[Item], rng: np.random.Generator) -> list[Item]:
    """Assign SID splits. Every speaker is in all three: five utterances in valid, five in test."""
    for rank, index in enumerate(rng.permutation(len(items))):
        items[index].row["splits"]["sid"] = "valid" if rank < 5 else "test" if rank < 10 else "train"
    return items


def _queries(split: str, items: list[Item], rng: np.random.Generator) -> Iterator[Item]:
    """Plan each term in the split's documents twice, by training speakers, who speak no document."""
    documents = [item.row["queries"] for item in items if item.split == split and "queries" in item.row]
    for term in sentences.QUERY_TERMS:
        if not any(term in terms for terms in documents):
            continue
        for index in rng.permutation(12)[:2]:
            yield _item("queries", SPEAKERS[index], split, term, "qbe", role="query", query=term)


def _mixture(split: str, rng: np.random.Generator) -> Item:
    first, second = rng.permutation(len(SPLITS[split]))[:2]
    speakers = (SPLITS[split][first], SPLITS[split][second])
    row = {"task": "sd", "splits": {"sd": split}, "speakers": [speaker.name for speaker in speakers]}
    return Item(kind="mixtures", split=split, speakers=speakers, row=row)


def render(index: int, item: Item, seed: int = SEED) -> tuple[Pcm, dict[str, Any]]:
    """Return the samples of an item and the labels that are known only after synthesis."""
    rng = np.random.default_rng([seed, index])
    labels: dict[str, Any] = {}
    if item.kind == "silence":
        length = int(rng.uniform(0.6, 1.2) * SAMPLE_RATE)
        sound = coloured_noise(length, rng) * 10 ** (rng.uniform(-65, -38) / 20)
    elif item.kind == "mixtures":
        sound, labels["segments"] = _conversation(item, rng)
        sound = recorded(sound, rng)
    else:
        (speaker,) = item.speakers
        dry = speak(speaker, item.text, rng, item.style)
        sound = recorded(padded(dry, rng), rng, MANNERS[item.style].level_db)
        if item.kind in ("sentences", "requests"):
            labels["phones"] = phones(item.text, speaker.accent)
    return np.round(sound * 32767).astype(np.int16), labels


def _conversation(item: Item, rng: np.random.Generator) -> tuple[Wave, list[dict[str, Any]]]:
    """Synthesize four turns of two speakers. Each starts 1.8 s before to 0.4 s after the end of the previous one."""
    turns: list[tuple[str, float, float, Wave]] = []  # who, from, to, what
    cursor = rng.uniform(0.1, 0.5)
    louder = rng.uniform(-4, 4)
    for turn in range(4):
        speaker = item.speakers[turn % 2]
        wave = speak(speaker, sentences.slot_sentence(rng)[0], rng)
        wave = wave / np.sqrt(np.mean(wave**2)) * 0.1 * 10 ** (louder * (turn % 2) / 20)
        # A voice never overlaps itself: at least 0.1 s after the end of its own last turn.
        start = max(cursor, turns[-2][2] + 0.1) if turn > 1 else cursor
        turns.append((speaker.name, start, start + len(wave) / SAMPLE_RATE, wave))
        cursor = max(start + 0.3, turns[-1][2] + rng.uniform(-1.8, 0.4))
    sound = np.zeros(int((max(end for _, _, end, _ in turns) + rng.uniform(0.1, 0.5)) * SAMPLE_RATE))
    for _, start, _, wave in turns:
        first = int(start * SAMPLE_RATE)
        sound[first : first + len(wave)] += wave
    return sound, [{"speaker": who, "start": round(a, 3), "end": round(b, 3)} for who, a, b, _ in turns]


def make(output: Path, *, bitrate: int) -> dict[str, Any]:
    """Speak the plan and write the archive. Returns the content of its `corpus.json`."""
    bundles: dict[str, list[Pcm]] = defaultdict(list)
    ends: dict[str, int] = defaultdict(int)
    rows = []
    for index, item in enumerate(plan()):
        pcm, labels = render(index, item)
        start = ends[item.bundle]
        bundles[item.bundle] += [pcm, np.zeros(GAP, np.int16)]
        ends[item.bundle] += len(pcm) + GAP
        name = item.speakers[0].name + "_" if len(item.speakers) == 1 else ""
        place = {"path": f"{item.kind}/{name}{index:04d}.flac", "seconds": len(pcm) / SAMPLE_RATE}
        cut = {"bundle": item.bundle, "start": start, "stop": start + len(pcm)}
        rows.append({**place, "sample_rate": SAMPLE_RATE, **item.row, **labels, **cut})
    waves = {name: np.concatenate(pieces) for name, pieces in sorted(bundles.items())}
    card = _card(rows, waves, bitrate)
    manifest = "".join(json.dumps(row) + "\n" for row in rows).encode()
    members = {"corpus.json": json.dumps(card, indent=1).encode()}
    members["manifest.jsonl.gz"] = gzip.compress(manifest, mtime=0)
    members |= {name: _opus(wave, bitrate) for name, wave in waves.items()}
    _write_tar(output, members)
    return card


def _card(rows: list[dict[str, Any]], waves: dict[str, Pcm], bitrate: int) -> dict[str, Any]:
    pcm = hashlib.sha256()
    for wave in waves.values():
        pcm.update(wave.astype("<i2").tobytes())
    return {
        "format": 1,
        "seed": SEED,
        "utterances": len(rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "speakers": len(SPEAKERS),
        "opus_bitrate": bitrate,
        "pcm_sha256": pcm.hexdigest(),
        "espeak": espeak_version(),
        "versions": {name: version(name) for name in ("numpy", "soxr", "soundfile")},
        "machine": platform.machine(),
    }


def _opus(wave: Pcm, bitrate: int) -> bytes:
    """Encode as Ogg Opus. libsndfile takes the bit rate as a "compression level": 1 is 6, 0 is 256 kbit/s."""
    import soundfile

    blob = io.BytesIO()
    level = 1 - (bitrate - 6_000) / 250_000
    soundfile.write(blob, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level)
    return blob.getvalue()


def _write_tar(output: Path, members: dict[str, bytes]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, blob in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(blob), 0o644
            archive.addfile(info, io.BytesIO(blob))


def main(argv: list[str] | None = None) -> int:
    about = "Make the spoken sample corpus with espeak-ng."
    parser = argparse.ArgumentParser(prog="python -m codecssl.superb.sample.make", description=about)
    parser.add_argument("--output", type=Path, required=True, help="the archive to write")
    parser.add_argument("--bitrate", type=int, default=13_000, help="of Opus, bit/s (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        card = make(arguments.output, bitrate=arguments.bitrate)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(card, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
