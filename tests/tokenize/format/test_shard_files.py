"""Reading shards that change under the reader: damage, truncation, a disk that is away for a moment."""

import ast
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import card

from codecssl.tokenize.common.errors import TransientError, UserError
from codecssl.tokenize.format import shard_files
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.write_codes import write_shards


def codes(count, frames=100, seed=0, sizes=(1024, 60, 2)):
    rng = np.random.default_rng(seed)
    return [np.stack([rng.integers(0, size, frames) for size in sizes]).astype(np.uint16) for _ in range(count)]


def write(path, items, *, entropy_code=False, per_shard=5):
    return write_shards(path, card([1024, 60, 2]), [(f"u{i}", c, {}) for i, c in enumerate(items)], per_shard,
                        entropy_code=entropy_code)  # fmt: skip


@pytest.mark.parametrize("entropy_code", [False, True])
def test_every_bit_of_the_codes_is_checked_when_a_block_is_first_read(tmp_path, entropy_code):
    items = codes(10)
    write(tmp_path / "d", items, entropy_code=entropy_code)
    path = tmp_path / "d/shards/00001.tar"
    whole, place = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())["blocks"][0]
    rng = np.random.default_rng(0)
    for at in place["codes_offset"] + rng.integers(0, place["codes_bytes"], 40):
        content = bytearray(whole)
        content[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        shards = Shards(tmp_path / "d")
        assert np.array_equal(shards.codes(0), items[0]), "the other shard must be readable"
        with pytest.raises(
            UserError, match=r"00001\.tar: the codes of utterances 5 to 9 are damaged.*verify"
        ) as reported:
            shards.codes(7)
        assert not isinstance(reported.value, TransientError), "the second read must fail too"
    path.write_bytes(whole)
    shards = Shards(tmp_path / "d")
    assert all(np.array_equal(shards.codes(i), item) for i, item in enumerate(items))


@pytest.mark.parametrize("entropy_code", [False, True])
def test_an_index_of_other_frames_is_refused(tmp_path, entropy_code):
    items = [c[:, : 40 + 7 * i] for i, c in enumerate(codes(10))]
    write(tmp_path / "d", items, entropy_code=entropy_code)
    path = tmp_path / "d/index.npy"
    whole = path.read_bytes()
    for at in range(len(whole) - 20, len(whole)):
        content = bytearray(whole)
        content[at] ^= 1
        path.write_bytes(content)
        shards = Shards(tmp_path / "d")
        with pytest.raises(UserError, match=r"index\.npy: its frames are not those of .*repair"):
            list(map(shards.codes, range(10)))


def test_a_block_is_checked_once_and_only_if_asked(tmp_path, monkeypatch):
    items = codes(10)
    write(tmp_path / "d", items)
    summed = []
    crc32 = shard_files.ShardFiles.crc32
    monkeypatch.setattr(
        shard_files.ShardFiles, "crc32", lambda self, shard, *a: summed.append(shard) or crc32(self, shard, *a)
    )
    shards = Shards(tmp_path / "d")
    for index in (0, 1, 4, 7, 2, 9):
        shards.codes(index)
    assert summed == [0, 1]
    Shards(tmp_path / "d", check=False).codes(0)
    assert summed == [0, 1]
    again = pickle.loads(pickle.dumps(Shards(tmp_path / "d", check=False, retry_seconds=3.0)))
    again.codes(0)
    assert summed == [0, 1]


@pytest.mark.parametrize("frames", [100, 30_000])
def test_pieces_of_long_utterances_equal_the_whole(tmp_path, frames):
    """Only the bytes of the requested piece of a long utterance are read, plane by plane."""
    rng = np.random.default_rng(0)
    [item] = codes(1, frames)
    shards = write(tmp_path / "d", [item])
    for _ in range(40):
        a, b = sorted(rng.integers(0, frames + 1, 2).tolist())
        k = int(rng.integers(1, 4))
        assert np.array_equal(shards.codes(0, num_codebooks=k, start=a, stop=b), item[:k, a:b])


READER = """
import sys, time
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.shards import Shards
shards = Shards(sys.argv[1])
shards.codes(0)
print("ready", flush=True)
sys.stdin.readline()
try:
    for index in range(len(shards)):
        shards.codes(index)
except UserError as error:
    print(error)
    sys.exit(1)
"""


def test_a_shard_truncated_while_it_is_read_is_a_one_line_error(tmp_path):
    """A memory map would end the process by SIGBUS, with -7 and no message."""
    write(tmp_path / "d", codes(400, 300), per_shard=400)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path / "d")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout.readline() == "ready\n"
    path = tmp_path / "d/shards/00000.tar"
    os.truncate(path, path.stat().st_size // 2)
    out, _ = reader.communicate("go\n", timeout=60)
    assert reader.returncode == 1, out
    assert "00000.tar: cannot be read (it ends before byte" in out
    assert len(out.splitlines()) == 1


def test_reading_waits_for_a_disk_that_is_unavailable_for_a_moment(tmp_path):
    items = codes(20)
    write(tmp_path / "d", items)
    shards = Shards(tmp_path / "d", retry_seconds=30.0)
    (tmp_path / "d/shards").rename(tmp_path / "away")
    back = threading.Timer(0.5, lambda: (tmp_path / "away").rename(tmp_path / "d/shards"))
    back.start()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(shards.codes, range(20)))
    back.join()
    assert all(np.array_equal(one, item) for one, item in zip(read, items, strict=True))


@pytest.mark.parametrize("entropy_code", [False, True])
def test_a_disk_that_stays_away_is_an_error_worth_another_try(tmp_path, entropy_code):
    write(tmp_path / "d", codes(10), entropy_code=entropy_code)
    shards = Shards(tmp_path / "d", retry_seconds=0.4)
    (tmp_path / "d/shards").rename(tmp_path / "away")
    began = time.monotonic()
    with pytest.raises(TransientError, match=r"00000\.tar: No such file or directory, tried for 0\.4 s"):
        shards.codes(0)
    assert 0.4 <= time.monotonic() - began < 5


def test_a_stale_handle_is_opened_again(tmp_path, monkeypatch):
    """After a restart of an NFS server, the old file descriptor remains invalid."""
    items = codes(10)
    shards, pread, stale = Shards(write(tmp_path / "d", items).path, retry_seconds=5.0), os.pread, set()
    shards.codes(0)

    def read(fd, size, offset):
        if fd in stale:
            stale.clear()  # the number may be given again
            raise OSError(116, "Stale file handle")
        return pread(fd, size, offset)

    stale.add(shards._files._opened(0).fileno())
    monkeypatch.setattr(shard_files.os, "pread", read)
    assert np.array_equal(shards.codes(1), items[1])
    assert not stale


def test_a_file_that_the_cache_does_not_hold_stays_open_while_it_is_read(tmp_path, monkeypatch):
    """Of two threads that open a shard at once, the cache keeps one's file. Closed early, the other's descriptor may be
    another file's by the time it is read.
    """
    write(tmp_path / "d", codes(10))
    files = shard_files.ShardFiles(tmp_path / "d")
    monkeypatch.setattr(files, "_opened", files._open)  # as for the thread that lost
    read, stolen = os.pread, []

    def pread(descriptor, size, offset):
        stolen.append(os.open(__file__, os.O_RDONLY))  # takes the lowest free descriptor, a closed one's
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    content = files.read(0, 0, 300)
    for descriptor in stolen:
        os.close(descriptor)
    assert content == (tmp_path / "d/shards/00000.tar").read_bytes()[:300]


def test_a_header_that_python_could_not_parse_next_to_another_thread_is_parsed_again(tmp_path, monkeypatch):
    items = codes(10)
    write(tmp_path / "d", items)
    parse, calls = ast.literal_eval, []

    def literal_eval(text):
        calls.append(text)
        if len(calls) % 11 == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=60, after=57)")
        return parse(text)

    shards = Shards(tmp_path / "d")
    monkeypatch.setattr(ast, "literal_eval", literal_eval)
    assert all(np.array_equal(shards.codes(i), item) for i, item in enumerate(items))
    assert shards.utterance(7).id == "u7"
    assert calls
