"""Lengths and samples against the ffmpeg command line: whole, joined, truncated and cut files of many formats."""

import io
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from crafted import change_bytes, fuzzed
from hypothesis import given
from hypothesis import strategies as st

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources import containers, decoder
from codecssl.tokenize.sources.audio import AudioReader
from codecssl.tokenize.sources.open_audio import Held

pytestmark = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg command to compare with")
RATE = 44_100


def sh(*command, stdin=None):
    done = subprocess.run([str(c) for c in command], input=stdin, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_ffmpeg(path):
    """Samples float32 [n], decoded by ffmpeg."""
    command = ["ffmpeg", "-v", "quiet", "-i", str(path), "-map", "0:a:0", "-ac", "1", "-f", "f32le", "-"]
    return np.frombuffer(subprocess.run(command, capture_output=True, timeout=60).stdout, "<f4")


def ours(path, start=None, stop=None, **options):
    """(samples at the file's own rate, the reader)."""
    with decoder.opened(Path(path)) as file:
        rate = file.samplerate
    reader = AudioReader(Path(path), rate, start, stop, **options)
    return np.concatenate(list(reader.blocks())), reader


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """2 s almost silent, then 4 s of noise: a decoder that estimates a length from the first bytes is wrong."""
    folder = tmp_path_factory.mktemp("media")
    wave = np.random.default_rng(0).standard_normal(6 * RATE) * 0.2
    wave[: 2 * RATE] *= 0.001
    soundfile.write(folder / "a.wav", wave, RATE)
    for name, *options in (
        ("vbr.mp3", "-q:a", "4"),
        ("low.mp3", "-b:a", "32k", "-ar", "48000"),
        ("cbr.mp3", "-b:a", "64k", "-write_xing", "0", "-id3v2_version", "3"),
        ("a.opus", "-b:a", "32k"),
        ("a.ogg",),
        ("a.m4a",),
        ("a.webm",),
        ("a.mp2",),
        ("a.wv",),
        ("a.flac",),
        ("mp3.wav", "-c:a", "libmp3lame"),
        ("a.aac",),
    ):
        sh("ffmpeg", "-v", "error", "-i", folder / "a.wav", *options, folder / name)
    return folder


WHOLE = "vbr.mp3 low.mp3 cbr.mp3 a.opus a.ogg a.m4a a.webm a.mp2 a.wv a.flac mp3.wav a.aac a.wav".split()  # noqa: SIM905


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_matches_ffmpeg(media, name):
    expected, (found, _) = by_ffmpeg(media / name), ours(media / name)
    assert len(found) == len(expected) >= 6 * RATE
    assert np.abs(found - expected).max() < (0.02 if "opus" in name or "webm" in name else 2e-4)


@pytest.mark.parametrize("names", [("vbr.mp3", "cbr.mp3"), ("a.opus", "a.opus"), ("a.ogg", "a.ogg")])
def test_files_joined_by_cat_are_read_to_their_end(media, tmp_path, names):
    path = tmp_path / f"joined{Path(names[0]).suffix}"
    path.write_bytes(b"".join((media / name).read_bytes() for name in names))
    found, _ = ours(path)
    assert abs(len(found) - len(by_ffmpeg(path))) <= 312, (
        "must agree up to Opus's delay, which newer versions skip in each part"
    )
    assert len(found) > 1.99 * min(len(by_ffmpeg(media / name)) for name in names)


@pytest.mark.parametrize("count", [0, 40])
def test_a_wrong_xing_count_does_not_shorten_an_mp3(media, tmp_path, count):
    content = bytearray((media / "vbr.mp3").read_bytes())
    place = next(p for p in (content.find(b"Xing"), content.find(b"Info")) if p >= 0)
    content[place + 8 : place + 12] = count.to_bytes(4, "big")
    (tmp_path / "x.mp3").write_bytes(content)
    found, _ = ours(tmp_path / "x.mp3")
    assert abs(len(found) - len(by_ffmpeg(media / "vbr.mp3"))) <= 2 * 1152


@pytest.mark.parametrize("before", [b"", b"ID3\x03\0\0\0\0\x06\0" + bytes(6 << 7)])
@pytest.mark.parametrize("behind", [b"", bytes(5000), b"TAG" + bytes(125)])
def test_tags_covers_and_zeros_around_an_mp3_are_not_audio(media, tmp_path, before, behind):
    (tmp_path / "x.mp3").write_bytes(before + (media / "cbr.mp3").read_bytes() + behind)
    found, _ = ours(tmp_path / "x.mp3")
    assert abs(len(found) - len(by_ffmpeg(media / "cbr.mp3"))) <= 1152


@pytest.mark.parametrize("name", ["vbr.mp3", "cbr.mp3", "a.opus", "a.ogg", "a.m4a", "a.webm", "a.flac", "mp3.wav"])
def test_half_a_file_is_refused(media, tmp_path, name):
    content = (media / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2 + 7])
    with pytest.raises(UserError, match="truncated|damaged|cannot decode"):
        ours(tmp_path / name)


@pytest.mark.parametrize("name", WHOLE)
def test_a_segment_is_the_slice_of_the_whole_decode(media, name):
    whole, (found, reader) = by_ffmpeg(media / name), ours(media / name, 3.1, 4.1)
    begin = round(3.1 * reader.source_rate)
    expected = whole[begin : begin + reader.source_rate]
    assert len(found) == reader.source_rate
    assert np.abs(found - expected).max() < (0.02 if "opus" in name or "webm" in name else 2e-4)


def test_an_mp3_segment_begins_with_its_first_sample(media):
    """At 32 kbit/s a frame's bits begin several frames before it."""
    whole, (found, reader) = ours(media / "low.mp3")[0], ours(media / "low.mp3", 3.1, 4.1)
    begin = round(3.1 * reader.source_rate)
    assert np.array_equal(found, whole[begin : begin + len(found)])


def test_a_flac_with_a_low_total_is_read_to_its_end(media, tmp_path):
    content = bytearray((media / "a.flac").read_bytes())
    content[21:26] = ((content[21] & 0xF0) << 32 | 40_000).to_bytes(5, "big")
    (tmp_path / "x.flac").write_bytes(content)
    assert np.array_equal(ours(tmp_path / "x.flac")[0], ours(media / "a.flac")[0])


def test_a_wav_from_a_pipe_has_no_size_and_all_its_samples(media, tmp_path):
    content = bytearray((media / "a.wav").read_bytes())
    place = content.find(b"data") + 4
    content[place : place + 4] = bytes(4)
    (tmp_path / "x.wav").write_bytes(content)
    assert np.array_equal(ours(tmp_path / "x.wav")[0], ours(media / "a.wav")[0])


def test_a_wav_above_4_gib_with_wrapped_sizes_is_read_whole(tmp_path):
    """A sparse file: 4 GiB and 2 s of 16-bit stereo, whose sizes count modulo 4 GiB."""
    data = (1 << 32) + 2 * RATE * 4
    soundfile.write(tmp_path / "head.wav", np.zeros((1, 2)), RATE)
    begin = bytearray((tmp_path / "head.wav").read_bytes()[:44])
    begin[40:44] = (data & 0xFFFFFFFF).to_bytes(4, "little")
    with open(tmp_path / "x.wav", "wb") as file:
        file.write(begin)
        file.seek(44 + data - 4)
        file.write(b"\x00\x40\x00\x40")
    end = data / 4 / RATE
    found, _ = ours(tmp_path / "x.wav", end - 1.0)
    assert len(found) == RATE
    assert found[-1] == 0.5
    with decoder.opened(tmp_path / "x.wav") as file:
        assert file.length == data // 4


def test_a_playlist_cannot_make_ffmpeg_open_another_file(media, tmp_path):
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:6,\n{media / 'a.aac'}\n#EXT-X-ENDLIST\n")
    with pytest.raises(UserError, match="cannot decode"):
        ours(tmp_path / "list.m3u8")


def test_channels_that_cancel_are_counted_and_one_can_be_chosen(tmp_path):
    left = np.random.default_rng(1).uniform(-0.5, 0.5, RATE).astype("f4")
    soundfile.write(tmp_path / "x.wav", np.stack([left, -left], 1), RATE, subtype="FLOAT")
    assert ours(tmp_path / "x.wav")[1].notes == ["cancelled"]
    found, reader = ours(tmp_path / "x.wav", channel=1)
    assert np.array_equal(found, -left)
    assert reader.notes == []
    with pytest.raises(UserError, match="channel 2: the file has 2, counted from 0"):
        ours(tmp_path / "x.wav", channel=2)


@pytest.mark.parametrize("name", ["a.wav", "a.opus", "vbr.mp3"])
def test_a_segment_a_little_past_the_end_is_cut_there_and_noted(media, name):
    whole = len(ours(media / name)[0])
    rate = ours(media / name, 0, 1)[1].source_rate
    if name == "a.wav":
        found, reader = ours(media / name, 5.0, whole / rate + 0.001)
        assert reader.notes == ["clipped"]
        assert len(found) == whole - 5 * rate
    with pytest.raises(UserError, match="segment ends at"):
        ours(media / name, 5.0, whole / rate + 0.6)
    found, reader = ours(media / name, 5.0, whole / rate + 0.4)
    assert len(found) == whole - 5 * rate
    assert reader.notes == ["clipped"]


def test_a_duration_near_the_end_means_the_whole_file(media):
    for name in ("a.wav", "vbr.mp3"):
        whole = len(ours(media / name)[0])
        assert len(ours(media / name, duration=5.7)[0]) == whole
        assert len(ours(media / name, duration=2.0)[0]) == 2 * RATE


DELAY = 2 * 1152 + 1105
"""Frames of decoders' delays and of one damaged frame, which ffmpeg counts in another way than its library."""


@fuzzed(80)
@given(st.data())
def test_cut_or_changed_audio_is_refused_or_has_ffmpegs_length(media, tmp_path_factory, data):
    name = data.draw(st.sampled_from([*WHOLE, "a.wav", "a.flac"]))
    content = change_bytes((media / name).read_bytes(), data)
    if not content:
        return
    path = tmp_path_factory.getbasetemp() / f"fuzz{Path(name).suffix}"
    path.write_bytes(content)
    reader = AudioReader(Held(content, name), 16_000, channels=1)
    began = time.process_time()
    try:
        assert all(np.isfinite(block).all() for block in reader.blocks())
    except UserError as error:
        assert "\n" not in str(error)
        return
    finally:
        assert time.process_time() - began < 10
    exact = Path(name).suffix in (".wav", ".flac") and name != "mp3.wav"
    assert abs(reader.source_samples - len(by_ffmpeg(path))) <= (0 if exact else DELAY), name


def test_the_checksum_of_an_ogg_page_is_compared(media):
    content = bytearray((media / "a.opus").read_bytes())
    containers.check_ogg(io.BytesIO(bytes(content)), len(content))
    content[len(content) // 2] ^= 1
    with pytest.raises(UserError, match="the checksum of the Ogg page"):
        containers.check_ogg(io.BytesIO(bytes(content)), len(content))
