"""The format: round trips, strangers that read it, its size, and damage that verify must find."""

import io
import json
import pickle
import re
import shutil
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import webdataset
from helpers import card, verify

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format import entropy
from codecssl.tokenize.format.blocks import packed_again
from codecssl.tokenize.format.layout import (
    from_planes,
    load_json,
    read_coder,
    read_columns,
    stored_bytes,
    to_planes,
    utterance_bytes,
)
from codecssl.tokenize.format.records import EncodedUtterance, Failure
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.write_codes import write_shards

SEGMENT = entropy.SEGMENT_FRAMES


def codes_for(card, frames, rng):
    """Random codes [R, T]."""
    rows = [size for size, n in zip(card.codebook_sizes, card.codes_per_frame) for _ in range(n)]
    return np.stack([rng.integers(0, size, frames) for size in rows]).astype(np.uint16)


@pytest.mark.parametrize("entropy_code", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_round_trip_over_random_codebooks_and_lengths(tmp_path, seed, entropy_code):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 10))
    rates = sorted(rng.choice([1, 2, 4], count).tolist()) if seed % 2 else [1] * count
    made = card(rng.choice([2, 16, 100, 1000, 1024] + [65536] * (not entropy_code), count).tolist(), rates)
    lengths = [*rng.integers(1, 900, 10).tolist(), 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT + 5]
    items = [(f"u{i}", codes_for(made, length, rng), {"n": i}) for i, length in enumerate(lengths)]
    shards = write_shards(tmp_path / "d", made, items, per_shard=9, entropy_code=entropy_code)
    assert (len(shards), shards.entropy_coded) == (len(items), entropy_code)
    assert verify(tmp_path / "d") == []
    rows = np.cumsum([0, *rates])
    for index in rng.permutation(len(items)).tolist():
        name, codes, labels = items[index]
        read = shards.codes(index)
        assert read.dtype == np.uint16
        assert np.array_equal(read, codes)
        a, b = sorted(rng.integers(0, codes.shape[1] + 1, 2).tolist())
        k = int(rng.integers(1, made.num_codebooks + 1))
        cropped = shards.codes(index, num_codebooks=k, start=a, stop=b)
        assert np.array_equal(cropped, codes[: rows[k], a:b])
        assert [p.tolist() for p in shards.planes(index, num_codebooks=k, start=a, stop=b)] == [
            codes[rows[j] : rows[j + 1], a:b].T.ravel().tolist() for j in range(k)
        ]
        assert (shards.utterance(index).id, shards.utterance(index).labels) == (name, labels)
    assert np.array_equal(pickle.loads(pickle.dumps(shards)).codes(7), items[7][1])


def test_rows_of_codebooks_at_different_rates():
    """Row j of a codebook with n codes a frame holds its codes j, n + j, ..."""
    made = card([4096, 4096, 4096], [1, 2, 4])
    codes = np.stack([np.arange(3), *(10 * n + np.arange(3) for n in range(1, 7))])
    planes = to_planes(codes, made)
    assert [p.tolist() for p in planes] == [
        [0, 1, 2],
        [10, 20, 11, 21, 12, 22],
        [30, 40, 50, 60, 31, 41, 51, 61, 32, 42, 52, 62],
    ]
    assert np.array_equal(from_planes(planes, made), codes)
    assert np.array_equal(from_planes(planes[:2], made), codes[:3])


@pytest.mark.parametrize("entropy_code", [False, True])
def test_places_out_of_range_are_an_index_error(tmp_path, entropy_code):
    made = card([16, 16])
    shards = write_shards(tmp_path, made, [("a", np.zeros((2, 9), int), {})], entropy_code=entropy_code)
    for arguments in [{"start": -1}, {"stop": 10}, {"start": 5, "stop": 4}, {"num_codebooks": 0}, {"num_codebooks": 3}]:
        with pytest.raises(IndexError):
            shards.codes(0, **arguments)
    for index in (-1, 1):
        with pytest.raises(IndexError, match="the dataset has 1"):
            shards.codes(index)
    assert shards.codes(0, start=4, stop=4).shape == (2, 0)
    with pytest.raises(UserError, match=r"expected \[2, T\]"):
        write_shards(tmp_path / "other", made, [("a", np.zeros((3, 9), int), {})])


@pytest.mark.parametrize("entropy_code", [False, True])
def test_an_utterance_is_found_by_its_id(tmp_path, entropy_code):
    ids = ["a/1", 'quo"ted', "ünï", "a", "a/12"] + [f"x{i}" for i in range(20)]
    shards = write_shards(
        tmp_path,
        card([4]),
        [(id, np.zeros((1, 3), int), {"a": "x99"}) for id in ids],
        per_shard=4,
        entropy_code=entropy_code,
    )
    assert [shards.find(id) for id in ids] == list(range(len(ids)))
    assert list(shards.ids()) == ids
    with pytest.raises(UserError, match="id 'x99': not in .*; ids look like 'a/1'"):  # a label only
        shards.find("x99")


@pytest.mark.parametrize("entropy_code", [False, True])
def test_scales_of_segments_are_kept(tmp_path, entropy_code):
    made = card([1024], channels=2, segment_samples=3200, segment_stride=3168)
    rng = np.random.default_rng(0)
    frames = [made.frames_of(samples) for samples in (1, 3168, 3169, 20_000)]
    segments = [1, 1, 2, 7]
    scales = [rng.random(n).astype(np.float32) for n in segments]
    items = [(str(i), codes_for(made, t, rng), {}, s) for i, (t, s) in enumerate(zip(frames, scales))]
    shards = write_shards(tmp_path / "d", made, items, entropy_code=entropy_code)
    for i, expected in enumerate(scales):
        assert shards.utterance(i).scales.tolist() == expected.tolist()
        assert np.array_equal(shards.codes(i), items[i][1])
    with pytest.raises(UserError, match="0: 2 scales, made has 1 for it"):
        write_shards(tmp_path / "e", made, [("0", items[0][1], {}, [1.0, 2.0])])
    without = write_shards(tmp_path / "f", card([4]), [("0", np.zeros((1, 3), int), {})])
    assert without.utterance(0).scales is None


def test_a_stock_webdataset_reads_the_members(tmp_path):
    made, rng = card([1024] * 4), np.random.default_rng(0)
    items = [(f"u{i}", codes_for(made, 100 + i, rng), {"speaker": "s"}) for i in range(20)]
    write_shards(tmp_path, made, items)
    blocks = list(webdataset.WebDataset(str(tmp_path / "shards/00000.tar"), shardshuffle=False).decode())
    assert len(blocks) == 1
    assert blocks[0]["json.gz"]["id"] == [f"u{i}" for i in range(20)]
    assert blocks[0]["npz"]["samples"].tolist() == [(100 + i) * 320 for i in range(20)]
    assert len(blocks[0]["codes"]) == utterance_bytes(np.arange(100, 120), made).sum()


def test_all_files_together_cost_at_most_two_percent_over_the_nominal_bits(tmp_path):
    """5 s each, 8 x 10 bits at 50 Hz, named as corpora name them, two blocks of 2 h: the hardest case promised."""
    made, rng = card([1024] * 8), np.random.default_rng(0)
    utterances = [
        EncodedUtterance(
            id=f"common_voice_en_{rng.integers(10**7, 10**8)}.mp3",
            path="",
            codes=list(codes_for(made, 250, rng)),
            samples=80_000 - int(rng.integers(0, 320)),
            source_sha256=rng.bytes(32).hex(),
            source_rate=16_000,
            source_samples=0,
        )
        for _ in range(2880)
    ]
    utterances = [EncodedUtterance(**vars(u) | {"path": u.id, "source_samples": u.samples}) for u in utterances]
    writer = ShardWriter(tmp_path, 0, made)
    for start in (0, 1440):
        writer.add_block(1440, utterances[start : start + 1440], [])
    writer.finish("")
    finish_dataset(tmp_path, {"codec": made.to_dict(), "sources": ["x"]}, 1)
    stored = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    overhead = stored / (2880 * 250 * 8 * 10 / 8) - 1
    assert overhead < 0.02


def lively(made, frames, rng):
    """Codes that hold on for a while, the finer ones after the coarsest: what speech is like."""
    holds = np.maximum.accumulate(np.where(rng.random(frames) < 0.5, np.arange(frames), 0))
    p = np.arange(1, made.codebook_sizes[0] + 1) ** -0.8
    coarse = rng.choice(len(p), frames, p=p / p.sum())[holds]
    finer = [(coarse * (3 + k) + rng.integers(0, 20, frames)) % size for k, size in enumerate(made.codebook_sizes[1:])]
    return np.stack([coarse, *finer]).astype(np.uint16)


def test_compressed_files_together_are_below_the_order_0_entropy(tmp_path):
    made, rng = card([256] * 4), np.random.default_rng(0)
    items = [(f"clip_{i:05d}.wav", lively(made, 250, rng), {}) for i in range(400)]
    write_shards(tmp_path, made, items, entropy_code=True)
    stored = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) * 8
    entropy = 0.0
    for k in range(4):
        counts = np.bincount(np.concatenate([codes[k] for _, codes, _ in items]))
        entropy -= float((counts * np.log2(counts / counts.sum(), where=counts > 0, out=np.zeros(len(counts)))).sum())
    assert stored < 0.95 * entropy


def test_a_compressed_shard_does_not_depend_on_kills(tmp_path):
    made, rng = card([64] * 3), np.random.default_rng(0)
    utterances = [encoded(str(i), lively(made, int(rng.integers(1, 400)), rng)) for i in range(30)]
    for kills in (False, True):
        root = tmp_path / str(kills)
        writer = ShardWriter(root, 0, made, entropy_code=True)
        for block in range(3):
            if kills:
                writer = ShardWriter(root, 0, made, entropy_code=True)
                assert writer.done == 10 * block
            writer.add_block(10, utterances[10 * block : 10 * block + 10], [])
        if kills:  # in the middle of its last file
            (root / "shards").mkdir()
            (root / "shards/.00000.tar.77.tmp").write_bytes(b"half a tar")
        writer.finish("x")
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("False", "True")]
    assert files[0] == files[1]
    for name in ("00000.tar", "00000.json"):
        assert (tmp_path / "False/shards" / name).read_bytes() == (tmp_path / "True/shards" / name).read_bytes()


def encoded(id, codes):
    return EncodedUtterance(
        id=id,
        path=id,
        codes=list(codes),
        samples=codes.shape[1] * 320,
        source_sha256="ab" * 32,
        source_rate=16_000,
        source_samples=codes.shape[1] * 320,
    )


def test_records_of_entropy_coded_blocks_hold_the_packed_crc32(tmp_path):
    made, rng = card([64] * 3), np.random.default_rng(0)
    items = [(str(i), lively(made, int(rng.integers(1, 2 * SEGMENT)), rng), {}) for i in range(12)]
    compressed = write_shards(tmp_path / "c", made, items, per_shard=6, entropy_code=True)
    write_shards(tmp_path / "p", made, items, per_shard=6)
    for shard in range(2):
        records = [json.loads((tmp_path / d / f"shards/{shard:05d}.json").read_text()) for d in "cp"]
        assert [m["format_version"] for m in records] == [2, 1]
        [place], [plain] = (m["blocks"] for m in records)
        tar = tmp_path / f"c/shards/{shard:05d}.tar"
        codes = tar.read_bytes()[place["codes_offset"] :][: place["codes_bytes"]]
        with tar.open("rb") as file:
            numbers = read_columns(file, place["offset"])[1]
        sizes = stored_bytes(numbers, compressed.frames[6 * shard : 6 * shard + 6], made)
        assert len(sizes) == 6
        assert sizes.sum() == len(codes)
        assert zlib.crc32(codes) == place["crc32"]
        again = packed_again(codes, numbers, read_coder(tar, made), made)
        assert zlib.crc32(again) == place["packed_crc32"] == plain["crc32"]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", ["tables", "codes"])
def test_damage_of_a_compressed_shard_is_a_clear_error(tmp_path, name, check):
    """Without the CRC-32, damaged codes may decode to other codes."""
    made, rng = card([64] * 3), np.random.default_rng(0)
    items = [(str(i), lively(made, 300, rng), {}) for i in range(4)]
    write_shards(tmp_path, made, items, entropy_code=True)
    path = tmp_path / "shards/00000.tar"
    content = bytearray(path.read_bytes())
    place = json.loads(path.with_suffix(".json").read_text())["blocks"][0]
    first, size = (512, 600) if name == "tables" else (place["codes_offset"], place["codes_bytes"])
    content[first : first + size] = rng.bytes(size)
    path.write_bytes(content)
    shards, refused = Shards(tmp_path, check=check), 0
    for i in range(4):
        try:
            assert not np.array_equal(shards.codes(i), items[i][1])
        except UserError as error:
            assert re.search("tables are damaged|cannot be decoded|the codes of utterances 0 to 3", str(error))
            refused += 1
    assert refused == 4 if check else refused > 0


def test_finishing_holds_one_shard_in_memory_and_matches_numpy(tmp_path):
    made = card([16])
    writer = ShardWriter(tmp_path, 0, made)
    utterances = [encoded(str(i), np.zeros((1, frames), int)) for i, frames in enumerate((3, 70_000, 5))]
    failures = [Failure(id=str(i), path=str(i), reason="x" * 100) for i in range(1500)]
    writer.add_block(1503, utterances, failures)
    writer.finish("")
    record = load_json(tmp_path / "shards/00000.json")
    for shard in range(1, 16):
        shutil.copy(tmp_path / "shards/00000.tar", tmp_path / f"shards/{shard:05d}.tar")
        (tmp_path / f"shards/{shard:05d}.json").write_text(json.dumps(record | {"shard": shard}))
    peaks = []
    for shards in (2, 16):
        tracemalloc.start()
        totals = finish_dataset(tmp_path, {"codec": made.to_dict()}, shards)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert (totals["failed"], totals["utterances"], totals["frames"]) == (24_000, 48, 16 * 70_008)
    np.save(buffer := io.BytesIO(), np.array([3, 70_000, 5] * 16, np.uint32))
    assert (tmp_path / "index.npy").read_bytes() == buffer.getvalue()
    np.save(buffer := io.BytesIO(), np.load(tmp_path / "blocks.npy"))
    assert (tmp_path / "blocks.npy").read_bytes() == buffer.getvalue()
    assert np.array_equal(Shards(tmp_path).blocks["first"], np.arange(0, 48, 3))
    assert not list(tmp_path.glob(".*"))


def damage(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


@pytest.fixture
def dataset(tmp_path):
    made, rng = card([1024] * 4), np.random.default_rng(0)
    items = [(f"u{i}", codes_for(made, 100, rng), {}) for i in range(30)]
    write_shards(tmp_path / "d", made, items, per_shard=10)
    return tmp_path / "d"


def test_verify_names_the_shard_and_the_place_of_a_flipped_bit(dataset):
    assert verify(dataset) == []
    tar = dataset / "shards/00001.tar"
    record = json.loads((dataset / "shards/00001.json").read_text())
    damage(tar, record["blocks"][0]["codes_offset"] + 77)
    [line] = verify(dataset)
    assert line.startswith("shard 00001, block 0: codes damaged between offsets")


def test_verify_finds_every_single_flipped_bit(dataset):
    tar = dataset / "shards/00002.tar"
    whole = tar.read_bytes()
    for offset in np.random.default_rng(0).integers(0, len(whole), 40):
        damage(tar, int(offset))
        assert any("shard 00002" in line for line in verify(dataset)), offset
        tar.write_bytes(whole)
    assert verify(dataset) == []


@pytest.mark.parametrize("name", ["shards/00000.tar", "shards/00000.json", "failed.jsonl"])
def test_verify_finds_missing_and_cut_files(dataset, name):
    path = dataset / name
    whole = path.read_bytes()
    path.unlink()
    assert verify(dataset)
    path.write_bytes(whole[: len(whole) // 2] if whole else b"{}\n")
    assert verify(dataset)


@pytest.mark.parametrize("part", [None, 0.0, 0.5])
@pytest.mark.parametrize("name", ["index.npy", "blocks.npy", "shards/00000.tar"])
def test_a_missing_or_cut_file_is_one_line_to_a_reader(dataset, name, part):
    path = dataset / name
    whole = path.read_bytes()
    path.unlink()
    if part is not None:
        path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match=f"{path.name}: cannot be read .*`codecssl-tokenize (repair|verify) "):
        Shards(dataset).codes(9)


def test_damaged_columns_are_one_line_to_a_reader(dataset):
    damage(dataset / "shards/00000.tar", 512 + 40)  # in the compressed text
    for read in (lambda shards: shards.find("u1"), lambda shards: shards.utterance(0)):
        with pytest.raises(UserError, match=r"00000\.tar: cannot be read .*`codecssl-tokenize verify "):
            read(Shards(dataset))


def test_strangers_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match=r"no dataset\.json; this is not a folder of token shards"):
        Shards(tmp_path)
    header = load_json(dataset / "dataset.json")
    (dataset / "dataset.json").write_text(json.dumps(header | {"format_version": 3}))
    with pytest.raises(UserError, match="format version 3, this version reads up to 2"):
        Shards(dataset)
    with pytest.raises(UserError, match="holds a dataset already"):
        write_shards(dataset, card([4]), [])


def test_the_tar_is_a_plain_one(dataset):
    with tarfile.open(dataset / "shards/00000.tar") as tar:
        assert tar.getnames() == ["00000-00000.json.gz", "00000-00000.npz", "00000-00000.codes"]
        assert {(m.mtime, m.uid, m.mode) for m in tar} == {(0, 0, 0o644)}
        numbers = np.load(io.BytesIO(tar.extractfile("00000-00000.npz").read()))
        assert numbers["sha256"].shape == (10, 32)
