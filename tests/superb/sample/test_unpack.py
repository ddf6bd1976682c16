"""The sample corpus: unpacking is atomic, and the manifest matches the audio."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from codecssl.superb.sample import make, unpack, voice
from codecssl.superb.sample import text as sample_text
from codecssl.superb.sounds import clips
from codecssl.tokenize.common.errors import UserError

BY_SPEAKER = ("ks", "er", "ic", "pr", "asr", "sf", "sd", "digits")
VOWELS = ["AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"]
CONSONANTS = [*"BDFGKLMNPRSTVWYZ", "CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH"]
needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack.unpack(tmp_path_factory.mktemp("sample") / "corpus")


@pytest.fixture(scope="module")
def rows(corpus: Path) -> list[unpack.ManifestRow]:
    return unpack.manifest_rows(corpus)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of four utterances in the place of the shipped one, and one synthesised note."""
    target = tmp_path / "small.tar"
    with tarfile.open(unpack.ARCHIVE) as source, tarfile.open(target, "w") as archive:
        lines = gzip.decompress(_member(source, "manifest.jsonl.gz")).decode().splitlines(keepends=True)[:4]
        blobs = {"manifest.jsonl.gz": gzip.compress("".join(lines).encode())}
        blobs["spk00.opus"] = _member(source, "spk00.opus")
        for name, blob in blobs.items():
            info = tarfile.TarInfo(name)
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    monkeypatch.setattr(unpack, "ARCHIVE", target)
    monkeypatch.setattr(unpack, "SYNTHESISED", {"notes": lambda: itertools.islice(clips.notes(), 1)})
    return target


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    stream = archive.extractfile(name)
    assert stream is not None
    return stream.read()


def _of(rows: list[unpack.ManifestRow], task: str, split: str) -> list[unpack.ManifestRow]:
    return [row for row in rows if row["splits"].get(task) == split]


def test_archive_is_a_few_megabytes() -> None:
    assert unpack.ARCHIVE.stat().st_size <= 5_000_000


def test_every_row_matches_the_length_and_rate_of_its_file(corpus: Path, rows: list[unpack.ManifestRow]) -> None:
    for row in rows:
        info = soundfile.info(row["path"])
        assert (info.samplerate, info.channels) == (row["sample_rate"], 1) == (16_000, 1)
        assert info.frames == round(row["seconds"] * info.samplerate)
    assert {Path(row["path"]) for row in rows} == set(corpus.absolute().rglob("*.flac"))


def test_no_clip_is_empty_or_clipped(rows: list[unpack.ManifestRow]) -> None:
    for row in rows:
        wave, _ = soundfile.read(row["path"])
        assert np.abs(wave).max() < 0.99, row["path"]
        level = 20 * np.log10(np.sqrt(np.mean(wave**2)))
        assert level < -38 if row.get("keyword") == "_silence_" else level > -38, row["path"]


def test_unpack_again_touches_nothing(small: Path, tmp_path: Path) -> None:
    folder = unpack.unpack(tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert unpack.unpack(folder) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


@pytest.mark.parametrize("damage", ["remove", "truncate", "manifest", "marker", "older", "sounds"])
def test_a_damaged_copy_is_replaced(small: Path, tmp_path: Path, damage: str) -> None:
    folder = unpack.unpack(tmp_path / "out")
    clip = Path(unpack.manifest_rows(folder)[2]["path"])
    whole = clip.read_bytes()
    if damage == "remove":
        clip.unlink()
    elif damage == "truncate":
        clip.write_bytes(whole[:100])
    elif damage == "manifest":
        (folder / "manifest.jsonl").write_text("")
    elif damage == "marker":
        (folder / unpack.MARKER).write_text("{")
    else:
        marker = json.loads((folder / unpack.MARKER).read_text())
        earlier = {"archive_sha256": "0" * 64} if damage == "older" else {"sounds": 0}
        (folder / unpack.MARKER).write_text(json.dumps({**marker, **earlier}))
    assert not unpack.is_whole(folder)
    unpack.unpack(folder)
    assert unpack.is_whole(folder)
    assert clip.read_bytes() == whole
    assert len([row for row in unpack.manifest_rows(folder) if "speaker" in row]) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small.tar"]


def test_a_folder_with_other_content_is_refused_and_kept(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="give a new or an empty folder"):
        unpack.unpack(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        unpack.unpack(tmp_path / "file")
    with pytest.raises(UserError, match="cannot write there"):
        unpack.unpack(tmp_path / "file" / "below")


def test_an_empty_folder_is_taken(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert unpack.is_whole(unpack.unpack(tmp_path / "out"))


def test_a_killed_unpacking_leaves_no_output(tmp_path: Path) -> None:
    code = f"from codecssl.superb.sample import unpack as sample; sample.unpack({str(tmp_path / 'out')!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.flac"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "must be killed before it ends"
    assert not (tmp_path / "out").exists()
    assert not any(unpack.is_whole(folder) for folder in tmp_path.iterdir())


def test_processes_that_unpack_at_once_all_succeed(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    code = (
        "import pathlib; from codecssl.superb.sample import unpack as sample;"
        f"sample.ARCHIVE = pathlib.Path({str(small)!r}); sample.SYNTHESISED = {{}}; sample.unpack({str(output)!r})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert unpack.is_whole(output)
    assert list(output.parent.iterdir()) == [output]


def test_the_loser_of_a_race_takes_the_winners_copy(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = unpack._extract
    output = tmp_path / "out"
    winner = []

    def slow(folder: Path) -> None:
        monkeypatch.setattr(unpack, "_extract", extract)
        unpack.unpack(output)  # the other process gets there first
        winner.append(output.stat().st_ino)
        extract(folder)

    monkeypatch.setattr(unpack, "_extract", slow)
    unpack.unpack(output)
    assert unpack.is_whole(output)
    assert [output.stat().st_ino] == winner
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small.tar"]


def test_manifest_rows_takes_a_folder_or_a_manifest(small: Path, tmp_path: Path) -> None:
    folder = unpack.unpack(tmp_path / "out")
    assert unpack.manifest_rows(folder) == unpack.manifest_rows(folder / "manifest.jsonl")
    with pytest.raises(UserError, match="codecssl-superb sample"):
        unpack.manifest_rows(tmp_path / "absent")


def test_the_plan_is_the_manifest(rows: list[unpack.ManifestRow]) -> None:
    """After changes to the grammar or the plan, the archive must be made again."""
    items = make.plan()
    recorded = [row for row in rows if Path(row["path"]).parent.name not in unpack.SYNTHESISED]
    assert len(recorded) == len(items) == len(rows) - 448
    for item, row in zip(items, recorded, strict=True):
        assert item.row.items() <= row.items()


@pytest.mark.parametrize("task", BY_SPEAKER)
def test_speakers_of_a_split_are_unseen_by_the_others(rows: list[unpack.ManifestRow], task: str) -> None:
    speakers = {}
    for split in ("train", "valid", "test"):
        part = _of(rows, task, split)
        names = [row.get("speakers", [row["speaker"]] if "speaker" in row else []) for row in part]
        speakers[split] = {name for group in names for name in group}
        assert len(speakers[split]) >= 4
    assert len(set.union(*speakers.values())) == sum(map(len, speakers.values())) == 20


def test_speaker_tasks_split_as_superb_does(rows: list[unpack.ManifestRow]) -> None:
    for split in ("train", "valid", "test"):
        assert len({row["speaker"] for row in _of(rows, "sid", split)}) == 20
    unseen = {row["speaker"] for row in _of(rows, "asv", "test")}
    assert len(unseen) == 8
    assert not unseen & {row["speaker"] for row in _of(rows, "asv", "train")}


def test_every_class_is_in_every_split(rows: list[unpack.ManifestRow]) -> None:
    for split in ("train", "valid", "test"):
        keywords = Counter(row["keyword"] for row in _of(rows, "ks", split))
        assert set(keywords) == {*sample_text.KEYWORDS, "_unknown_", "_silence_"}
        assert max(keywords.values()) <= 1.5 * min(keywords.values())
        assert {row["digit"] for row in _of(rows, "digits", split)} == set(sample_text.DIGITS)
        styles = Counter(row["style"] for row in _of(rows, "er", split))
        assert set(styles) == set(sample_text.STYLES)
        assert len(set(styles.values())) == 1
        slots = [row["slots"] for row in _of(rows, "ic", split)]
        assert len({(slot["action"], slot["object"], slot["location"]) for slot in slots}) == 16
    assert {row["fold"] for row in rows if row["task"] == "er"} == {1, 2, 3, 4, 5}


def test_words_do_not_give_the_style_or_the_transcript_away(rows: list[unpack.ManifestRow]) -> None:
    styles: dict[tuple[str, str], set[str]] = {}
    for row in (row for row in rows if row["task"] == "er"):
        styles.setdefault((row["speaker"], row["text"]), set()).add(row["style"])
    assert all(len(found) == 4 for found in styles.values())
    texts = [row["text"] for row in rows if "asr" in row["splits"]]
    assert len(texts) == len(set(texts))
    known = {word for row in _of(rows, "asr", "train") for word in row["text"].split()}
    unseen = {word for row in _of(rows, "asr", "test") for word in row["text"].split()} - known
    assert len(unseen) <= 2, "the grammar is small: almost all test words must occur in training"


def test_labels_are_well_formed(rows: list[unpack.ManifestRow]) -> None:
    for row in rows:
        assert set(row["task"].split(",")) == set(row["splits"])
        if "pr" in row["splits"]:
            assert set(row["phones"]) <= {*VOWELS, *CONSONANTS}
            assert 1.5 <= len(row["phones"]) / len(row["text"].split()) <= 7
        if "sf" in row["splits"]:
            pairs = list(zip(row["text"].split(), row["iob"].split(), strict=True))
            assert _slots(pairs)
            assert all(value in sample_text.SLOT_VALUES[slot] for slot, value in _slots(pairs))


def _slots(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The (slot, value) pairs of words with IOB tags."""
    found: list[tuple[str, str]] = []
    for word, tag in pairs:
        if tag.startswith("B-"):
            found.append((tag[2:], word))
        elif tag.startswith("I-"):
            assert found[-1][0] == tag[2:]
            found[-1] = (tag[2:], f"{found[-1][1]} {word}")
    return found


def test_queries_have_documents_of_other_speakers(rows: list[unpack.ManifestRow]) -> None:
    for split in ("valid", "test"):
        queries = [row for row in _of(rows, "qbe", split) if row["role"] == "query"]
        documents = [row for row in _of(rows, "qbe", split) if row["role"] == "document"]
        assert len(queries) >= 28
        assert len(documents) == 64
        for query in queries:
            hits = [row for row in documents if query["query"] in row["text"].split()]
            assert 0 < len(hits) < 32
            assert hits == [row for row in documents if query["query"] in row["queries"]]
        assert not {row["speaker"] for row in queries} & {row["speaker"] for row in documents}


def test_segments_are_where_the_voices_are(rows: list[unpack.ManifestRow]) -> None:
    """Outside of all segments, a mixture is at least 6 dB under its speech (its noise, at least 14 dB)."""
    overlap = speech = 0
    for row in (row for row in rows if row["task"] == "sd"):
        wave, rate = soundfile.read(row["path"])
        count = np.zeros(len(wave), int)
        for segment in row["segments"]:
            assert 0 <= segment["start"] < segment["end"] <= row["seconds"]
            count[round(segment["start"] * rate) : round(segment["end"] * rate)] += 1
        assert {segment["speaker"] for segment in row["segments"]} == set(row["speakers"])
        assert count.max() <= 2
        # A tenth of a second after each segment may still hold the room's tail.
        silent = np.convolve(count > 0, np.ones(rate // 10), mode="full")[: len(count)] == 0
        assert np.mean(wave[silent] ** 2) < np.mean(wave[count > 0] ** 2) / 4
        overlap, speech = overlap + int((count > 1).sum()), speech + int((count > 0).sum())
    assert 0.1 < overlap / speech < 0.4


@needs_espeak
def test_espeak_reproduces_the_archive(rows: list[unpack.ManifestRow]) -> None:
    """The generator and the archive belong together; Opus at 13 kbit/s keeps the waveform to about 10 dB."""
    for index in (5, 38, 61, 70):
        pcm, labels = make.render(index, make.plan()[index])
        wave, _ = soundfile.read(rows[index]["path"])
        assert len(pcm) == len(wave)
        assert np.corrcoef(pcm, wave)[0, 1] > 0.8
        assert labels.items() <= rows[index].items()


@needs_espeak
@pytest.mark.parametrize(
    ("text", "accent", "expected"),
    [
        ("yes", "en-us", "Y EH S"),
        ("thursday", "en-us", "TH ER Z D EY"),
        ("the children", "en-gb", "DH AH CH IH L D R AH N"),
        ("mary stone", "en-gb-scotland", "M EH R IY S T OW N"),
        ("quiet", "en-gb-x-rp", "K W AY AH T"),
    ],
)
def test_phones_are_those_of_a_dictionary(text: str, accent: str, expected: str) -> None:
    assert voice.phones(text, accent) == expected.split()


@needs_espeak
def test_speakers_and_takes_differ_and_repeat_exactly() -> None:
    speaker, other = voice.SPEAKERS[:2]

    def take(who: voice.Speaker, seed: int) -> np.ndarray:
        return voice.speak(who, "seven", np.random.default_rng(seed))

    assert np.array_equal(take(speaker, 1), take(speaker, 1))
    for another in (take(speaker, 2), take(other, 1)):
        length = min(len(another), len(take(speaker, 1)))
        assert abs(np.corrcoef(another[:length], take(speaker, 1)[:length])[0, 1]) < 0.8


def test_a_missing_espeak_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert make.main(["--output", str(tmp_path / "x.tar")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: espeak-ng: not found")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
