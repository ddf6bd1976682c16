"""Crafted datasets: a command that reads one succeeds or ends with one line, soon and in little memory."""

import copy
import gzip
import io
import json
import os
import shutil
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from crafted import NASTY, fuzzed, places
from helpers import card
from hypothesis import given
from hypothesis import strategies as st

from codecssl.tokenize.cli import main
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format import validate
from codecssl.tokenize.format.blocks import tar_member
from codecssl.tokenize.format.layout import BLOCK, load_json, sealed
from codecssl.tokenize.format.writer import to_json
from codecssl.tokenize.integrity.verify import examine, plan_of
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.status import status
from codecssl.tokenize.write_codes import write_shards

FUZZED = fuzzed(25)


@pytest.fixture(scope="module", params=[False, True], ids=["packed", "compressed"])
def whole(request, tmp_path_factory):
    """A small dataset of two shards, with a plan.json."""
    root, rng = tmp_path_factory.mktemp("whole") / "d", np.random.default_rng(0)
    made = card([100, 1024], [1, 2])
    items = [(f"u{i}", rng.integers(0, 100, (3, 5 + i)).astype(np.uint16), {"text": "a"}) for i in range(6)]
    write_shards(root, made, items, per_shard=4, entropy_code=request.param)
    header = load_json(root / "dataset.json")
    (root / "plan.json").write_bytes(to_json(sealed(plan_of(header))))
    assert examine(root).damages == []
    return root


@pytest.fixture
def copied(whole, tmp_path):
    """copied() is a new copy of the dataset."""
    numbers = iter(range(10**6))

    def new():
        for old in tmp_path.glob("c*"):
            shutil.rmtree(old)
        return shutil.copytree(whole, tmp_path / f"c{next(numbers)}")

    return new


def use(root):
    """Read a dataset in every way. Any error must be a UserError of one line."""
    for reader in (read, lambda root: examine(root), lambda root: status(root, 3)):
        try:
            reader(root)
        except UserError as error:
            assert "\n" not in str(error)


def read(root):
    shards = Shards(root)
    for index in range(min(len(shards), 8)):
        shards.codes(index)
        shards.utterance(index)
    list(shards.ids())
    shards.find("u3")


def set_at(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@FUZZED
@given(st.data())
def test_json_files_with_arbitrary_values(copied, data):
    root = copied()
    name = data.draw(st.sampled_from(["dataset.json", "plan.json", "shards/00000.json", "shards/00001.json"]))
    value = load_json(root / name)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([p for p in places(value) if p]))
        set_at(value, path, copy.deepcopy(data.draw(st.sampled_from(NASTY))))
    both = name == "plan.json" and data.draw(st.booleans())
    (root / name).write_bytes(to_json(sealed(value), indent=None if "/" in name else 1))
    if both:  # neither file may be reported as damaged
        header = load_json(root / "dataset.json")
        (root / "dataset.json").write_bytes(to_json(sealed(header | value)))
    use(root)


@FUZZED
@given(st.data())
def test_index_and_blocks_with_arbitrary_numbers(copied, data):
    root = copied()
    name, field = data.draw(st.sampled_from([("index.npy", None), *(("blocks.npy", field) for field in BLOCK.names)]))
    array = np.load(root / name)
    column = array if field is None else array[field]
    bound = np.iinfo(column.dtype).max
    for _ in range(data.draw(st.integers(1, 2))):
        near = int(column[0]) + data.draw(st.integers(-2, 2))
        value = data.draw(st.sampled_from([0, 1, near, bound, bound - 1, 1 << 20]))
        column[data.draw(st.integers(0, len(column) - 1))] = min(max(value, 0), bound)
    np.save(root / name, array)
    use(root)


@FUZZED
@given(st.data())
def test_any_bytes_of_any_file(copied, data):
    root = copied()
    names = ["index.npy", "blocks.npy", "shards/00000.tar", "shards/00000.tar", "shards/00000.json", "dataset.json"]
    path = root / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at : at + data.draw(st.integers(0, 12))] = data.draw(st.binary(max_size=12))
    else:
        del content[at:]
    path.write_bytes(content)
    use(root)


@FUZZED
@given(st.data())
def test_tar_headers_with_a_right_checksum(copied, data):
    """The first member of a shard as a link, a sparse file, a pax header, and of any size."""
    root = copied()
    path = root / "shards" / "00000.tar"
    content = bytearray(path.read_bytes())
    header = tarfile.TarInfo(data.draw(st.sampled_from(["a.json.gz", "x" * 90, "../a"])))
    header.size = data.draw(st.sampled_from([0, 1, 511, 512, len(content), 1 << 32, (1 << 33) - 1]))
    header.type = data.draw(st.sampled_from([b"0", b"1", b"2", b"5", b"6", b"L", b"x", b"g", b"S", b"V"]))
    header.linkname = data.draw(st.sampled_from(["", "/etc/passwd"]))
    content[:512] = header.tobuf(tarfile.USTAR_FORMAT)[:512]
    path.write_bytes(content)
    use(root)


# ---------------------------------------------------------------- what a fuzzer does not find


def replace_member(root, name, content):
    """Replace the first member of shard 0 whose name ends in `name`. Offsets and records do not change."""
    path, members = root / "shards" / "00000.tar", []
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    found = [tar_member(n, content if n.endswith(name) else c) for n, c in members]
    path.write_bytes(b"".join(found) + bytes(1024))


def bomb_npz():
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("samples.npy", "w", force_zip64=True) as m,
    ):
        np.lib.format.write_array_header_1_0(m, {"descr": "<u8", "fortran_order": False, "shape": (1 << 28,)})
        for _ in range(1 << 11):
            m.write(bytes(1 << 20))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["gz", "npz", "deep", "digits"])
def test_bombs_take_little_memory(copied, kind, monkeypatch):
    monkeypatch.setattr(validate, "MOST_TEXT", 1 << 24)
    root = copied()
    if kind == "gz":
        replace_member(root, ".json.gz", gzip.compress(bytes(1 << 26)))
    elif kind == "npz":
        replace_member(root, ".npz", bomb_npz())
    else:
        text = b"[" * 100_000 if kind == "deep" else b'{"id":' + b"9" * 10_000 + b"}"
        replace_member(root, ".json.gz", gzip.compress(text))
        (root / "plan.json").write_bytes(text)
    tracemalloc.start()
    use(root)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 27
    with pytest.raises(UserError):
        read(root)


@pytest.mark.parametrize(
    "name", ["dataset.json", "plan.json", "index.npy", "blocks.npy", "shards/00000.tar", "shards/00000.json"]
)
def test_a_named_pipe_does_not_hang(copied, name):
    root = copied()
    (root / name).unlink()
    os.mkfifo(root / name)
    use(root)


def test_shards_that_are_not_there_by_the_billion(copied):
    root = copied()
    for name in ("dataset.json", "plan.json"):
        value = load_json(root / name)
        value["totals"] = value.get("totals", {}) | {"shards": 10**12}
        value |= {"inputs": 10**12, "shard_inputs": 1}
        if name == "plan.json":
            del value["totals"]
        (root / name).write_bytes(to_json(sealed(value)))
    with pytest.raises(UserError, match="says 1000000000000 shards"):
        examine(root)
    assert status(root, tasks=4)["tasks_unfinished"] in ([0, 1, 2, 3], [])


@pytest.mark.parametrize("command", ["verify", "repair", "status", "stats"])
def test_commands_print_one_line_errors(copied, command, capsys):
    root = copied()
    header = load_json(root / "dataset.json")
    header["codec"]["hop_length"] = 0
    (root / "dataset.json").write_bytes(to_json(sealed(header)))
    (root / "plan.json").unlink()
    assert main([command, str(root)]) == 1
    said = capsys.readouterr().err
    assert "hop_length is not a whole number from 1" in said or "dataset.json is damaged" in said
    assert "Traceback" not in said


def test_intact_files_are_read(whole):
    assert json.dumps(Shards(whole).utterance(4).labels) == '{"text": "a"}'
    assert [u.id for u in Shards(whole).utterances()] == list(Shards(whole).ids())
