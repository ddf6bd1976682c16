"""Broken and odd files from many projects' tests: each is in a shard or in failed.jsonl, with a reason that is true."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
from helpers import HASHCODEC, verify

from codecssl.tokenize.backends import table
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.run import run
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources.audio import EXTENSIONS

FOLDER = Path(__file__).parents[4] / "shared/data/robust"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no {FOLDER}: the corpus of broken files is not here")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.BACKENDS, "hash_16khz", HASHCODEC)
        output = tmp_path_factory.mktemp("robust") / "out"
        run(TokenizeConfig(sources=(str(FOLDER),), output=output, codec="hash_16khz", workers=0))
    return output


@pytest.fixture(scope="module")
def failed(dataset):
    rows = [json.loads(line) for line in (dataset / "failed.jsonl").read_text().splitlines()]
    return {row["path"]: row["reason"] for row in rows}


def test_every_file_is_in_a_shard_or_in_failed_and_none_in_both(dataset, failed):
    written = [utterance.path for utterance in Shards(dataset).utterances()]
    files = [path.name for path in FOLDER.iterdir() if path.name.lower().endswith(EXTENSIONS)]
    assert len(files) > 100
    assert sorted(written + list(failed)) == sorted(files)
    assert verify(dataset) == []


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg")
def test_the_written_samples_are_all_that_ffmpeg_decodes(dataset):
    compared = 0
    for utterance in list(Shards(dataset).utterances())[::3]:
        if utterance.path.startswith(ODD_FLACS):  # Debian's ffmpeg reads less of these than libFLAC does
            continue
        count = ffmpeg_samples(FOLDER / utterance.path)
        assert utterance.source_samples == count, utterance.path
        compared += 1
    assert compared >= 20


ODD_FLACS = tuple(f"flac-test-files__{n}" for n in ("01_-_wrong_max", "03_-_wrong_bit", "04_-_changing", "07", "08"))


def ffmpeg_samples(path):
    command = ["ffmpeg", "-v", "quiet", "-i", str(path), "-map", "0:a:0", "-ac", "1", "-f", "f32le", "-"]
    return len(subprocess.run(command, capture_output=True).stdout) // 4


def test_each_reason_is_true(failed):
    untrue = {name: reason for name, reason in failed.items() if not is_true(FOLDER / name, reason)}
    assert untrue == {}
    assert all("\n" not in reason for reason in failed.values())


def is_true(path, reason):
    """Look at the bytes, or let libsndfile read the whole file in one call."""
    content = path.read_bytes()
    if numbers := re.fullmatch(r"truncated: the header promises (\d+) frames, (\d+) are there", reason):
        promised, there = map(int, numbers.groups())
        return promised.to_bytes(4, "big") in content[:4096] and there <= mp3_frames(content) + 1 < promised
    if numbers := re.fullmatch(r"truncated: its last frame has (\d+) of (\d+) bytes", reason):
        *_, (at, size) = mp3_places(content)
        return (len(content) - at, size) == tuple(map(int, numbers.groups()))
    if numbers := re.fullmatch(r"truncated: its last Ogg page ends (\d+) bytes after it begins", reason):
        return content[-int(numbers[1]) :].startswith(b"OggS")
    if "FFmpeg knows" in reason:
        return not content.startswith((b"fLaC", b"OggS", b"FORM")) and mp3_frames(content) < 2
    if "FFmpeg cannot decode the data" in reason:
        return path.suffix == ".flac" and not is_readable(path)
    if numbers := re.fullmatch(r"no samples left at 16000 Hz: (\d+) at (\d+) Hz", reason):
        count, rate = map(int, numbers.groups())
        return len(soundfile.read(path)[0]) == count < rate / 16_000
    checks = {
        "cannot decode: the file is empty": lambda: content == b"",
        "cannot decode: no audio found in it": lambda: mp3_frames(content) < 2,
        "no samples: the file or segment holds no audio": lambda: len(soundfile.read(path)[0]) == 0,
        "cannot decode: Format not recognised.": lambda: not content.startswith((b"RIFF", b"fLaC", b"OggS", b"FORM")),
        "cannot decode: Error in WAV file. No 'data' chunk marker.": lambda: b"data" not in content,
        "cannot decode: flac channel changed mid stream.": lambda: len(flac_channels(content)) > 1,
        "cannot decode: its header gives no possible sample rate, channels or length": lambda: not is_readable(path),
        "cannot decode: File contains data in an unimplemented format.": lambda: not is_readable(path),
        "cannot decode: flac decoder lost sync.": lambda: not is_readable(path),
        "cannot decode: unknown error in flac decoder.": lambda: not is_readable(path),
    }
    return reason in checks and checks[reason]()


def is_readable(path):
    try:
        return len(soundfile.read(path)[0]) > 0
    except (soundfile.LibsndfileError, ValueError, OverflowError, MemoryError):
        return False


def mp3_frames(content):
    """Whole frames after the tag at the beginning (ISO 11172-3, 2.4.1.3)."""
    return len(list(mp3_lengths(content)))


def mp3_lengths(content):
    return (size for at, size in mp3_places(content) if at + size <= len(content))


def mp3_places(content):
    """(offset, bytes) of each frame; the last one may be cut."""
    skipped = 0
    if content[:3] == b"ID3":
        a, b, c, d = content[6:10]
        skipped = 10 + (a << 21 | b << 14 | c << 7 | d)
        content = content[skipped:]
    high = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    low = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160]
    at = 0
    while at + 4 <= len(content):
        header = int.from_bytes(content[at : at + 4], "big")
        version, rate, bits = header >> 19 & 3, header >> 10 & 3, header >> 12 & 15
        if header >> 21 != 0x7FF or header >> 17 & 3 != 1 or bits in (0, 15) or rate == 3 or version == 1:
            at += 1
            continue
        hertz = [44_100, 48_000, 32_000][rate] // {3: 1, 2: 2, 0: 4}[version]
        size = (144 * high[bits] if version == 3 else 72 * low[bits]) * 1000 // hertz + (header >> 9 & 1)
        yield at + skipped, size
        at += size


def flac_channels(content):
    """The numbers of channels that the file's header and frame headers with a right CRC-8 give (RFC 9639, 8.2, 9.1)."""
    found = {(content[20] >> 1 & 7) + 1}
    for match in re.finditer(rb"\xff[\xf8\xf9]", content):
        header = content[match.start() : match.start() + 17]
        if any(crc8(header[:size]) == header[size] for size in range(5, len(header))):
            found.add(header[3] // 16 + 1 if header[3] // 16 < 8 else 2)
    return found


def crc8(content):
    value = 0
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x07) & 0xFF if value & 0x80 else value << 1
    return value
