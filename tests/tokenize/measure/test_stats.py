"""Entropies of sources whose entropy is known, FLAC's size from files that are FLAC, and the picture."""

import hashlib
import json

import numpy as np
import pytest
import soundfile
from helpers import card

from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset
from codecssl.tokenize.measure.entropies import conditional_entropy, corrected_entropy, entropy
from codecssl.tokenize.measure.stats import lines, stats
from codecssl.tokenize.measure.stats_sample import take_sample
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.write_codes import write_shards


def test_the_order_0_entropy_is_not_that_of_the_sample():
    rng = np.random.default_rng(0)
    counts = [np.bincount(rng.integers(0, 1024, 6000), minlength=1024) for _ in range(20)]
    assert np.mean([entropy(c) for c in counts]) < 9.9
    assert np.mean([corrected_entropy(c) for c in counts]) == pytest.approx(10.0, abs=0.02)
    assert corrected_entropy(np.zeros(8, int)) == corrected_entropy(np.array([0, 7])) == 0.0


def test_a_conditional_entropy_of_little_data_pretends_nothing():
    """1,000 codes under 1,000 contexts: the histograms alone give an entropy near zero."""
    rng = np.random.default_rng(1)
    codes, contexts, utterance = rng.integers(0, 64, 1000), rng.integers(0, 1000, 1000), np.arange(1000) // 10
    assert 5.9 < conditional_entropy(codes, contexts, utterance, 64) < 6.3
    assert conditional_entropy(codes[:90], contexts[:90], utterance[:90], 64) is None  # nine utterances


def test_entropies_of_sources_that_are_known(tmp_path):
    """Codebook 0 repeats with probability 0.9, else draws of 16; 1 is 0 plus one of four; 2 (two per frame) is 1."""
    rng = np.random.default_rng(2)
    items = []
    for i in range(100):
        moves = rng.random(2000) < 0.1
        moves[0] = True
        coarse = rng.integers(0, 16, 2000)[np.maximum.accumulate(np.where(moves, np.arange(2000), 0))]
        finer = (coarse + rng.integers(0, 4, 2000)) % 16
        items.append((str(i), np.stack([coarse, finer, finer, finer]), {}))
    write_shards(tmp_path, card([16, 16, 16], [1, 1, 2]), items)
    found = stats(tmp_path)
    p = np.full(16, 0.1 / 16)
    p[0] += 0.9
    books = found["codebooks"]
    assert books[0]["entropy_bits"] == pytest.approx(4.0, abs=0.02)
    assert books[0]["bits_given_previous"] == pytest.approx(-(p * np.log2(p)).sum(), rel=0.05)
    assert books[0]["bits_given_coarser"] is None
    assert books[1]["bits_given_coarser"] == pytest.approx(2.0, abs=0.02)
    assert books[2]["bits_given_coarser"] == pytest.approx(0.0, abs=0.02)
    assert books[2]["bits_given_previous"] > 1.0  # every other one is new
    assert [b["used"] for b in books] == [16, 16, 16]
    assert found["codes_per_second"] == 200.0
    assert found["codes"] == 100 * 2000 * 4


def test_the_first_code_of_an_utterance_has_none_before_it(tmp_path):
    items = [(str(i), np.full((1, 5), i % 16), {}) for i in range(320)]
    write_shards(tmp_path, card([16]), items)
    [book] = stats(tmp_path)["codebooks"]
    assert book["bits_given_previous"] < 0.1  # each utterance holds one code


@pytest.mark.parametrize("entropy_code", [False, True])
def test_totals_and_lines(tmp_path, entropy_code):
    rng = np.random.default_rng(3)
    items = [(f"u{i}", np.minimum(rng.geometric(0.05, (2, 500)), 1023), {}) for i in range(30)]
    write_shards(tmp_path, card([1024, 1024]), items, entropy_code=entropy_code)
    found = stats(tmp_path)
    stored = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) * 8
    assert found["stored_bits_per_code"] == stored / 30_000
    assert found["ratio_to_pcm16"] == 300 * 16_000 * 16 / stored
    assert found["nominal_bits_per_code"] == 10.0
    assert (found["stored_bits_per_code"] < 8.5) == entropy_code
    text = "\n".join(lines(found))
    for part in (
        f"{found['stored_bits_per_code']:.3f} stored in all files, 10.000 nominal",
        "made, 2 codebooks, 50 frames/s, 100 codes/s",
        "FLAC     not measured: the dataset names no sources",
        f"{found['codebooks'][1]['entropy_bits']:.3f}",
        f"{found['codebooks'][1]['bits_given_coarser']:.3f}",
    ):
        assert part in text
    json.dumps(found)


def test_a_sample_is_evenly_spaced(tmp_path):
    items = [(str(i), np.full((2, 10), i), {}) for i in range(100)]
    shards = write_shards(tmp_path, card([128, 128]), items)
    sample = take_sample(shards, max_codes=500)
    assert sample.frames.tolist() == [10] * 25
    assert [np.unique(plane).tolist() for plane in sample.planes] == [list(range(0, 100, 4))] * 2


def test_an_empty_dataset_has_stats(tmp_path):
    (tmp_path / "d").mkdir()
    write_shards(tmp_path / "d", card([16]), [])
    found = stats(tmp_path / "d", plot=tmp_path / "stats.png")
    assert found["codebooks"][0]["entropy_bits"] == 0.0
    assert len(lines(found)) == 9
    assert (tmp_path / "stats.png").exists()


def with_sources(root, folder):
    """A dataset whose sources are the files of `folder`, 16 kHz FLAC; the bytes of all of them, and their seconds."""
    made, utterances, size, seconds = card([1024]), [], 0, 0.0
    for path in sorted(folder.iterdir()):
        samples = len(soundfile.read(path)[0])
        frames = made.frames_of(samples)
        utterances.append(
            EncodedUtterance(
                id=path.name,
                path=path.name,
                codes=[np.zeros(frames, int)],
                samples=samples,
                source_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                source_rate=16_000,
                source_samples=samples,
            )
        )
        size, seconds = size + path.stat().st_size, seconds + samples / 16_000
    writer = ShardWriter(root, 0, made)
    writer.add_block(len(utterances), utterances, [])
    writer.finish("")
    finish_dataset(root, {"codec": made.to_dict(), "sources": [str(folder)]}, 1)
    return size, seconds


@pytest.fixture
def flac_folder(tmp_path):
    (tmp_path / "audio").mkdir()
    rng = np.random.default_rng(4)
    for i in range(3):
        wave = 0.1 * np.cumsum(rng.standard_normal(16_000 * (i + 1))) / 40
        soundfile.write(tmp_path / f"audio/{i}.flac", wave.clip(-1, 1), 16_000, subtype="PCM_16")
    return tmp_path / "audio"


def test_flac_is_measured_on_the_sources(tmp_path, flac_folder):
    size, seconds = with_sources(tmp_path / "d", flac_folder)
    found = stats(tmp_path / "d")
    stored = sum(f.stat().st_size for f in (tmp_path / "d").rglob("*") if f.is_file())
    # the files are FLAC of these very samples: what our encoder makes of them is as large
    assert found["ratio_to_flac"] == pytest.approx(size / stored, rel=0.01)
    assert found["flac_files"] == 3
    assert seconds == pytest.approx(found["hours"] * 3600)
    assert f"FLAC by {found['ratio_to_flac']:.1f} x (16 bit, 3 of the sources)" in "\n".join(lines(found))


def test_flac_is_left_out_where_sources_are_gone_or_others(tmp_path, flac_folder):
    with_sources(tmp_path / "d", flac_folder)
    for path in flac_folder.iterdir():
        soundfile.write(path, np.zeros(100), 16_000)
    found = stats(tmp_path / "d")
    assert found["ratio_to_flac"] is None
    assert "none of the sources is there as it was" in found["without_flac"]
    for path in flac_folder.iterdir():
        path.unlink()
    flac_folder.rmdir()
    assert "no such file or folder" in stats(tmp_path / "d")["without_flac"]


def test_the_picture_is_a_png_of_the_data(tmp_path):
    rng = np.random.default_rng(5)
    items = [(str(i), rng.integers(0, 16, (20, 50 + i)), {}) for i in range(12)]
    write_shards(tmp_path / "d", card([16] * 20), items)
    stats(tmp_path / "d", plot=tmp_path / "stats.png")
    from matplotlib.image import imread

    picture = imread(tmp_path / "stats.png")
    assert picture.shape[:2] == (880, 1320)
    quarters = [picture[y : y + 380, x : x + 600, :3] for y in (40, 460) for x in (40, 700)]
    assert all((quarter.min(axis=-1) < 0.9).mean() > 0.02 for quarter in quarters)  # none is empty
    assert not list((tmp_path / "d").glob("*.png"))
    assert len(Shards(tmp_path / "d")) == 12
