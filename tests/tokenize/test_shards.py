"""The format: round trips, strangers that read it, its size, and damage that verify must find."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import webdataset

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.errors import UserError
from codecssl.tokenize.shards import Shards, utterance_bytes
from codecssl.tokenize.verify import verify
from codecssl.tokenize.writer import Encoded, ShardWriter, finish_dataset, write_shards


def card(sizes, per_frame=None):
    return CodecCard(
        name="made",
        weights="made",
        weights_sha256="0" * 64,
        sample_rate=16_000,
        hop_length=320,
        codebook_sizes=tuple(sizes),
        codes_per_frame=tuple(per_frame or (1,) * len(sizes)),
        latent_dim=4,
    )


def codes_for(card, frames, rng):
    return np.stack([rng.integers(0, size, frames) for size in card.codebook_sizes]).astype(np.uint16)


@pytest.mark.parametrize("seed", range(6))
def test_round_trip_over_random_codebooks_and_lengths(tmp_path, seed):
    rng = np.random.default_rng(seed)
    made = card(rng.choice([2, 16, 1000, 1024, 2048, 65536], int(rng.integers(1, 10))).tolist())
    items = [(f"u{i}", codes_for(made, int(rng.integers(1, 900)), rng), {"n": i}) for i in range(50)]
    shards = write_shards(tmp_path / "d", made, items, per_shard=17)
    assert len(shards) == 50
    assert verify(tmp_path / "d") == []
    for index in rng.permutation(50):
        name, codes, labels = items[index]
        assert np.array_equal(shards.codes(int(index)), codes)
        a, b = sorted(rng.integers(0, codes.shape[1] + 1, 2).tolist())
        k = int(rng.integers(1, made.num_codebooks + 1))
        assert np.array_equal(shards.codes(int(index), num_codebooks=k, start=a, stop=b), codes[:k, a:b])
        assert (shards.utterance(int(index)).id, shards.utterance(int(index)).labels) == (name, labels)
    assert np.array_equal(pickle.loads(pickle.dumps(shards)).codes(7), items[7][1])


def test_codebooks_at_different_rates(tmp_path):
    made, rng = card([4096, 4096, 4096], [1, 2, 4]), np.random.default_rng(0)
    planes = [[rng.integers(0, 4096, t * r).astype(np.uint16) for r in (1, 2, 4)] for t in (5, 31, 64)]
    writer = ShardWriter(tmp_path, 0, made)
    items = [
        Encoded(
            id=str(i),
            path=str(i),
            codes=p,
            samples=len(p[0]) * 320,
            source_sha256="ab" * 32,
            source_rate=16_000,
            source_samples=1,
        )
        for i, p in enumerate(planes)
    ]
    writer.add_block(3, items, [])
    writer.finish("")
    finish_dataset(tmp_path, {"codec": made.to_dict()}, 1)
    shards = Shards(tmp_path)
    for i, expected in enumerate(planes):
        assert all(np.array_equal(a, b) for a, b in zip(shards.planes(i), expected))
    assert [len(p) for p in shards.planes(1, start=3, stop=5)] == [2, 4, 8]
    with pytest.raises(UserError, match="run at different rates"):
        shards.codes(0)


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
        Encoded(
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
    utterances = [Encoded(**vars(u) | {"path": u.id, "source_samples": u.samples}) for u in utterances]
    writer = ShardWriter(tmp_path, 0, made)
    for start in (0, 1440):
        writer.add_block(1440, utterances[start : start + 1440], [])
    writer.finish("")
    finish_dataset(tmp_path, {"codec": made.to_dict(), "sources": ["x"]}, 1)
    stored = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    overhead = stored / (2880 * 250 * 8 * 10 / 8) - 1
    assert overhead < 0.02


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
    mark = json.loads((dataset / "shards/00001.json").read_text())
    damage(tar, mark["blocks"][0]["codes_offset"] + 77)
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


def test_strangers_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match=r"no dataset\.json; this is not a folder of token shards"):
        Shards(tmp_path)
    header = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(header | {"format_version": 2}))
    with pytest.raises(UserError, match="format version 2, this codecssl reads up to 1"):
        Shards(dataset)
    with pytest.raises(UserError, match="holds a dataset already"):
        write_shards(dataset, card([4]), [])


def test_the_tar_is_a_plain_one(dataset):
    with tarfile.open(dataset / "shards/00000.tar") as tar:
        assert tar.getnames() == ["00000-00000.json.gz", "00000-00000.npz", "00000-00000.codes"]
        assert {(m.mtime, m.uid, m.mode) for m in tar} == {(0, 0, 0o644)}
        numbers = np.load(io.BytesIO(tar.extractfile("00000-00000.npz").read()))
        assert numbers["sha256"].shape == (10, 32)
