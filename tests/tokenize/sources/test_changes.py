"""A run resumes only with the audio that it encoded: changed content is refused, a changed date is not."""

import hashlib
import json
import os
import re
import shutil
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.integrity.repair import repair
from codecssl.tokenize.run import Stopped, run
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources import changes as unchanged
from codecssl.tokenize.sources.inputs import Input

pytestmark = pytest.mark.usefixtures("hashcodec")


def noise(seed):
    return np.random.default_rng(seed).standard_normal(4000) * 0.1


@pytest.fixture
def audio(tmp_path):
    """8 short files, one of which cannot be read: two shards of two blocks."""
    (tmp_path / "audio").mkdir()
    for i in range(8):
        soundfile.write(tmp_path / f"audio/{i}.wav", noise(i), 16_000)
    (tmp_path / "audio/1.wav").write_text("no sound")
    return tmp_path / "audio"


@pytest.fixture
def config(audio, tmp_path):
    def config(**changes):
        defaults = dict(sources=(str(audio),), output=tmp_path / "out", codec="hash_16khz", workers=0)
        return TokenizeConfig(**defaults | dict(shard_inputs=4, block_inputs=2) | changes)

    return config


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def secretly(path, write):
    """Change a file's content; its size and date stay."""
    before = path.stat()
    write()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_other_content_is_refused_when_its_shard_is_finished_and_the_advice_helps(config, audio, tmp_path):
    run(config())
    before = contents(tmp_path / "out")
    secretly(audio / "6.wav", lambda: soundfile.write(audio / "6.wav", noise(60), 16_000))
    says = f"6.wav changed since it was encoded; put it back, or remove {tmp_path}/out/shards/00001.json and "
    with pytest.raises(UserError, match=re.escape(says)) as error:
        run(config())
    assert "\n" not in str(error.value)
    run(config(tasks=2, task=0))  # does not read that shard
    assert contents(tmp_path / "out") == before
    old = Shards(tmp_path / "out").codes(5).copy()
    (tmp_path / "out/shards/00001.json").unlink()
    repair(tmp_path / "out", workers=0)
    assert not np.array_equal(Shards(tmp_path / "out").codes(5), old)
    run(config())


def test_other_content_is_refused_when_its_block_is_finished(config, audio, tmp_path):
    asked = iter([False, True])
    with pytest.raises(Stopped):
        run(config(), stop=lambda: next(asked))
    assert [path.name for path in (tmp_path / "out/work/00000").glob("*.block")] == ["00000.block"]
    soundfile.write(audio / "2.wav", noise(20), 16_000)  # of the block that is still to come
    secretly(audio / "0.wav", lambda: soundfile.write(audio / "0.wav", noise(10), 16_000))
    with pytest.raises(UserError, match=r"0\.wav changed since .* remove .*/work/00000 and run again"):
        run(config())
    shutil.rmtree(tmp_path / "out/work/00000")
    run(config())
    run(config(output=tmp_path / "again"))
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_a_new_date_of_the_same_content_is_accepted(config, audio, tmp_path):
    """A corpus that was copied again, made read-only, or deleted."""
    run(config())
    before = contents(tmp_path / "out")
    for path in audio.iterdir():
        path.write_bytes(path.read_bytes())
        path.chmod(0o444)
    run(config())
    manifest = audio / "list.jsonl"
    manifest.write_text("".join(f'{{"path": "{i}.wav"}}\n' for i in range(8)))
    run(config(sources=(str(manifest),), output=tmp_path / "listed"))
    (audio / "3.wav").unlink()
    run(config(sources=(str(manifest),), output=tmp_path / "listed"))
    assert contents(tmp_path / "out") == before


def test_unchanged_files_are_not_read_again(config, audio, monkeypatch):
    monkeypatch.setattr(unchanged, "SKEW_SECONDS", 0.0)
    run(config())
    (audio / "4.wav").touch()
    read = []
    real = unchanged.sha256_of
    monkeypatch.setattr(unchanged, "sha256_of", lambda file: read.append(file.name) or real(file))
    run(config())
    assert read == ["4.wav"]


def test_parts_of_a_file_cost_one_sha256_of_it(audio, config, monkeypatch):
    """Segments by start, by duration and by channel, of two files in turn and of one that cannot be decoded."""
    parts = [{"start": 0.05}, {"end": 0.1}, {"start": 0.1, "end": 0.2}, {"duration": 0.15}, {"channel": 0}]
    rows = [{"path": f"{name}.wav", "id": f"{name}-{n}"} | part for n, part in enumerate(parts) for name in (0, 2)]
    manifest = audio / "list.jsonl"
    manifest.write_text("\n".join(map(json.dumps, [*rows, {"path": "1.wav", "start": 0.1}])))
    read = []
    real = unchanged.sha256_of
    monkeypatch.setattr(unchanged, "_remembered", {})
    monkeypatch.setattr(unchanged, "sha256_of", lambda file: read.append(file.name) or real(file))
    totals = run(config(sources=(str(manifest),), shard_inputs=100))
    assert (totals["utterances"], totals["failed"]) == (10, 1)
    assert read == ["0.wav", "2.wav"]
    for utterance in Shards(config().output).utterances():
        content = (audio / utterance.path).read_bytes()
        assert utterance.source_sha256 == hashlib.sha256(content).hexdigest(), utterance.id


def test_threads_that_read_segments_of_one_file_hash_it_once(audio, monkeypatch):
    """Eight threads, eight files, and a cache of two hashes."""
    read = []
    real = unchanged.sha256_of

    def slowly(file):
        read.append(file.name)
        time.sleep(0.2)
        return real(file)

    def hashed(name, begin):
        item = Input(id=f"{name}-{begin}", path=f"{name}.wav", file=str(audio / f"{name}.wav"), start=begin, end=0.2)
        with item.open() as file:
            return unchanged.sha256_of_input(item, file)

    monkeypatch.setattr(unchanged, "_remembered", {})
    monkeypatch.setattr(unchanged, "sha256_of", slowly)
    monkeypatch.setattr(unchanged, "HASHES", 2)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(hashed, [0] * 8, np.linspace(0, 0.1, 8)))
        assert read == ["0.wav"]
        assert set(found) == {hashlib.sha256((audio / "0.wav").read_bytes()).hexdigest()}
        found = list(pool.map(hashed, list(range(8)) * 3, [0.0] * 24))
    assert found == [hashlib.sha256((audio / f"{name}.wav").read_bytes()).hexdigest() for name in range(8)] * 3


def test_a_file_that_could_not_be_hashed_is_tried_again(audio, monkeypatch):
    item = Input(id="x", path="0.wav", file=str(audio / "0.wav"), start=0.1)
    real = unchanged.sha256_of

    def away(file):
        raise UserError("cannot read: the disk is away")

    monkeypatch.setattr(unchanged, "sha256_of", away)
    with item.open() as file, pytest.raises(UserError, match="the disk is away"):
        unchanged.sha256_of_input(item, file)
    monkeypatch.setattr(unchanged, "sha256_of", real)
    with item.open() as file:
        assert unchanged.sha256_of_input(item, file) == hashlib.sha256((audio / "0.wav").read_bytes()).hexdigest()


def test_a_changed_member_of_a_tar_is_refused(config, audio, tmp_path):
    def pack():
        with tarfile.open(tmp_path / "some.tar", "w") as tar:
            for i in range(2, 8):
                tar.add(audio / f"{i}.wav", f"{i}.wav")

    pack()
    wanted = config(sources=(f"wds:{tmp_path}/some.tar",))
    run(wanted)
    pack()
    run(wanted)
    soundfile.write(audio / "7.wav", noise(70), 16_000)
    pack()
    with pytest.raises(UserError, match=r"7\.wav changed since it was encoded"):
        run(wanted)


def test_a_repair_does_not_read_sources_of_intact_shards(config, audio, tmp_path):
    run(config())
    soundfile.write(audio / "0.wav", noise(10), 16_000)
    (tmp_path / "out/shards/00001.tar").write_bytes(b"")
    assert repair(tmp_path / "out", workers=0) == ["shard 00001: encoded again, byte for byte as it was"]
