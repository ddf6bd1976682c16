"""Audio WebDatasets: written and read by webdataset and by codecssl; truncated tars."""

import gzip
import hashlib
import io
import json
import pickle
import re
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import soundfile
import webdataset

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources import open_audio
from codecssl.tokenize.sources.audio import read_wave, sha256_of
from codecssl.tokenize.sources.sources import read_sources


def flac(seed, frames=600):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(seed).uniform(-0.5, 0.5, frames), 16_000, format="FLAC")
    return buffer.getvalue()


def sample(i):
    return {
        "__key__": f"part/u{i}",
        "flac": flac(i, 600 + i),
        "json": {"speaker": f"s{i}", "age": 30 + i, "words": ["a", None]},
        "txt": f"hällo {i}",
        "cls": i,
        "normalized.txt": "HALLO",
        "emb.npy": np.zeros(2),
    }


@pytest.fixture
def tars(tmp_path):
    """Two tars of 3 and 2 samples. The keys start from 0 in each."""
    for number, count in enumerate([3, 2]):
        with webdataset.TarWriter(str(tmp_path / f"train-{number:03d}.tar")) as writer:
            for i in range(count):
                writer.write(sample(i))
    return tmp_path


def found(source, skip=0):
    return list(read_sources([str(source)], skip))


def test_ids_audio_and_labels_match_webdataset(tars):
    ours = found(f"wds:{tars}/train-{{000..001}}.tar")
    assert [item.id for item in ours] == [
        *(f"train-000.tar/part/u{i}" for i in range(3)),
        *(f"train-001.tar/part/u{i}" for i in range(2)),
    ]
    urls = [str(tars / "train-000.tar"), str(tars / "train-001.tar")]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    for item, raw, read in zip(ours, theirs, decoded, strict=True):
        assert item.id.endswith(raw["__key__"])
        with item.open() as file:
            assert file.read() == raw["flac"]
        assert item.size == len(raw["flac"])
        texts = {key: read[key] for key in ("txt", "cls", "normalized.txt")}
        assert item.labels == read["json"] | texts
        assert item.path == f"{item.id}.flac"
        assert item.data is None


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz"])
def test_a_compressed_tar_gives_the_same_with_its_audio_in_hand(tars, suffix):
    plain = found(f"wds:{tars}/train-000.tar")
    packed = tars / f"packed{suffix}"
    packed.write_bytes(gzip.compress((tars / "train-000.tar").read_bytes()))
    ours = found(f"wds:{packed}")
    assert [(item.labels, item.size, sha256_of(item.open())) for item in ours] == [
        (item.labels, item.size, sha256_of(item.open())) for item in plain
    ]
    assert all(item.data for item in ours)


def test_a_fresh_process_reads_by_offset_and_size(tars, read_elsewhere):
    ours = found(f"wds:{tars}/*.tar")
    assert all(len(pickle.dumps(item)) < 700 for item in ours)
    expected = [hashlib.sha256(flac(i, 600 + i)).hexdigest() for i in (0, 1, 2, 0, 1)]
    assert read_elsewhere(ours, "webdataset") == expected


def test_a_large_member_is_read_through_a_window(tars, monkeypatch):
    item = found(f"wds:{tars}/train-000.tar")[1]
    whole = read_wave(item.open(), 16_000)
    monkeypatch.setattr(open_audio, "HELD_BYTES", 100)
    with item.open() as file:
        assert not isinstance(file, io.BytesIO)
        assert np.array_equal(read_wave(file, 16_000), whole)
        assert sha256_of(file) == hashlib.sha256(flac(1, 601)).hexdigest()


@pytest.mark.parametrize("cut", ["in audio", "in a header", "between members", "without its end", "at nothing"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_torn_tar_is_named(tars, cut, packed):
    path = tars / "train-001.tar"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        last = members[-1]
    audio = next(m for m in members if m.name.endswith(".flac"))
    end = last.offset_data + -(-last.size // 512) * 512
    length = {
        "in audio": audio.offset_data + audio.size // 2,
        "in a header": last.offset + 100,
        "between members": last.offset,
        "without its end": end,
        "at nothing": 0,
    }[cut]
    content = path.read_bytes()[:length]
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: not a whole tar"):
        found(f"wds:{tars}/train-{{000..001}}.tar")


@pytest.mark.parametrize("damage", ["a header", "the gzip stream", "no tar"])
def test_a_damaged_tar_is_named(tars, damage):
    path = tars / "train-001.tar"
    content = bytearray(path.read_bytes())
    if damage == "a header":
        with tarfile.open(path) as archive:
            content[archive.getmembers()[4].offset + 150] ^= 1  # its checksum no longer fits: tarfile stops there
    elif damage == "the gzip stream":
        content = bytearray(gzip.compress(content))
        del content[len(content) // 2 :]
    else:
        content = bytearray(b"this is a letter" * 100)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: (not a whole tar|cannot be read)"):
        found(f"wds:{path}")


def write(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return f"wds:{path}"


def test_keys_must_not_come_back_nor_members_twice(tmp_path):
    apart = write(tmp_path / "apart.tar", ("a.flac", b"1"), ("b.flac", b"2"), ("a.txt", b"x"))
    with pytest.raises(UserError, match=r"apart\.tar: key 'a' comes back after other keys"):
        found(apart)
    twice = write(tmp_path / "twice.tar", ("a.flac", b"1"), ("a.FLAC", b"2"))
    with pytest.raises(UserError, match=r"twice\.tar: member 'a\.FLAC' is there twice"):
        found(twice)


def test_a_key_without_one_audio_member_fails_alone(tmp_path):
    source = write(
        tmp_path / "x.tar",
        ("none.txt", b"words"),
        ("none.midi", b"?"),
        ("two.mix.wav", b"1"),
        ("two.speech.wav", b"22"),
        ("bad.wav", b"3"),
        ("bad.json", b"{"),
        ("good.wav", b"4444"),
        ("good.cls", b"not a number"),
        ("good.txt", b"words \xff\n"),
        ("good.info.json", json.dumps({"a": 1}).encode()),
    )
    none, two, bad, good = found(source)
    for item, says in (
        (none, "no audio among its members .txt .midi"),
        (two, r"several members with audio; choose by \?audio=EXTENSION among its members .mix.wav .speech.wav"),
        (bad, "its member .json is not JSON"),
    ):
        with pytest.raises(UserError, match=says):
            item.open()
    assert good.open().read() == b"4444"
    assert good.labels == {"cls": "not a number", "txt": "words \ufffd", "info.json": {"a": 1}}
    chosen = found(f"{source}?audio=speech.wav")
    assert chosen[1].open().read() == b"22"
    with pytest.raises(UserError, match="no audio among its members .wav"):
        chosen[3].open()
    assert len({item.digest() for item in (none, two, bad, good)}) == 4


def test_names_of_all_kinds(tmp_path):
    long = "d" * 150 + "/" + "ü" * 80
    source = write(
        tmp_path / "names.tar",
        ("./dotted.dir/a.wav", b"1"),
        (".hidden.wav", b"2"),
        ("__meta__.json__", b"3"),
        ("nodot", b"4"),
        (f"{long}.wav", b"5"),
    )
    with tarfile.open(tmp_path / "names.tar", "a") as archive:
        archive.add(tmp_path, "folder.wav", recursive=False)
    items = found(source)
    assert [item.id for item in items] == ["names.tar/dotted.dir/a", f"names.tar/{long}"]
    assert [item.open().read() for item in items] == [b"1", b"5"]


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar makes sparse members")
def test_a_sparse_member_is_read_whole(tmp_path):
    with open(tmp_path / "a.wav", "wb") as file:
        file.write(b"begin")
        file.truncate(1 << 20)
    command = ["tar", "--sparse", "-cf", "sparse.tar", "a.wav"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    if (tmp_path / "sparse.tar").stat().st_size >= 1 << 20:
        pytest.skip("this file system or tar makes no sparse files")
    [item] = found(f"wds:{tmp_path}/sparse.tar")
    assert item.open().read() == (tmp_path / "a.wav").read_bytes()


def test_patterns(tars):
    first = [item.id for item in found(f"wds:{tars}/train-000.tar")]
    both = [item.id for item in found(f"wds:{tars}/train-{{001,000}}.tar")]
    assert both[2:] == first, "must follow the order of the braces"
    assert sorted(both) == [item.id for item in found(f"wds:{tars}/train-00?.tar")]
    (tars / "deep").mkdir()
    (tars / "train-001.tar").rename(tars / "deep" / "train-000.tar")
    names = {item.id.rpartition("/part")[0] for item in found(f"wds:{tars}/**/*.tar")}
    assert names == {"train-000.tar", "deep/train-000.tar"}
    assert found(f"wds:{tars}/train-000.tar", skip=2)[0].id == first[2]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("{}/train-{{000..002}}.tar", "no such tar: .*002.tar"),
        ("{}/*.tgz", "no such tar"),
        ("{}/train-{{000.tar", "source 'wds:"),
        ("{}", r"a folder; give its tars, as in 'wds:.*\*\.tar'"),
        ("https://host/x.tar", "only local tars"),
        ("pipe:cat x.tar", "only local tars"),
        ("{}/train-000.tar?adio=wav", "unknown option 'adio'; there are audio"),
    ],
)
def test_invalid_patterns_are_errors(tars, pattern, says):
    with pytest.raises(UserError, match=says):
        found("wds:" + pattern.format(tars))


def test_a_tar_without_files_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no files named KEY.EXTENSION in 1 tars"):
        found(write(tmp_path / "x.tar", ("nodot", b"1")))
    with pytest.raises(UserError, match=r"a tar; write wds:.*x\.tar"):
        found(tmp_path / "x.tar")


def test_dots_before_digits_belong_to_the_key(tmp_path):
    source = write(tmp_path / "x.tar", ("utt_11.708_13.970.flac", b"1"), ("utt_11.708_13.970.txt", b"hi"))
    [item] = found(source)
    assert (item.id, item.labels) == ("x.tar/utt_11.708_13.970", {"txt": "hi"})


@pytest.mark.parametrize("padding", [0, 1, 20])
def test_tars_joined_by_cat_are_read_to_their_end(tars, tmp_path, padding):
    """GNU tar pads to 20 blocks, others to 2; webdataset's own reader stops at the first end mark."""
    first, second = (tars / "train-000.tar").read_bytes(), sample(7)
    with webdataset.TarWriter(str(tmp_path / "more.tar")) as writer:
        writer.write(second | {"__key__": "late"})
    (tmp_path / "joined.tar").write_bytes(first + bytes(512 * padding) + (tmp_path / "more.tar").read_bytes())
    items = found(f"wds:{tmp_path}/joined.tar")
    assert [item.id.rpartition("/")[2] for item in items] == ["u0", "u1", "u2", "late"]
    with items[-1].open() as file:
        assert file.read() == second["flac"]
    (tmp_path / "junk.tar").write_bytes(first + b"junk" * 200)
    with pytest.raises(UserError, match="junk.tar: not a whole tar"):
        found(f"wds:{tmp_path}/junk.tar")


@pytest.mark.parametrize("compressed", [False, True])
def test_links_in_a_tar_are_read_or_named(tmp_path, compressed):
    """`tar` writes such members for a folder with hard links."""
    path, content = tmp_path / ("x.tar.gz" if compressed else "x.tar"), flac(3)
    with tarfile.open(path, "w:gz" if compressed else "w") as archive:
        for name, kind, target in [
            ("a.flac", tarfile.REGTYPE, ""),
            ("a.txt", tarfile.REGTYPE, ""),
            ("b.flac", tarfile.LNKTYPE, "a.flac"),
            ("b.txt", tarfile.LNKTYPE, "a.txt"),
            ("c.flac", tarfile.SYMTYPE, "a.flac"),
            ("d.flac", tarfile.LNKTYPE, "gone.flac"),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            body = b"" if target else content if name.endswith("flac") else b"hello"
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    a, b, c, d = found(f"wds:{path}")
    with a.open() as file:
        assert file.read() == content
    assert c.problem == "a symbolic link to a.flac; make the tar with its file"
    assert d.problem == "a hard link to gone.flac; make the tar with its file"
    if compressed:
        assert b.problem == "a hard link to a.flac; make the tar with its file"
        return
    with b.open() as file:
        assert file.read() == content
    assert a.labels == b.labels == {"txt": "hello"}
