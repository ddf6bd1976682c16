"""Corpora of short commands and queries as rows: Speech Commands for ks, Fluent for ic, QUESST14 for qbe."""

import csv
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from codecssl.superb.corpora.place import Place, Row, check_files, make_row, read_lines
from codecssl.tokenize.common.errors import UserError

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
SILENCE, UNKNOWN, NOISE = "_silence_", "_unknown_", "_background_noise_"
HASH_BUCKETS = 2**27 - 1
"""Of the split by speaker in Warden 2018, "Speech Commands", section 7."""

ENGLISH = "nnenglish"  # the part of QUESST14 that SUPERB uses
SLOTS = ("action", "object", "location")


def ks_rows(place: Place) -> list[Row]:
    """Speech Commands v0.01: `keyword` is one of ten commands, `_unknown_` or `_silence_`.

    As in SUPERB: the training tree is split by a hash of the speaker, its hashed test part unused; the test
    set is the separate tree. A row of silence is one second of a longer file: `start` and `end` in seconds.
    The background noise stands in train and in valid.
    """
    train = place.corpus("Speech Commands v0.01", ("speech_commands_v0.01",), ("yes", NOISE))
    places = (place.root, train.parent, *([place.side] if place.side else []))
    names = ("speech_commands_test_set_v0.01", "test")
    tests = [folder / name for folder in places for name in names if (folder / name / SILENCE).is_dir()]
    if not tests:
        raise UserError(f"data {place.root}: no speech_commands_test_set_v0.01 beside {train}; unpack it there")
    rows = [row for folder in _folders(train) for row in _training(folder)]
    return rows + [row for folder in _folders(tests[0]) for row in _labelled("test", folder, folder.name)]


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.absolute().iterdir() if folder.is_dir())


def _training(folder: Path) -> Iterator[Row]:
    if folder.name == NOISE:
        for split in ("train", "valid"):
            yield from _labelled(split, folder, SILENCE)
        return
    keyword = folder.name if folder.name in COMMANDS else UNKNOWN
    for path in sorted(folder.glob("*.wav")):
        split = _hashed_split(path.name)
        if split != "test":
            yield make_row("ks", split, path, id=f"{folder.name}/{path.name}", keyword=keyword)


def _labelled(split: str, folder: Path, keyword: str) -> Iterator[Row]:
    for path in sorted(folder.glob("*.wav")):
        name = f"{folder.name}/{path.name}"
        if keyword == SILENCE:
            for first, last, rate in _seconds(path):
                part = {"id": f"{name}_{first}_{last}", "start": first / rate, "end": last / rate}
                yield make_row("ks", split, path, keyword=keyword, **part)
        else:
            yield make_row("ks", split, path, id=name, keyword=keyword)


def _seconds(path: Path) -> Iterator[tuple[int, int, int]]:
    """(first sample, last, rate) of each second of a file."""
    import soundfile

    info = soundfile.info(path)
    for first in range(0, info.frames, info.samplerate):
        yield first, min(first + info.samplerate, info.frames), info.samplerate


def _hashed_split(name: str) -> str:
    """Every take of one speaker falls into one split: 10 % valid, 10 % test."""
    digest = hashlib.sha1(re.sub("_nohash_.*$", "", name).encode()).hexdigest()
    percent = int(digest, 16) % (HASH_BUCKETS + 1) * (100.0 / HASH_BUCKETS)
    return "valid" if percent < 10 else "test" if percent < 20 else "train"


def ic_rows(place: Place) -> list[Row]:
    """Fluent Speech Commands: `slots` (action, object, location), `text` and `speaker`; its own three lists."""
    corpus = place.corpus("Fluent Speech Commands", ("fluent_speech_commands_dataset",), ("wavs", "data"))
    rows = []
    for split in ("train", "valid", "test"):
        source = "the corpus's archive (folder data)"
        listed = place.file((f"data/{split}_data.csv",), source, corpus)
        with listed.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        check_files((corpus / line["path"] for line in lines), listed)
        for line in lines:
            path, slots = corpus / line["path"], {slot: line[slot] for slot in SLOTS}
            columns = {"speaker": line["speakerId"], "text": line["transcription"], "slots": slots}
            rows.append(make_row("ic", split, path, id=path.stem, **columns))
    return rows


def qbe_rows(place: Place) -> list[Row]:
    """QUESST14's English part: `role` query has `query`, its own id; `role` document has `queries`, those it holds.

    Development queries are valid, evaluation queries test. Both search the same documents, so a document has
    two rows, of which each knows the queries of its split.
    """
    corpus = place.corpus("QUESST14", ("quesst14Database",), ("scoring", "Audio"))
    documents = _listed(corpus, "language_key_utterances.lst")
    rows = []
    for split, part in (("valid", "dev"), ("test", "eval")):
        queries, held = _listed(corpus, f"language_key_{part}.lst"), _ground_truth(corpus, part)
        known = {path.stem for path in queries}
        for path in queries:
            rows.append(make_row("qbe", split, path, id=path.stem, role="query", query=path.stem))
        for path in documents:
            found = sorted(held[path.stem] & known)
            rows.append(make_row("qbe", split, path, id=f"{part}-{path.stem}", role="document", queries=found))
    return rows


def _listed(corpus: Path, name: str) -> list[Path]:
    listed = corpus / "scoring" / name
    if not listed.is_file():
        raise UserError(f"{listed}: not there; unpack quesst14Database.tgz again (speech.fit.vutbr.cz)")
    entries = [line.split() for line in read_lines(listed)]
    paths = [corpus / entry[0].partition("/")[2] for entry in entries if entry[1] == ENGLISH]
    check_files(paths, listed)
    return paths


def _ground_truth(corpus: Path, part: str) -> dict[str, set[str]]:
    """Document id -> ids of the queries in it, of lines `LEXEME document ... query ...` (NIST's RTTM)."""
    path = corpus / "scoring" / f"groundtruth_quesst14_{part}" / f"quesst14_{part}.rttm"
    if not path.is_file():
        raise UserError(f"{path}: not there; the eval part is its own archive at speech.fit.vutbr.cz")
    held: dict[str, set[str]] = defaultdict(set)
    for line in read_lines(path):
        query = re.search(rf"\bquesst14_{part}_\d+\b", line)
        if line.startswith("LEXEME") and query:
            held[line.split()[1]].add(query.group())
    return held
