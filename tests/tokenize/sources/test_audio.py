"""Reading audio: against soundfile and soxr over the whole file, and with files that are broken."""

import hashlib
import re
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources import audio
from codecssl.tokenize.sources.audio import AudioReader, read_wave, sha256_of
from codecssl.tokenize.sources.open_audio import Held

SHARED = Path(__file__).parents[4] / "shared" / "data"

MISCOUNTED = {
    "flac-test-files__05_-_wrong_total_number_of_samples.flac": 109_487,
    "tinytag__image-text-encoding.mp3": 23_616,
    "tinytag__vbr_xing_header_short.mp3": 529,
}
"""Samples that `ffmpeg -i FILE -f f32le` decodes of files whose headers state another number."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 1,000 frames: a second of audio is many of them."""
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 1000)


def noise(seconds, rate, channels=1, seed=0):
    return np.random.default_rng(seed).standard_normal((int(seconds * rate), channels)).astype("f4") * 0.1


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_blocks_equal_the_whole_file_downmixed_and_resampled_at_once(tmp_path, rate, channels):
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(1.3, rate, channels), rate, subtype="FLOAT")
    mono = soundfile.read(path, dtype="float32", always_2d=True)[0].mean(axis=1)
    expected = mono if rate == 16_000 else soxr.resample(mono, rate, 16_000, quality="HQ")
    reader = AudioReader(path, 16_000)
    ours = np.concatenate(list(reader.blocks()))
    assert np.array_equal(ours, expected)
    assert (reader.source_rate, reader.source_samples) == (rate, len(mono))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT"])
def test_wav_files_have_libsndfiles_samples_whole_and_in_part(tmp_path, channels, subtype):
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(1.3, 16_000, channels), 16_000, subtype=subtype)
    path.write_bytes(path.read_bytes() + b"LIST\x04\0\0\0INFO")
    frames = soundfile.read(path, dtype="float32", always_2d=True)[0]
    for start, stop in ((None, None), (0.25, 1.1)):
        part = frames[:] if start is None else frames[4_000:17_600]
        reader = AudioReader(path, 16_000, start, stop, channels=2)
        expected = part.T if channels == 2 else np.stack([part[:, 0]] * 2)
        assert np.array_equal(np.concatenate(list(reader.blocks()), axis=1), expected)
        assert reader.source_samples == len(part)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.wav: cannot read: no such file"):
        read_wave(tmp_path / "gone.wav", 16_000)


def test_a_segment_is_cut_before_resampling(tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, noise(2, 48_000), 48_000)
    mono = soundfile.read(path, dtype="float32")[0]
    ours = np.concatenate(list(AudioReader(path, 16_000, 0.25, 1.5).blocks()))
    assert np.array_equal(ours, soxr.resample(mono[12_000:72_000], 48_000, 16_000, quality="HQ"))


@pytest.mark.parametrize(
    ("start", "stop", "says"), [(3.0, None, "segment starts at 3.0 s"), (0, 2.6, "segment ends at 2.6 s")]
)
def test_a_segment_outside_the_file_is_refused(tmp_path, start, stop, says):
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(2, 16_000), 16_000)
    with pytest.raises(UserError, match=says):
        list(AudioReader(path, 16_000, start, stop).blocks())


def test_incomplete_audio_is_refused_with_a_reason(tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, noise(2, 16_000), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged|truncated"):
        read_wave(path, 16_000)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="cannot decode: the file is empty"):
        read_wave(path, 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan, 0.2], "f4"), 16_000, subtype="FLOAT")
    with pytest.raises(UserError, match="NaN or infinite samples"):
        read_wave(tmp_path / "nan.wav", 16_000)
    soundfile.write(tmp_path / "none.wav", np.zeros(0, "f4"), 16_000)
    with pytest.raises(UserError, match="no samples"):
        read_wave(tmp_path / "none.wav", 16_000)
    with pytest.raises(UserError, match="cannot read: No such file"):
        sha256_of(tmp_path / "gone.wav")


@pytest.mark.skipif(not SHARED.exists(), reason="real audio beside the project is absent")
def test_107_odd_files_are_either_read_whole_or_a_one_line_error():
    import json

    rows = [json.loads(line) for line in (SHARED / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["task"] == "robust" and row.get("frames", 0) < 10**6]
    assert len(rows) > 70
    read_whole = 0
    for row in rows:
        try:
            wave = read_wave(SHARED / row["path"], 16_000)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        read_whole += 1
        assert np.isfinite(wave).all()
        frames = MISCOUNTED.get(Path(row["path"]).name, row["frames"])  # the manifest's count is libsndfile's
        slack = {".mp3": 2 * 1152, ".ogg": 128}.get(Path(row["path"]).suffix, 1)
        longer = len(wave) * row["sample_rate"] / 16_000 - frames
        assert -slack - 1 < longer < row["sample_rate"] / 16_000 + 1, row["path"]
    assert read_whole > 40


@pytest.mark.skipif(not SHARED.exists(), reason="real audio beside the project is absent")
def test_an_mp3_whose_header_counts_its_padding_is_whole():
    """A file of Common Voice: the header states 253,680 samples, and 253,440 are decoded."""
    path = SHARED / "pretrain_cv_en" / "common_voice_en_37154639.mp3"
    reader = AudioReader(path, 32_000)
    assert sum(len(block) for block in reader.blocks()) == reader.source_samples < soundfile.info(path).frames


# ---------------------------------------------------------------- binary files, two channels


def read(source, rate=16_000, channels=1):
    """(samples, source_rate, source_samples), or the reason why not."""
    reader = AudioReader(source, rate, channels=channels)
    try:
        return np.concatenate(list(reader.blocks()), axis=-1), reader.source_rate, reader.source_samples
    except UserError as error:
        return str(error)


def same(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    return np.array_equal(a[0], b[0]) and a[1:] == b[1:]


FORMATS = {"wav": "PCM_24", "flac": "PCM_16", "ogg": "VORBIS", "mp3": "MPEG_LAYER_III", "aiff": "PCM_16", "au": "FLOAT"}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_binary_file_reads_as_its_path_does(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    soundfile.write(path, noise(1.2, 22_050, 2), 22_050, subtype=FORMATS[kind])
    expected = read(path)
    assert len(expected[0]) > 16_000
    with path.open("rb") as file:
        file.seek(100)  # at any position
        assert same(read(file), expected)
        assert same(read(file), expected), "the second read must be equal"
        assert same(read(BytesIO(path.read_bytes())), expected)
        assert sha256_of(file) == sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
        assert np.array_equal(read_wave(file, 16_000), expected[0])


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_two_channels_are_kept_and_one_is_doubled(tmp_path, rate, channels):
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(1.3, rate, channels), rate, subtype="FLOAT")
    whole = soundfile.read(path, dtype="float32", always_2d=True)[0]
    expected = whole if rate == 16_000 else soxr.resample(whole, rate, 16_000, quality="HQ")
    reader = AudioReader(path, 16_000, channels=2)
    blocks = list(reader.blocks())
    assert all(block.shape[0] == 2 and block.dtype == np.float32 and block.flags.c_contiguous for block in blocks)
    assert np.array_equal(np.concatenate(blocks, axis=1), np.broadcast_to(expected.T, (2, len(expected))))
    assert reader.source_samples == len(whole)
    assert read_wave(path, 16_000, channels=2).shape == (2, len(expected))


def test_more_than_two_channels_are_refused_where_two_are_wanted(tmp_path):
    soundfile.write(tmp_path / "x.wav", noise(0.1, 16_000, 5), 16_000)
    assert read(tmp_path / "x.wav", channels=2) == "5 channels: this codec takes one or two; mix the file down first"


# ---------------------------------------------------------------- torn and odd files


def encoded(kind, seconds=2, **options):
    soundfile.write(buffer := BytesIO(), noise(seconds, 16_000), 16_000, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "NIST", "FLAC", "MP3"])
def test_a_file_shorter_than_its_header_states_is_refused(kind):
    """For most formats libsndfile reads the first half as if it were the whole file."""
    whole = encoded(kind)
    assert len(read(BytesIO(whole))[0]) == 32_000
    torn = read(BytesIO(whole[: len(whole) // 2]))
    assert isinstance(torn, str)
    assert torn.startswith("truncated" if kind != "FLAC" else ("truncated", "damaged")), torn
    if promised := re.findall("promises ([0-9]+) samples", torn):
        assert abs(int(promised[0]) - 32_000) < 100


def test_a_segment_before_the_tear_is_read():
    whole = encoded("WAV")
    reader = AudioReader(BytesIO(whole[: len(whole) // 2]), 16_000, 0.1, 0.9)
    expected = soundfile.read(BytesIO(whole), dtype="float32")[0][1600:14_400]
    assert np.array_equal(np.concatenate(list(reader.blocks())), expected)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 64_000 + 44])
def test_sizes_of_writers_that_could_not_know_them_are_taken_as_such(size):
    whole = bytearray(encoded("WAV"))
    place = whole.find(b"data") + 4
    whole[place : place + 4] = size.to_bytes(4, "little")
    assert len(read(BytesIO(bytes(whole)))[0]) == 32_000


def unknown_length(flac):
    """A FLAC as a pipe writes it: no number of samples in its header."""
    content = bytearray(flac)
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    return bytes(content)


def test_a_flac_of_unknown_length_is_read_to_its_end():
    whole = encoded("FLAC")
    piped = unknown_length(whole)
    assert same(read(BytesIO(piped)), read(BytesIO(whole)))
    part = np.concatenate(list(AudioReader(BytesIO(piped), 16_000, 0.5, 1.5).blocks()))
    assert np.array_equal(part, read(BytesIO(whole))[0][8000:24_000])
    for start, stop, says in ((0.5, 2.6, "segment ends at 2.6 s, the file at 2.0 s"), (5.0, None, "no samples|cannot")):
        with pytest.raises(UserError, match=says):
            list(AudioReader(BytesIO(piped), 16_000, start, stop).blocks())
    assert "flac decoder" in read(BytesIO(piped[: len(piped) // 2]))


@pytest.mark.parametrize("junk", [b"\0" * 100, b"icy metadata" * 9])
def test_an_mp3_that_begins_with_junk_is_read_under_any_name(tmp_path, junk):
    path = tmp_path / "radio.mp3"
    path.write_bytes(junk + encoded("MP3"))
    expected = read(path)
    assert 32_000 <= len(expected[0]) <= 32_000 + 3 * 576 + 576  # the header with the padding is not at the start
    with path.open("rb") as file:
        assert same(read(file), expected)
    assert same(read(Held(path.read_bytes(), "inside.tar/radio.bin")), expected)


def test_blocks_of_a_compressed_file_are_not_disturbed_by_their_size(monkeypatch):
    for kind in ("MP3", "OGG", "FLAC"):
        content = encoded(kind, 3)
        small = read(BytesIO(content))
        with monkeypatch.context() as patch:
            patch.setattr(audio, "BLOCK_FRAMES", 1 << 20)
            assert same(read(BytesIO(content)), small)


def test_a_segment_of_a_format_that_cannot_seek(monkeypatch):
    content = encoded("WAV", subtype="GSM610")
    assert not soundfile.SoundFile(BytesIO(content)).seekable()
    part = np.concatenate(list(AudioReader(BytesIO(content), 16_000, 0.5, 1.25).blocks()))
    assert np.array_equal(part, read(BytesIO(content))[0][8000:20_000])


def test_a_file_without_a_header_is_reported(tmp_path):
    (tmp_path / "x.raw").write_bytes(bytes(1000))
    assert read(tmp_path / "x.raw") == "cannot decode: .raw files have no header to tell their rate; make it a .wav"


@pytest.mark.skipif(not SHARED.exists(), reason="real audio beside the project is absent")
def test_odd_files_read_alike_by_path_and_in_memory_and_quietly(monkeypatch):
    raised = []  # in libsndfile's callbacks, from where Python cannot pass it on
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    paths = sorted((SHARED / "robust").iterdir())
    reasons = {}
    for path in paths:
        if path.stat().st_size < 500_000:
            by_path = read(path)
            assert same(read(Held(path.read_bytes(), path.name)), by_path), path.name
            reasons[path.name] = by_path if isinstance(by_path, str) else ""
    assert not raised
    for name, reason in {
        "aeneas__mono.empty.wav": "the file is empty",
        "tinytag__incomplete.mp3": "no audio that FFmpeg knows in it",
        "tinytag__invalid_sample_rate.aiff": "its header gives no possible sample rate, channels or length",
        "tinytag__image-text-encoding.mp3": "",  # whole: a constant bit rate behind a large cover
        "wake-word-benchmark__33.flac": "",  # libsndfile loses sync
        "flac-test-files__04_-_wrong_number_of_channels.flac": "flac channel changed mid stream",
        "flac-test-files__04_-_changing_bitdepth.flac": "",
    }.items():
        assert reason in reasons[name]
        assert bool(reason) == bool(reasons[name])
