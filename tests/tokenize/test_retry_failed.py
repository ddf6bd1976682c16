"""`run --retry-failed`: inputs whose cause of failure is gone are encoded, and the bytes are those of a clean run."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import verify

from codecssl.tokenize import encode
from codecssl.tokenize.cli import main
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.run import Stopped, run
from codecssl.tokenize.shards import Shards

BROKEN = ("03.wav", "04.wav", "11.wav")


@pytest.fixture
def audio(tmp_path):
    """20 files: three shards of 8. Three of them cannot be read yet, and one is no audio at all."""
    folder = tmp_path / "audio"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        stereo = rng.standard_normal((2000 + 400 * i, 1 + i % 2)) * 0.1
        soundfile.write(folder / f"{i:02d}.wav", stereo, (16_000, 22_050)[i % 2])
    (folder / "07.wav").write_text("a letter\n")
    shutil.copytree(folder, tmp_path / "mended")
    for name in BROKEN:
        (folder / name).write_bytes(b"")
    return folder


def mend(audio):
    for name in BROKEN:
        shutil.copyfile(audio.parent / "mended" / name, audio / name)


def config(audio, output, **more):
    settings = {"codec": "hash_16khz", "workers": 0, "shard_inputs": 8, "block_inputs": 3, "block_seconds": 0.9}
    return TokenizeConfig(sources=(str(audio),), output=output, **settings | more)


def kept(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def clean(audio, output, **more):
    """The bytes of a run that finds the mended files at once; plan.json names another folder."""
    aside = audio.with_name("aside")
    audio.rename(aside)
    (audio.parent / "mended").rename(audio)
    run(config(audio, output, **more))
    audio.rename(audio.parent / "mended")
    aside.rename(audio)
    return kept(output)


def failed(root):
    return {json.loads(line)["path"] for line in (root / "failed.jsonl").read_text().splitlines()}


@pytest.mark.parametrize("more", [{}, {"entropy_code": True}, {"mel_bands": 20}, {"tasks": 2}])
def test_what_can_be_read_now_is_encoded_as_if_it_always_could(audio, tmp_path, hashcodec, more, monkeypatch):
    output, tasks = tmp_path / "out", range(more.get("tasks", 1))
    expected = clean(audio, tmp_path / "clean", **more | {"tasks": 1})
    for task in tasks:
        run(config(audio, output, **more, task=task))
    assert failed(output) == {*BROKEN, "07.wav"}
    before = kept(output)
    for task in tasks:
        run(config(audio, output, **more, task=task, retry_failed=True))
    assert kept(output) == before, "nothing may change while the inputs are unreadable"
    mend(audio)
    encoded = []
    real = encode._read
    monkeypatch.setattr(encode, "_read", lambda item, card: encoded.append(item.path) or real(item, card))
    for task in tasks:
        run(config(audio, output, **more, task=task, retry_failed=True))
    assert set(encoded) == {*BROKEN, "07.wav"}, "the codes of the others must be copied from the shards"
    assert failed(output) == {"07.wav"}
    assert kept(output) == expected
    assert verify(output) == []


def test_a_rerun_says_how_many_stand_and_the_option_reads_them(audio, tmp_path, hashcodec, capsys):
    command = ["run", str(audio), "-o", str(tmp_path / "out"), "--codec", "hash_16khz", "--workers", "0"]
    for _ in range(2):
        assert main(command) == 0
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("4 inputs could not be read: see ")
        assert line.endswith("; the same command with --retry-failed reads them again")
    mend(audio)
    assert main([*command, "--retry-failed"]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first == "note: 3 of 4 inputs that failed before can be read now"
    assert second.startswith("1 inputs could not be read")
    assert len(Shards(tmp_path / "out")) == 19


def test_a_retry_that_ends_anywhere_is_completed_by_the_next(audio, tmp_path, hashcodec, monkeypatch):
    """The run is killed at every rename, removal and sync. Readers see the old dataset, the new, or none."""
    expected = clean(audio, tmp_path / "clean")
    run(config(audio, tmp_path / "first"))
    mend(audio)
    for at in range(1000):
        output = tmp_path / f"out{at}"
        shutil.copytree(tmp_path / "first", output)
        with monkeypatch.context() as patch:
            completed = died_at(at, patch, config(audio, output, retry_failed=True))
        if (output / "dataset.json").exists():
            assert len(Shards(output)) in (16, 19)
            assert verify(output) == []
        if at % 3 == 0:
            run(config(audio, output))
            assert verify(output) == []
        run(config(audio, output, retry_failed=True))
        assert kept(output) == expected, at
        shutil.rmtree(output)
        if completed:
            break
    assert at > 40


class Killed(BaseException):
    pass


def died_at(at, patch, settings):
    """Run until the `at`-th change of the folder; True if it completed before."""
    left = iter(range(at))

    def dying(real):
        def call(*arguments, **options):
            if next(left, None) is None:
                raise Killed
            return real(*arguments, **options)

        return call

    for owner, name in [(os, "fsync"), (Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (Path, "rmdir")]:
        patch.setattr(owner, name, dying(getattr(owner, name)))
    try:
        run(settings)
    except Killed:
        return False
    return True


def test_a_stopped_retry_resumes_after_its_last_block(audio, tmp_path, hashcodec):
    expected = clean(audio, tmp_path / "clean")
    run(config(audio, tmp_path / "out"))
    mend(audio)
    stops = 0
    for _ in range(20):
        asked = iter([False])
        try:
            run(config(audio, tmp_path / "out", retry_failed=True), stop=lambda asked=asked: next(asked, True))
            break
        except Stopped:
            stops += 1
            assert len(Shards(tmp_path / "out")) == 16, "the dataset must stay readable"
    assert stops > 3
    assert kept(tmp_path / "out") == expected


def test_a_damaged_shard_is_encoded_again_where_its_codes_cannot_be_taken_over(audio, tmp_path, hashcodec):
    expected = clean(audio, tmp_path / "clean")
    run(config(audio, tmp_path / "out"))
    tar = tmp_path / "out/shards/00000.tar"
    content = bytearray(tar.read_bytes())
    place = json.loads(tar.with_suffix(".json").read_bytes())["blocks"][0]
    content[place["codes_offset"] + 3] ^= 4
    tar.write_bytes(content)
    mend(audio)
    run(config(audio, tmp_path / "out", retry_failed=True))
    assert kept(tmp_path / "out") == expected


def test_changed_sources_are_refused_and_nothing_is_lost(audio, tmp_path, hashcodec):
    run(config(audio, tmp_path / "out"))
    before = kept(tmp_path / "out")
    mend(audio)
    soundfile.write(audio / "05.wav", np.zeros(5000), 16_000)
    with pytest.raises(ValueError, match="05.wav changed since it was encoded"):
        run(config(audio, tmp_path / "out", retry_failed=True))
    assert kept(tmp_path / "out") == before
