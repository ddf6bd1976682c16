"""Damage of any kind in any file is found and named; a sample of utterances is encoded again from its audio."""

import json
import re
import shutil
import tracemalloc

import numpy as np
import pytest
import soundfile
from helpers import card, verify

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.format.layout import load_json, sealed
from codecssl.tokenize.format.records import EncodedUtterance, Failure
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset, to_json
from codecssl.tokenize.integrity.verify import examine
from codecssl.tokenize.run import run
from codecssl.tokenize.shards import Shards

CARD = card((1000, 1024, 16), (1, 1, 2))


def utterance(number, rng):
    frames = int(rng.integers(1, 60))
    codes = [rng.integers(0, size, frames * n) for size, n in zip(CARD.codebook_sizes, CARD.codes_per_frame)]
    return EncodedUtterance(
        id=f"speaker/ü{number}.wav",
        path=f"speaker/ü{number}.wav",
        codes=[c.astype(np.uint16) for c in codes],
        samples=frames * 320 - int(rng.integers(0, 320)),
        source_sha256=rng.bytes(32).hex(),
        source_rate=44_100,
        source_samples=frames * 880,
        labels={"text": "a b", "n": number},
    )


def make(root, entropy_code=False, shards=3):
    """A dataset as `run` leaves it: three shards of two blocks, with failures."""
    rng = np.random.default_rng(0)
    plan = {"codec": CARD.to_dict(), "sources": ["audio"], "inputs": 12 * shards}
    plan |= {
        "compression": "range" if entropy_code else None,
        "shard_inputs": 12,
        "block_inputs": 6,
        "block_seconds": 7e3,
    }
    root.mkdir(parents=True)
    (root / "plan.json").write_bytes(to_json(sealed(plan)))
    for shard in range(shards):
        writer = ShardWriter(root, shard, CARD, entropy_code=entropy_code)
        for block in range(2):
            utterances = [utterance(12 * shard + 6 * block + i, rng) for i in range(5)]
            failures = [Failure(id=f"bad{shard}{block}", path=f"bad{shard}{block}.wav", reason="cannot decode: ¿")]
            writer.add_block(6, utterances, failures)
        writer.finish(rng.bytes(32).hex())
    finish_dataset(root, plan, shards)
    return root


@pytest.fixture(scope="module", params=[False, True], ids=["packed", "compressed"])
def made(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "d", entropy_code=request.param)


@pytest.fixture
def dataset(made, tmp_path):
    shutil.copytree(made, tmp_path / "d", ignore=shutil.ignore_patterns("work"))
    return tmp_path / "d"


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_coder_with_other_codes_is_found(tmp_path):
    """Another version of the library may decode intact bytes to other codes."""
    root = make(tmp_path / "d", entropy_code=True)
    assert verify(root) == []
    record = load_json(root / "shards/00000.json")
    record["blocks"][0]["packed_crc32"] ^= 1
    (root / "shards/00000.json").write_bytes(to_json(sealed(record), indent=None))
    assert verify(root) == ["shard 00000: its first block does not decode to the codes that were encoded"]


def blocks_of(dataset, shard):
    return json.loads((dataset / f"shards/{shard:05d}.json").read_text())["blocks"]


SAME = ({"plan.json", "dataset.json"}, {"failed.jsonl", "shards/00001.json"}, {"shards/00001.tar", "shards/00001.json"})
"""Files that hold the same words: when they differ, either may be named."""


@pytest.mark.parametrize(
    "name",
    ["dataset.json", "plan.json", "index.npy", "blocks.npy", "failed.jsonl", "shards/00001.json", "shards/00001.tar"],
)
def test_any_flipped_bit_in_any_file_is_found_and_named(dataset, name):
    path = dataset / name
    whole = path.read_bytes()
    rng = np.random.default_rng(len(name))
    for bit in rng.integers(0, 8 * len(whole), 30).tolist():
        flip(path, bit)
        try:
            named = {damage.file for damage in examine(dataset).damages}
        except UserError as error:  # a version of the format that is newer, it seems
            named = {"dataset.json"} if "dataset.json: format version" in str(error) else set()
        allowed = {name}.union(*(same for same in SAME if name in same))
        assert named & allowed, f"bit {bit} of {name}: {whole[bit // 8 - 20 : bit // 8 + 20]!r}, named {named}"
        path.write_bytes(whole)
    assert verify(dataset) == []


def test_a_flipped_bit_is_narrowed_down(dataset):
    tar, compressed = dataset / "shards/00001.tar", b'"range"' in (dataset / "plan.json").read_bytes()
    whole, place = tar.read_bytes(), blocks_of(dataset, 1)[1]
    cases = {
        "codes damaged": (place["codes_offset"], place["codes_bytes"], 1),
        "index damaged": (place["offset"] + 512, 40, 1),
        "tar header damaged": (place["codes_offset"] - 512, 100, None),
        "filling damaged": (len(whole) - 1024, 1024, None),
    }
    if compressed:
        cases["tables damaged"] = (512 + 300, 100, None)
    for word, (first, size, block) in cases.items():
        at = first + size // 2
        flip(tar, 8 * at + 3)
        [damage] = examine(dataset).damages
        assert word in str(damage)
        assert (damage.file, damage.shard, damage.block) == ("shards/00001.tar", 1, block)
        assert damage.start <= at < damage.stop
        assert str(damage).startswith("shard 00001")
        tar.write_bytes(whole)


def test_the_utterance_is_named_where_its_codes_show_the_damage(dataset):
    """Codebook 0 has 1000 entries of 10 bits, so that ten ones are invalid. A damaged stream gives other words."""
    shards = Shards(dataset)
    index, tar = 13, dataset / "shards/00001.tar"
    place = blocks_of(dataset, 1)[0]
    sizes = [len(p) for p in shards.planes(index)]
    offset = place["codes_offset"] + int(shards._offsets(2)[index - 10]) if not shards.entropy_coded else None
    if shards.entropy_coded:
        starts, firsts = shards._streams(2)
        offset = place["codes_offset"] + int(starts[firsts[index - 10]])
    content = bytearray(tar.read_bytes())
    content[offset : offset + 2] = b"\xff\xff"
    tar.write_bytes(content)
    [damage] = examine(dataset).damages
    assert damage.block == 0
    assert f"utterance {shards.utterance(index).id} (offsets {offset} to " in damage.what
    assert ("cannot be decoded" if shards.entropy_coded else "code 1023 in codebook 0, which has 1000") in damage.what
    assert damage.what.count("utterance") == 1
    assert sizes


@pytest.mark.parametrize("name", ["shards/00001.tar", "shards/00001.json", "index.npy", "blocks.npy", "failed.jsonl"])
def test_missing_cut_and_longer_files_are_found(dataset, name):
    path = dataset / name
    whole = path.read_bytes()
    for content in (None, whole[: len(whole) // 2], whole[:-1], whole + b"\0", whole + whole, b""):
        path.unlink() if content is None else path.write_bytes(content)
        assert name in {damage.file for damage in examine(dataset).damages}, content
        path.write_bytes(whole)
    assert verify(dataset) == []


def test_damage_of_a_cut_tar_names_the_lost_blocks(dataset):
    tar = dataset / "shards/00002.tar"
    content = tar.read_bytes()
    cut = blocks_of(dataset, 2)[1]["codes_offset"]
    tar.write_bytes(content[:cut])
    [damage] = examine(dataset).damages
    assert damage.what == f"{cut} bytes, expected {len(content)}; 1 of 2 blocks are cut off"
    assert (damage.start, damage.stop) == (cut, len(content))


def test_exchanged_shards_and_values_that_disagree(dataset):
    """Each file is intact, but does not belong to this dataset."""
    for suffix in (".tar", ".json"):
        a, b = dataset / f"shards/00000{suffix}", dataset / f"shards/00001{suffix}"
        one, other = a.read_bytes(), b.read_bytes()
        a.write_bytes(other), b.write_bytes(one)
        assert {damage.shard for damage in examine(dataset).damages} == {0, 1}
        a.write_bytes(one), b.write_bytes(other)
    header = load_json(dataset / "dataset.json")
    for key in header["totals"]:
        wrong = header | {"totals": header["totals"] | {key: header["totals"][key] + 1}}
        (dataset / "dataset.json").write_bytes(to_json(sealed(wrong)))
        assert [d.file for d in examine(dataset).damages] == ["dataset.json"], key
    record = dataset / "shards/00002.json"
    (dataset / "dataset.json").write_bytes(to_json(sealed(header)))
    printed = load_json(record)
    for key in ("inputs", "utterances", "frames", "samples", "bytes", "sha256"):
        record.write_bytes(to_json(sealed(printed | {key: printed[key] + 1 if key != "sha256" else "ab" * 32}), None))
        assert {d.file for d in examine(dataset).damages} == {"shards/00002.json"}, key


def test_several_damages_are_all_reported(dataset):
    flip(dataset / "shards/00000.tar", 8 * (blocks_of(dataset, 0)[0]["codes_offset"] + 5))
    flip(dataset / "shards/00002.tar", 8 * (blocks_of(dataset, 2)[1]["codes_offset"] + 5))
    flip(dataset / "index.npy", 8 * 140)
    flip(dataset / "failed.jsonl", 8 * 10)
    assert {(d.file, d.shard) for d in examine(dataset).damages} == {
        ("shards/00000.tar", 0),
        ("shards/00002.tar", 2),
        ("index.npy", None),
        ("failed.jsonl", None),
    }


def test_strangers_and_unfinished_folders_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match=r"no dataset\.json; this is not a folder of token shards"):
        verify(tmp_path)
    (dataset / "dataset.json").unlink()
    with pytest.raises(UserError, match="not finished; run the same"):
        verify(dataset)


def test_memory_does_not_grow_with_the_shards(tmp_path):
    """Many shards are hard links to a few files, because a tar does not contain its number."""
    peaks = []
    for count in (10, 100):
        root = make(tmp_path / str(count), shards=1)
        record = load_json(root / "shards/00000.json")
        for shard in range(1, count):
            (root / f"shards/{shard:05d}.tar").hardlink_to(root / "shards/00000.tar")
            (root / f"shards/{shard:05d}.json").write_bytes(to_json(sealed(record | {"shard": shard}), None))
        plan = load_json(root / "plan.json") | {"inputs": 12 * count}
        (root / "plan.json").write_bytes(to_json(sealed(plan)))
        finish_dataset(root, plan, count)
        verify(root)
        seen = []
        tracemalloc.start()
        assert verify(root, lambda done, total, seen=seen: seen.append((done, total))) == []
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert seen == [(i + 1, count) for i in range(count)]
    assert peaks[1] < peaks[0] + 100_000


# ---------------------------------------------------------------- encoding a sample again


@pytest.fixture
def encoded(audio_folder, tmp_path, codec_file):
    config = TokenizeConfig(
        sources=(str(audio_folder),), output=tmp_path / "out", codec=str(codec_file), workers=0, shard_inputs=6
    )
    run(config)
    return tmp_path / "out"


def test_a_sample_is_encoded_again(encoded):
    found = examine(encoded, sample=4)
    assert found.damages == []
    assert found.notes[0].startswith("4 utterances encoded again: 0 of ")
    assert not found.notes[1:]
    assert examine(encoded, sample=99).notes[0].startswith("11 utterances encoded again: 0 of ")
    assert examine(encoded).notes == []


def test_changed_and_missing_sources_are_reported(encoded, audio_folder, codec_file):
    soundfile.write(audio_folder / "u3.wav", np.zeros(16_000), 16_000)
    (audio_folder / "u4.wav").write_bytes(b"")
    found = examine(encoded, sample=99)
    assert found.damages == []
    assert found.notes[0].startswith("9 utterances encoded again: 0 of ")
    assert "u3.wav: its source changed since" in found.notes
    assert any(note.startswith("u4.wav: its source can no longer be read: ") for note in found.notes)
    (audio_folder / "u4.wav").unlink()
    assert any("u4.wav is no longer among them" in note for note in examine(encoded, sample=99).notes)
    shutil.rmtree(audio_folder)
    assert any("the sources are not all here" in note for note in examine(encoded, sample=4).notes)
    codec_file.rename(codec_file.with_suffix(".away"))
    [note] = examine(encoded, sample=4).notes
    codec_file.with_suffix(".away").rename(codec_file)
    assert note.startswith("no utterance encoded again: ")


def test_codes_of_other_audio_are_reported_as_damage(audio_folder, encoded, tmp_path, monkeypatch):
    """All checksums are right, but the codes are not those of the file. Only encoding again can find this."""
    from codecssl.tokenize import encode

    real = encode.encode_loaded

    def shifted(codec, loaded):
        for result in real(codec, loaded):
            if getattr(result, "id", "") == "u3.wav" and hasattr(result, "codes"):
                result = EncodedUtterance(**vars(result) | {"codes": [(c + 1) % 1024 for c in result.codes]})
            yield result

    monkeypatch.setattr(encode, "encode_loaded", lambda codec, loaded, mel: list(shifted(codec, loaded)))
    plan = json.loads((encoded / "plan.json").read_text())
    config = dict(sources=(str(audio_folder),), codec=plan["codec"]["weights"], workers=0)
    run(TokenizeConfig(output=tmp_path / "wrong", **config))
    monkeypatch.setattr(encode, "encode_loaded", real)
    assert verify(tmp_path / "wrong") == []
    [damage] = examine(tmp_path / "wrong", sample=99).damages
    assert re.search(r"utterance \d+ \(u3.wav\): 115 of 115 codes of codebook 0 are not its source's", str(damage))
