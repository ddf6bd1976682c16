"""A repaired dataset is byte for byte the original, after any damage and interruption."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import verify

from codecssl.tokenize.backends import table
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.format.layout import load_json, sealed
from codecssl.tokenize.format.writer import to_json
from codecssl.tokenize.integrity.repair import repair
from codecssl.tokenize.run import run
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.write_codes import write_shards

pytestmark = pytest.mark.usefixtures("hashcodec")


@pytest.fixture
def audio(tmp_path):
    """10 short files, two of which cannot be read: three shards of two blocks."""
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for i in range(10):
        soundfile.write(tmp_path / f"audio/{i}.wav", rng.standard_normal(3000 + 500 * i) * 0.1, 16_000)
    for i in (2, 5):
        (tmp_path / f"audio/{i}.wav").write_text("no sound")
    return tmp_path / "audio"


def config(audio, output, **changes):
    return TokenizeConfig(
        **dict(sources=(str(audio),), output=output, codec="hash_16khz", workers=0, shard_inputs=4, block_inputs=2)
        | changes
    )


@pytest.fixture
def dataset(audio, tmp_path):
    run(config(audio, tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture(params=[False, True], ids=["packed", "compressed"])
def any_dataset(request, audio, tmp_path):
    run(config(audio, tmp_path / "out", entropy_code=request.param))
    return tmp_path / "out"


def contents(root):
    """name -> sha256 of every file, hidden ones too."""
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in root.rglob("*") if f.is_file()
    }


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 16
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": lambda tar, record: flip(tar),
    "a cut tar": lambda tar, record: os.truncate(tar, 1000),
    "no tar": lambda tar, record: tar.unlink(),
    "no record": lambda tar, record: record.unlink(),
    "neither": lambda tar, record: (tar.unlink(), record.unlink()),
    "a record that is no JSON": lambda tar, record: record.write_bytes(b"\0" * 200),
    "another shard's files": lambda tar, record: [shutil.copy(p.with_stem("00000"), p) for p in (tar, record)],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_shard_is_encoded_again_and_no_other(any_dataset, kind):
    dataset = any_dataset
    before, tars = contents(dataset), [dataset / f"shards/0000{i}.tar" for i in range(3)]
    others = [tars[i].stat().st_ino for i in (0, 2)]
    DAMAGES[kind](tars[1], tars[1].with_suffix(".json"))
    calls = []
    assert repair(dataset, lambda done, total: calls.append((done, total)), workers=0) == [
        "shard 00001: encoded again, byte for byte as it was"
    ]
    assert calls[-1] == (3, 3)
    assert contents(dataset) == before
    assert [tars[i].stat().st_ino for i in (0, 2)] == others
    assert repair(dataset) == []


@pytest.mark.parametrize("name", ["index.npy", "blocks.npy", "failed.jsonl", "dataset.json", "plan.json"])
@pytest.mark.parametrize("kind", ["flipped", "cut", "gone"])
def test_index_files_are_written_again_without_encoding(dataset, hashcodec, monkeypatch, name, kind):
    before, path = contents(dataset), dataset / name
    encoded = []
    real = hashcodec.codes_of
    monkeypatch.setattr(hashcodec, "codes_of", lambda wave: encoded.append(wave) or real(wave))
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif path.suffix == ".json":
        path.write_bytes(path.read_bytes().replace(b'"codec"', b'"kodec"'))
    else:
        flip(path, 0.9)
    lost = (
        "the run was not finished: completed" if (name, kind) == ("dataset.json", "gone") else f"{name}: written again"
    )
    assert repair(dataset, workers=0) == [lost]
    assert contents(dataset) == before
    assert encoded == []


def test_all_at_once(dataset):
    before = contents(dataset)
    for shard in (0, 2):
        flip(dataset / f"shards/0000{shard}.tar")
    for name in ("index.npy", "blocks.npy", "plan.json"):
        (dataset / name).write_bytes(b"x")
    assert [line[:12] for line in repair(dataset, workers=0)] == [
        "blocks.npy: ",
        "index.npy: w",
        "plan.json: w",
        "shard 00000:",
        "shard 00002:",
    ]
    assert contents(dataset) == before


def test_an_impossible_repair_changes_nothing(dataset, audio, hashcodec, monkeypatch):
    flip(dataset / "shards/00001.tar")
    before = contents(dataset)

    def refused(says):
        with pytest.raises(UserError, match=says) as error:
            repair(dataset, workers=0)
        assert "\n" not in str(error.value)
        assert contents(dataset) == before

    (audio / "4.wav").rename(audio / "4.away")
    refused("the sources are not those that shard 0000. was made of; .* nothing was changed")
    (audio / "4.away").rename(audio / "4.wav")
    (audio / "9b.wav").write_text("")
    refused("the sources are not those that shard 00002 was made of; .* nothing was changed")
    (audio / "9b.wav").unlink()
    audio.rename(audio.with_name("away"))
    refused("no such file or folder; a repair needs the sources; nothing was changed")
    audio.with_name("away").rename(audio)
    with monkeypatch.context() as patch:
        patch.delitem(table.BACKENDS, "hash_16khz")
        refused("unknown codec 'hash_16khz")
    assert repair(dataset, workers=0) == ["shard 00001: encoded again, byte for byte as it was"]


def test_a_missing_source_is_reported_before_anything_is_moved(audio, tmp_path):
    manifest = tmp_path / "list.jsonl"
    manifest.write_text("".join(json.dumps({"path": f"audio/{i}.wav"}) + "\n" for i in range(10)))
    run(config(manifest, tmp_path / "out"))
    flip(tmp_path / "out/shards/00001.tar")
    before = contents(tmp_path / "out")
    (audio / "5.wav").unlink()  # one that failed: not missed
    (audio / "6.wav").unlink()
    (audio / "0.wav").unlink()  # of a shard that is whole: not missed
    with pytest.raises(UserError, match=r"1 files that the damaged shards .*, the first is .*/6\.wav; put them back"):
        repair(tmp_path / "out", workers=0)
    assert contents(tmp_path / "out") == before


def test_relative_sources_are_resolved_from_the_original_folder(audio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(config("audio", tmp_path / "out"))
    whole = contents(tmp_path / "out")
    flip(tmp_path / "out/shards/00001.tar")
    before = contents(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    asks = "a repair needs the sources, seen from the folder where the run was begun; nothing was changed"
    with pytest.raises(UserError, match=f"^source 'audio': no such file or folder; {asks}$"):
        repair(tmp_path / "out", workers=0)
    (tmp_path / "elsewhere/audio").mkdir()
    shutil.copy(audio / "0.wav", "audio/0.wav")  # another folder of that name
    with pytest.raises(UserError, match=f"the sources are not those that shard 00000 was made of; {asks}$"):
        repair(tmp_path / "out", workers=0)
    assert contents(tmp_path / "out") == before
    monkeypatch.chdir(tmp_path)
    assert repair(Path("out"), workers=0) == ["shard 00001: encoded again, byte for byte as it was"]
    assert contents(tmp_path / "out") == whole


def test_changed_sources_and_other_rounding_are_reported(dataset, audio, hashcodec, monkeypatch):
    damaged = dataset / "damaged/00001.tar"
    flip(dataset / "shards/00001.tar", 0.9)
    content = (dataset / "shards/00001.tar").read_bytes()
    soundfile.write(audio / "6.wav", np.zeros(4000), 16_000)
    [line] = repair(dataset, workers=0)
    assert line == (
        "shard 00001: encoded again, but it is not what it was: 1 sources changed since, 0 can no longer be read, "
        f"the first is 6.wav; the damaged one is kept as {damaged}"
    )
    assert damaged.read_bytes() == content
    assert verify(dataset) == [] == repair(dataset)

    monkeypatch.setattr(hashcodec, "VERSION", "2")
    flip(dataset / "shards/00002.tar")
    [line] = repair(dataset, workers=0)
    assert "shard 00002: encoded again, but it is not what it was: it was made with hash 1, now 2" in line


def test_an_interrupted_repair_resumes_anywhere(audio, tmp_path, monkeypatch):
    run(config(audio, tmp_path / "whole"))
    before, operations = contents(tmp_path / "whole"), 0
    for suffix in (".tar", ".json"):
        flip(tmp_path / f"whole/shards/00001{suffix}")
    (tmp_path / "whole/plan.json").write_bytes(b"{}")

    class Interrupted(BaseException):
        pass

    def repaired(root, stop_at):
        """Repair; the `stop_at`-th change to the folder is not made any more. How many there were."""
        count = 0

        def counted(real):
            def operation(*args, **kwargs):
                nonlocal count
                count += 1
                if count == stop_at:
                    raise Interrupted
                return real(*args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "mkdir", "rmdir", "rename"):
                patch.setattr(os, name, counted(getattr(os, name)))
            repair(root, workers=0)
        return count

    for stop_at in range(1, 200):
        root = tmp_path / f"at{stop_at}"
        shutil.copytree(tmp_path / "whole", root)
        try:
            operations = repaired(root, stop_at)
            break
        except Interrupted:
            repair(root, workers=0)
            left = {name for name in contents(root) if not name.endswith(".tmp")}  # run tidies up its own
            assert {name: contents(root)[name] for name in left} == before, stop_at
    assert operations > 10


def test_an_unfinished_run_is_checked_and_completed(audio, tmp_path, monkeypatch):
    run(config(audio, tmp_path / "whole"))
    run(config(audio, tmp_path / "out", tasks=2, task=0))
    flip(tmp_path / "out/shards/00002.tar")
    with pytest.raises(UserError, match="not finished"):
        Shards(tmp_path / "out")
    assert repair(tmp_path / "out", workers=0) == ["shard 00002: encoded again, byte for byte as it was"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_list_from_standard_input_is_an_error(audio, tmp_path):
    rows = "".join(json.dumps({"path": f"{audio}/{i}.wav"}) + "\n" for i in range(10))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stdin.jsonl").write_text(rows)
    run(config(tmp_path / "out/stdin.jsonl", tmp_path / "out"))
    assert verify(tmp_path / "out") == []
    for wrong in (rows.replace("7.wav", "8b.wav"), rows[:-40], "", rows.replace("{", "(", 1)):
        (tmp_path / "out/stdin.jsonl").write_text(wrong)
        [line] = verify(tmp_path / "out")
        assert line.startswith("stdin.jsonl: ")
        with pytest.raises(UserError, match=r"stdin\.jsonl.*; it cannot be restored; put it back"):
            repair(tmp_path / "out")


def test_two_statements_that_differ_are_not_guessed(dataset):
    header = load_json(dataset / "dataset.json")
    header["codec"]["policies"] = {"channels": "left"}
    (dataset / "dataset.json").write_bytes(to_json(sealed(header)))
    before = contents(dataset)
    with pytest.raises(UserError, match=r"plan\.json: differs from dataset\.json in codec.*put back the right one"):
        repair(dataset)
    assert contents(dataset) == before


def test_codes_made_elsewhere(hashcodec, tmp_path):
    card, rng = hashcodec.HashCodec().card, np.random.default_rng(0)
    items = [(f"u{i}", rng.integers(0, 1000, (2, 30)).astype(np.uint16), {}) for i in range(6)]
    write_shards(tmp_path / "d", card, items, per_shard=2)
    before = contents(tmp_path / "d")
    (tmp_path / "d/index.npy").unlink()
    assert repair(tmp_path / "d") == ["index.npy: written again"]
    assert contents(tmp_path / "d") == before
    flip(tmp_path / "d/shards/00001.tar")
    with pytest.raises(UserError, match="shards 00001 were not made from audio; write the dataset again"):
        repair(tmp_path / "d")
    with pytest.raises(UserError, match="not a folder of token shards"):
        repair(tmp_path)
