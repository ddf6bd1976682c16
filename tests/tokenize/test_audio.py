"""Reading audio: against soundfile and soxr over the whole file, and with files that are broken."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from codecssl.tokenize import audio
from codecssl.tokenize.audio import AudioReader, read_wave, sha256_of
from codecssl.tokenize.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


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


def test_a_segment_is_cut_before_resampling(tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, noise(2, 48_000), 48_000)
    mono = soundfile.read(path, dtype="float32")[0]
    ours = np.concatenate(list(AudioReader(path, 16_000, 0.25, 1.5).blocks()))
    assert np.array_equal(ours, soxr.resample(mono[12_000:72_000], 48_000, 16_000, quality="HQ"))


@pytest.mark.parametrize(
    ("start", "stop", "says"), [(3.0, None, "segment starts at 3.0 s"), (0, 2.5, "segment ends at 2.5 s")]
)
def test_a_segment_outside_the_file_is_refused(tmp_path, start, stop, says):
    path = tmp_path / "x.wav"
    soundfile.write(path, noise(2, 16_000), 16_000)
    with pytest.raises(UserError, match=says):
        list(AudioReader(path, 16_000, start, stop).blocks())


def test_what_is_no_whole_audio_is_refused_with_a_reason(tmp_path):
    path = tmp_path / "x.flac"
    soundfile.write(path, noise(2, 16_000), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="flac decoder lost sync|truncated"):
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
def test_107_odd_files_either_read_whole_or_give_one_line():
    import json

    rows = [json.loads(line) for line in (SHARED / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["task"] == "robust" and row.get("frames", 0) < 10**6]
    assert len(rows) > 70
    for row in rows:
        try:
            wave = read_wave(SHARED / row["path"], 16_000)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert np.isfinite(wave).all()
        slack = audio.MP3_SLACK if row["path"].endswith(".mp3") else 1
        assert -slack - 1 < (len(wave) * row["sample_rate"] / 16_000 - row["frames"]) < row["sample_rate"] / 16_000 + 1


@pytest.mark.skipif(not SHARED.exists(), reason="real audio beside the project is absent")
def test_an_mp3_whose_header_counts_its_padding_is_whole():
    """One of Common Voice's: 253,680 samples promised, 253,440 there."""
    path = SHARED / "pretrain_cv_en" / "common_voice_en_37154639.mp3"
    reader = AudioReader(path, 32_000)
    assert sum(len(block) for block in reader.blocks()) == reader.source_samples < soundfile.info(path).frames
