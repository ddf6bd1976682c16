"""The log-mel plane: against librosa in float64, for any cut, and in shards that are divided, damaged, repaired."""

import json
import tarfile
from dataclasses import replace

import librosa
import numpy as np
import pytest
from helpers import card, wave
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.signal import get_window

import codecssl.tokenize.encode as encode_module
from codecssl.tokenize.adapters import utterances
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.encode import Device, encode_inputs
from codecssl.tokenize.format.layout import sealed
from codecssl.tokenize.format.writer import to_json
from codecssl.tokenize.integrity.repair import repair
from codecssl.tokenize.integrity.verify import examine
from codecssl.tokenize.measure.stats import lines, stats
from codecssl.tokenize.mel import HIGH, LOW, MelSpec, MelStream, mel_plane
from codecssl.tokenize.run import run
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources.sources import read_sources

SPEC = MelSpec.for_codec(80, card((1024,)))
WAVE = wave(60_000, 3, rate=16_000).numpy()


SCALES = pytest.mark.parametrize("scale", ["slaney", "htk"])


@SCALES
def test_plane_equals_librosa(scale):
    """librosa's frames are centred on hop * t; ours on the middle of frame t, half a hop later."""
    spec = MelSpec.for_codec(80, card((1024,)), scale)
    left = (spec.window - spec.hop_length) // 2
    padded = np.pad(WAVE.astype(np.float64), (left, spec.window))
    spectrum = librosa.stft(
        padded, n_fft=spec.window, hop_length=spec.hop_length, center=False, window="hann", dtype=np.complex128
    )
    bank = librosa.filters.mel(
        sr=16_000, n_fft=spec.window, n_mels=80, fmin=0.0, fmax=8000.0, htk=scale == "htk", norm=None, dtype=np.float64
    )
    power = (bank @ np.abs(spectrum) ** 2) / (spec.window / 4) ** 2
    expected = np.clip((np.log10(power.T) - LOW) / (HIGH - LOW) * 255, 0, 255)
    plane = mel_plane(spec, WAVE)
    assert plane.shape == (-(-60_000 // 320), 80)
    assert np.abs(plane - expected[: len(plane)]).max() <= 0.5 + 1e-6
    assert np.abs(spec.log_power(plane) - np.clip(np.log10(power.T), LOW, HIGH)[: len(plane)]).max() <= 12 / 510 + 1e-5


def test_a_full_scale_sine_has_power_1():
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    assert SPEC.log_power(mel_plane(SPEC, tone))[10].max() == pytest.approx(0.0, abs=0.2)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 60_000), max_size=6), st.integers(1, 60_000))
def test_any_cut_gives_the_same_plane(cuts, samples):
    short = WAVE[:samples]
    stream, found = MelStream(SPEC), []
    for piece in np.split(short, sorted(min(cut, samples) for cut in cuts)):
        found.append(stream.push(piece))
    assert np.array_equal(np.concatenate([*found, stream.finish()]), mel_plane(SPEC, short))


SEGMENTS = card((1024,), segment_samples=4000, segment_stride=3960)


def naive(spec, samples, starts):
    """Frame by frame, with librosa's filters."""
    bank = librosa.filters.mel(
        sr=spec.sample_rate,
        n_fft=spec.fft,
        n_mels=spec.bands,
        fmax=spec.high_hz,
        htk=spec.scale == "htk",
        norm=None,
        dtype=np.float64,
    )
    hann, margin, found = get_window("hann", spec.window), (spec.window - spec.hop_length) // 2, []
    wave = np.pad(samples.astype(np.float64), (margin, spec.window))
    for start in starts:
        power = bank @ np.abs(np.fft.rfft(wave[start : start + spec.window] * hann, spec.fft)) ** 2
        found.append(np.log10(np.maximum(power / (hann.sum() / 2) ** 2, 1e-30)))
    return np.clip((np.array(found) - LOW) / (HIGH - LOW) * 255, 0, 255)


@SCALES
@pytest.mark.parametrize("bands", [1, 13, 256])
def test_any_number_of_bands(bands, scale):
    spec = MelSpec.for_codec(bands, card((1024,)), scale)
    expected = naive(spec, WAVE[:9_999], range(0, 9_999, 320))
    assert np.abs(mel_plane(spec, WAVE[:9_999]) - expected).max() <= 0.5 + 1e-6
    if bands == 256:
        assert spec.fft > spec.window, "no filter may be empty with a transform as long as the window"
        assert (mel_plane(spec, WAVE)[50] > 0).all()


@pytest.mark.parametrize("bands", [0, 257])
def test_bands_out_of_range_are_refused(bands):
    with pytest.raises(UserError, match="must be from 1 to 256 bands"):
        MelSpec.for_codec(bands, card((1024,)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 13_000), st.lists(st.integers(0, 13_000), max_size=5))
def test_a_codec_with_segments_has_the_columns_of_each_segment(samples, cuts):
    spec, starts = MelSpec.for_codec(7, SEGMENTS), []
    for begin in range(0, samples, 3960):
        starts += range(begin, min(begin + 4000, samples), 320)
    stream, stereo = MelStream(spec), np.stack([WAVE[:samples], WAVE[1 : samples + 1]])
    pieces = np.split(stereo, sorted(min(cut, samples) for cut in cuts), axis=1)
    plane = np.concatenate([*(stream.push(piece) for piece in pieces), stream.finish()])
    assert len(plane) == len(starts) == SEGMENTS.frames_of(samples)
    assert np.abs(plane - naive(spec, stereo.mean(axis=0), starts)).max() <= 0.5 + 1e-4


@given(st.integers(1, 5_000), st.integers(8, 700))
@example(965, 9)  # an odd hop: the window reaches one sample further to the right than to the left
@settings(max_examples=40, deadline=None)
def test_one_column_a_frame(samples, hop):
    made = replace(card((1024,)), hop_length=hop)
    assert len(mel_plane(MelSpec.for_codec(4, made), WAVE[:samples])) == made.frames_of(samples)


def test_memory_does_not_grow_with_the_wave():
    stream, noise = MelStream(SPEC), np.zeros(20_000, np.float32)
    for _ in range(50):
        stream.push(noise)
    assert len(stream._wave) < 2 * SPEC.window


def test_a_window_hardly_reaches_into_the_next_frame():
    weight = get_window("hann", SPEC.window) ** 2
    assert weight[: (SPEC.window - SPEC.hop_length) // 2].sum() / weight.sum() < 0.0105


def test_a_description_of_before_the_padded_transform_is_read():
    later = ("fft", "scale", "segment_samples", "segment_stride")
    values = {k: v for k, v in SPEC.to_dict().items() if k not in later}
    assert MelSpec.from_dict(values) == replace(SPEC, scale="htk")


@pytest.mark.parametrize(
    "change", [{"bands": 10**9}, {"bands": "80"}, {"window": 0}, {"scale": "bark"}, {"color": "blue"}]
)
def test_an_impossible_description_is_refused(change):
    with pytest.raises(UserError, match="mel plane"):
        MelSpec.from_dict(SPEC.to_dict() | change)


@pytest.fixture
def dataset(audio_folder, tmp_path, hashcodec):
    def make(name, **options):
        config = dict(
            sources=(str(audio_folder),), codec="hash_16khz", workers=0, mel_bands=80, shard_inputs=6, block_inputs=4
        )
        for task in range(options.get("tasks", 1)):
            run(TokenizeConfig(output=tmp_path / name, task=task, **{**config, **options}))
        return tmp_path / name

    return make


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_shards_hold_the_plane_next_to_unchanged_codes(dataset, audio_folder):
    whole, without, coded = dataset("a"), dataset("b", mel_bands=None), dataset("c", entropy_code=True)
    with_mel, plain, compressed = Shards(whole), Shards(without), Shards(coded)
    assert plain.mel_spec is None
    assert len(with_mel) == len(plain) > 5
    from codecssl.tokenize.sources.audio import read_wave

    for index, utterance in enumerate(with_mel.utterances()):
        assert np.array_equal(with_mel.codes(index), plain.codes(index))
        expected = mel_plane(SPEC, read_wave(audio_folder / utterance.path, 16_000))
        assert np.array_equal(with_mel.mel(index), expected)
        assert np.array_equal(compressed.mel(index), expected)
        assert np.array_equal(with_mel.mel(index, start=1, stop=len(expected)), expected[1:])
    with pytest.raises(UserError, match="--with-mel 80"):
        plain.mel(0)


def test_the_bytes_do_not_depend_on_the_division_of_the_work(dataset):
    assert files(dataset("one")) == files(dataset("three", tasks=3))


def test_another_plane_is_another_dataset(dataset):
    dataset("a")
    with pytest.raises(UserError, match="begun with mel"):
        dataset("a", mel_bands=40)
    with pytest.raises(UserError, match="begun with mel"):
        dataset("a", mel_scale="slaney")


def test_a_folder_that_was_begun_keeps_its_scale(dataset):
    """A plan.json of before there was a choice names no scale: it is htk. Slaney's folder is finished in slaney."""
    for scale in ("htk", "slaney"):
        root, whole = dataset(scale, mel_scale=scale), dataset(f"whole {scale}", mel_scale=scale)
        if scale == "htk":
            plan = json.loads((root / "plan.json").read_text())
            del plan["mel"]["scale"], plan["check"]
            (root / "plan.json").write_bytes(to_json(sealed(plan)))
        for name in ("shards/00001.tar", "shards/00001.json", "dataset.json"):
            (root / name).unlink()
        dataset(scale)
        assert Shards(root).mel_spec == Shards(whole).mel_spec
        assert Shards(root).mel_spec.scale == scale
        assert (root / "shards" / "00001.tar").read_bytes() == (whole / "shards" / "00001.tar").read_bytes()


def test_a_damaged_plane_is_found_named_and_repaired(dataset):
    root = dataset("a")
    before, tar = files(root), root / "shards" / "00001.tar"
    content = bytearray(tar.read_bytes())
    blocks = Shards(root).blocks
    first = int(blocks["first"][blocks["shard"] == 1][0])
    plane = Shards(root).mel(first).tobytes()
    content[bytes(content).index(plane) + len(plane) // 2] ^= 4
    tar.write_bytes(content)
    with pytest.raises(UserError, match="log-mel plane of utterance"):
        Shards(root).mel(first)
    damages = [str(damage) for damage in examine(root, sample=0).damages]
    assert any("log-mel plane of utterance" in damage for damage in damages), damages
    repair(root, workers=0)
    assert files(root) == before


@pytest.mark.parametrize("entropy_code", [False, True])
def test_a_killed_run_ends_with_the_same_bytes(dataset, tmp_path, monkeypatch, entropy_code):
    read = encode_module.read
    monkeypatch.setattr(encode_module, "GROUP_INPUTS", 2)
    for stop_after in (1, 5, 6):
        left = iter(range(stop_after))

        def dying(item, card, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return read(item, card)

        monkeypatch.setattr(encode_module, "read", dying)
        with pytest.raises(KeyboardInterrupt):
            dataset("killed", entropy_code=entropy_code)
    monkeypatch.setattr(encode_module, "read", read)
    assert files(dataset("killed", entropy_code=entropy_code)) == files(dataset("whole", entropy_code=entropy_code))


def test_long_inputs_and_a_gpus_readers_compute_the_same_plane(audio_folder, hashcodec, monkeypatch):
    codec = hashcodec.HashCodec()
    items = [item for item in read_sources([str(audio_folder)]) if item.path.endswith((".wav", ".flac"))]

    def planes(device):
        found = encode_inputs(Device(codec="", num_codebooks=None, device=device), codec, items, 0, SPEC)
        return {u.id: u.mel for u in found if hasattr(u, "codes")}

    expected = planes("cpu")
    monkeypatch.setattr(encode_module, "mel_plane", _once_per_wave())
    by_readers = planes("cuda")  # the codec of this test is on no device
    monkeypatch.setattr(encode_module, "mel_plane", mel_plane)
    monkeypatch.setattr(encode_module, "LONG_SECONDS", 0.1)
    streamed = planes("cpu")
    assert len(expected) > 5
    for id, plane in expected.items():
        assert np.array_equal(by_readers[id], plane)
        assert np.array_equal(streamed[id], plane)


def _once_per_wave():
    seen = set()

    def compute(spec, wave):
        assert wave.tobytes() not in seen, "the reader's plane must be used"
        seen.add(wave.tobytes())
        return mel_plane(spec, wave)

    return compute


def test_every_flipped_bit_of_the_member_is_found(dataset):
    """Header, content and filling: verify reports it and never raises."""
    root = dataset("a", shard_inputs=100, block_inputs=3)
    tar = root / "shards" / "00000.tar"
    with tarfile.open(tar) as file:
        member = next(m for m in file if m.name.endswith(".mel"))
    whole, end = tar.read_bytes(), member.offset_data + member.size
    for at in (member.offset, member.offset + 130, member.offset + 150, member.offset_data, end - 1, end):
        content = bytearray(whole)
        content[at] ^= 1
        tar.write_bytes(content)
        assert examine(root).damages, f"byte {at}"
    tar.write_bytes(whole[: end - 5])
    assert examine(root).damages
    tar.write_bytes(whole)
    assert not examine(root).damages


def test_stats_print_the_size_of_the_plane(dataset):
    with_mel, without = stats(dataset("a")), stats(dataset("b", mel_bands=None))
    assert with_mel["mel_bytes"] == 80 * with_mel["frames"]
    assert with_mel["mel_bands"] == 80
    assert without["mel_bytes"] == 0
    assert abs(with_mel["stored_bits_per_code"] / without["stored_bits_per_code"] - 1) < 0.5, "the plane must not count"
    assert [line for line in lines(with_mel) if "80 bands, 32." in line]
    assert not [line for line in lines(without) if "log-mel" in line]


def test_webdataset_samples_have_their_planes(dataset):
    webdataset = pytest.importorskip("webdataset")
    root = dataset("a")
    shards = Shards(root)
    urls = [str(tar) for tar in sorted((root / "shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).compose(utterances))
    assert len(samples) == len(shards)
    for index, sample in enumerate(samples):
        assert np.array_equal(sample["mel"], shards.mel(index))


def test_a_scale_without_a_plane_is_refused(audio_folder, tmp_path):
    with pytest.raises(UserError, match="--mel-scale slaney: .*add --with-mel 80"):
        TokenizeConfig(sources=(str(audio_folder),), output=tmp_path, mel_scale="slaney")
