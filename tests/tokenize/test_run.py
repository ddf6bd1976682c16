"""`tokenize run` from end to end: resuming, tasks, failures and damage always give the same bytes."""

import hashlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from helpers import verify

from codecssl.tokenize import encode as encode_module
from codecssl.tokenize.cli import main
from codecssl.tokenize.common import files
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.run import run
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources.audio import read_wave

BAD = {"empty.wav", "text.wav", "truncated.flac", "nothing.wav"}


def config(folder, output, codec_file, **changes):
    defaults = dict(
        sources=(str(folder),),
        output=output,
        codec=str(codec_file),
        workers=0,
        shard_inputs=6,
        block_inputs=2,
    )
    return TokenizeConfig(**defaults | changes)


def contents(root):
    """name -> sha256 of every file that a user keeps."""
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in root.rglob("*") if f.is_file()
    }


def test_every_input_is_in_a_shard_or_in_failed_once(audio_folder, tmp_path, codec_file, codec):
    totals = run(config(audio_folder, tmp_path / "out", codec_file))
    assert (totals["inputs"], totals["utterances"], totals["failed"], totals["shards"]) == (15, 11, 4, 3)
    failed = [json.loads(line) for line in (tmp_path / "out/failed.jsonl").read_text().splitlines()]
    assert {row["path"] for row in failed} == BAD
    assert all(row["reason"] and "\n" not in row["reason"] for row in failed)
    shards = Shards(tmp_path / "out")
    ids = [u.id for u in shards.utterances()]
    assert ids == sorted(ids, key=lambda s: s.encode()) == sorted({*ids}, key=lambda s: s.encode())
    assert {"a.wav", "a.flac", "deep/stereo44.flac"} < set(ids)
    assert not (tmp_path / "out/work").exists()
    for utterance in shards.utterances():
        path = audio_folder / utterance.path
        wave = read_wave(path, 16_000)
        expected = codec.encode([torch.from_numpy(wave.copy())])[0].codes.numpy()
        assert np.array_equal(shards.codes(utterance.index), expected)
        assert np.array_equal(shards.codes(utterance.index, num_codebooks=3), expected[:3])
        assert utterance.samples == len(wave)
        assert utterance.frames == expected.shape[1] == -(-len(wave) // 320)
        assert utterance.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        info = soundfile.info(path)
        more = 160 if path.suffix == ".ogg" else 0  # ffmpeg does not cut Vorbis's last block; its decode is the oracle
        assert (utterance.source_rate, utterance.source_samples) == (info.samplerate, info.frames + more)
    assert verify(tmp_path / "out") == []


def test_tasks_workers_and_kills_do_not_change_a_byte(audio_folder, tmp_path, codec_file, monkeypatch):
    run(config(audio_folder, tmp_path / "one", codec_file))
    for task in (1, 0):
        done = run(config(audio_folder, tmp_path / "two", codec_file, tasks=2, task=task))
        assert (done is None) == (task == 1)
    run(config(audio_folder, tmp_path / "workers", codec_file, workers=2))

    read = encode_module.read
    monkeypatch.setattr(encode_module, "GROUP_INPUTS", 2)
    for stop_after in (1, 4, 7):  # killed in the middle of blocks, three times
        left = iter(range(stop_after))

        def dying(item, card, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return read(item, card)

        monkeypatch.setattr(encode_module, "read", dying)
        with pytest.raises(KeyboardInterrupt):
            run(config(audio_folder, tmp_path / "killed", codec_file))
    count = []
    monkeypatch.setattr(encode_module, "read", lambda item, card: count.append(item) or read(item, card))
    run(config(audio_folder, tmp_path / "killed", codec_file))
    assert 0 < len(count) < 15, "finished blocks must not be encoded again"
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two") == contents(tmp_path / "workers") == contents(tmp_path / "killed")


def test_a_sigkill_in_the_middle_leaves_nothing_half_written(tmp_path, codec_file):
    folder = tmp_path / "audio"
    folder.mkdir()
    for i in range(40):
        rng = np.random.default_rng(i)
        soundfile.write(folder / f"{i:02d}.wav", rng.standard_normal(16_000 * 4).astype("f4") * 0.1, 16_000)
    script = (
        "from pathlib import Path; from codecssl.tokenize.run import TokenizeConfig, run;"
        f"run(TokenizeConfig(sources=({str(folder)!r},), output=Path({str(tmp_path / 'killed')!r}),"
        f" codec={str(codec_file)!r}, workers=0, shard_inputs=16, block_inputs=4))"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.time() + 120
    while not list((tmp_path / "killed").glob("work/*/*.json")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/dataset.json").exists()
    with pytest.raises(UserError, match="not finished; run the same"):
        Shards(tmp_path / "killed")
    small = dict(shard_inputs=16, block_inputs=4)
    run(config(folder, tmp_path / "killed", codec_file, **small))
    run(config(folder, tmp_path / "whole", codec_file, **small))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_task_that_is_started_twice_runs_once(audio_folder, tmp_path, codec_file, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", {"here": 0.3, "elsewhere": 0.3})
    second = config(audio_folder, tmp_path / "out", codec_file)
    refused = []

    def start_it_again(progress):
        if progress.inputs == 3:
            with pytest.raises(UserError, match=r"out: process \d+ on .* is at work there; wait for it") as reported:
                run(second)
            refused.append(reported.value)

    assert run(second, start_it_again)["inputs"] == 15
    assert len(refused) == 1
    assert verify(tmp_path / "out") == []


def test_a_shard_that_others_finish_meanwhile_is_one_line(audio_folder, tmp_path, codec_file):
    """Two runs with different --tasks work on the same dataset."""
    mine = config(audio_folder, tmp_path / "out", codec_file)

    def others(progress):
        if progress.inputs == 3:
            for task in (0, 1):
                run(config(audio_folder, tmp_path / "out", codec_file, tasks=2, task=task))

    with pytest.raises(UserError, match="another process finished a shard of this task; give all the same --tasks"):
        run(mine, others)
    assert run(mine)["inputs"] == 15
    assert verify(tmp_path / "out") == []


def test_a_finished_run_does_nothing_and_other_codecs_and_sources_are_refused(
    audio_folder, tmp_path, codec_file, monkeypatch
):
    output = tmp_path / "out"
    run(config(audio_folder, output, codec_file))
    before = contents(output)
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "read", lambda *_: pytest.fail("read again"))
        run(config(audio_folder, output, codec_file))
    assert contents(output) == before
    with pytest.raises(UserError, match=r"begun with codec tiny_16khz, this run has tiny_16khz \(codebook_sizes"):
        run(config(audio_folder, output, codec_file, num_codebooks=4))
    with pytest.raises(UserError, match="begun with shard_inputs 6, this run has 7"):
        run(config(audio_folder, output, codec_file, shard_inputs=7))
    (audio_folder / "b.wav").write_bytes((audio_folder / "a.wav").read_bytes())
    with pytest.raises(UserError, match="the sources changed: 16 inputs, 15 when it was begun"):
        run(config(audio_folder, output, codec_file))
    (audio_folder / "a.wav").unlink()
    with pytest.raises(UserError, match="the sources changed since shard 00000"):
        run(config(audio_folder, output, codec_file))
    with pytest.raises(UserError, match="not empty and not a dataset"):
        run(config(audio_folder, audio_folder, codec_file))


def test_disk_full_is_one_line_and_resumable(audio_folder, tmp_path, codec_file, monkeypatch):
    import os

    real = os.fsync
    calls = iter(range(5))

    def full(descriptor):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="disk full; make room"):
            run(config(audio_folder, tmp_path / "out", codec_file))
    assert not list((tmp_path / "out").rglob("*.tmp"))
    run(config(audio_folder, tmp_path / "out", codec_file))
    run(config(audio_folder, tmp_path / "again", codec_file))
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_manifest_segments_and_labels(audio_folder, tmp_path, codec_file):
    rows = [
        {"path": "u3.wav", "start": 0.5, "end": 1.5, "speaker": "s1", "phones": ["A", "B"]},
        {"path": "u3.wav", "speaker": "s2", "id": "whole", "text": "héllo"},
        {"path": "u3.wav", "start": 1.0, "end": 9.0},
    ]
    manifest = audio_folder / "list.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for row in rows))
    totals = run(config(manifest, tmp_path / "out", codec_file))
    assert (totals["utterances"], totals["failed"]) == (2, 1)
    shards = Shards(tmp_path / "out")
    part, whole = shards.utterances()
    assert (part.id, part.samples, part.labels) == (
        "u3.wav#0.5-1.5",
        16_000,
        {"speaker": "s1", "phones": ["A", "B"]},
    )
    assert (whole.id, whole.path, whole.labels) == ("whole", "u3.wav", {"speaker": "s2", "text": "héllo"})
    assert "segment ends at 9.0 s" in (tmp_path / "out/failed.jsonl").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"path": "a.wav"}\n{"path": "a.wav"}\n', "line 2: id 'a.wav' is there twice"),
        ('{"sound": "a.wav"}\n', "line 1: no 'path' column; the columns are sound"),
        ('{"path": "a.wav", "start": 2, "end": 1}\n', "end 1.0 is not after start 2.0"),
        ("{nonsense\n", "line 1: not JSON"),
    ],
)
def test_a_bad_manifest_is_one_line(audio_folder, tmp_path, codec_file, capsys, text, says):
    (audio_folder / "list.jsonl").write_text(text)
    code = main(
        [
            "run",
            str(audio_folder / "list.jsonl"),
            "-o",
            str(tmp_path / "out"),
            "--codec",
            str(codec_file),
            "--workers",
            "0",
        ]
    )
    error = capsys.readouterr().err
    assert code == 1
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "/nowhere", "-o", "OUT"], "error: source '/nowhere': no such file or folder"),
        (["run", "AUDIO", "-o", "OUT", "--codec", "encodek"], "error: unknown codec 'encodek'"),
        (["run", "AUDIO", "-o", "OUT", "--task", "3", "--tasks", "2"], "error: task 3 of 2"),
        (
            ["run", "AUDIO", "-o", "OUT", "--num-codebooks", "9"],
            "error: num_codebooks 9: tiny_16khz has 1 to 8",
        ),
        (["run", "AUDIO", "-o", "OUT", "--device", "gpu"], "error: device 'gpu': give cpu, cuda"),
        (["run", "AUDIO", "-o", "OUT", "--device", "cuda:99"], "CUDA devices on this machine"),
        (["run", "AUDIO", "-o", "AUDIO/a.wav"], "a.wav: a file; give a folder as --output"),
        (["run", "AUDIO", "-o", "AUDIO/a.wav/out"], "a.wav/out: Not a directory; make it usable"),
        (["verify", "AUDIO"], "no dataset.json; this is not a folder of token shards"),
        (["repair", "AUDIO/a.wav"], "no dataset.json and no plan.json"),
    ],
)
def test_bad_arguments_are_one_line(audio_folder, tmp_path, codec_file, capsys, arguments, says):
    out = str(tmp_path / "out")
    arguments = [a.replace("AUDIO", str(audio_folder)).replace("OUT", out) for a in arguments]
    if "run" in arguments and "encodek" not in arguments:
        arguments += ["--codec", str(codec_file)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "x", "-o", "out", "--tasks", "0"], "argument --tasks: 0: must be at least 1"),
        (["run", "x", "-o", "out", "--stall-minutes", "-1"], "argument --stall-minutes: -1: must be at least 0"),
        (["run", "x", "-o", "out", "--stall-minutes", "nan"], "argument --stall-minutes: nan: must be at least 0"),
        (["run", "x", "-o", "out", "--workers", "two"], "argument --workers: invalid int value: 'two'"),
        (["run", "x"], "arguments are required: --output"),
        (["verify", "x", "--sample", "-1"], "argument --sample: -1: must be at least 0"),
        (["status", "x", "--tasks", "0"], "argument --tasks: 0: must be at least 1"),
        (["eval-codec", "x", "--codec", "y", "--clips", "0"], "argument --clips: 0: must be at least 1"),
        (["recode"], "invalid choice: 'recode'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments, says):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert says in error
    assert error.count("\n") == 1


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("(default: tiny_16khz)", "do task I, 0 to N - 1 (default: 0)", "the codec's own) --device"):
        assert option in text
    assert "None" not in text
    assert "False" not in text


def test_strict_and_the_commands_around_a_dataset(audio_folder, tmp_path, codec_file, capsys):
    output = tmp_path / "out"
    arguments = ["run", str(audio_folder), "-o", str(output), "--codec", str(codec_file), "--workers", "0"]
    assert main(arguments) == 0
    assert "11 utterances" in capsys.readouterr().out
    assert main([*arguments, "--strict"]) == 1
    assert main(["verify", str(output)]) == 0
    assert main(["status", str(output)]) == 0
    assert "finished; 1 shards" in capsys.readouterr().out
    assert main(["stats", str(output), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stats["nominal_bits_per_code"] == 10
    assert len(stats["codebooks"]) == 8
    wav = tmp_path / "x.wav"
    assert main(["decode", str(output), "--id", "u3.wav", "-o", str(wav), "--weights", str(codec_file)]) == 0
    assert soundfile.info(wav).frames == int(2.3 * 16_000)
    assert main(["decode", str(output), "--id", "u33.wav", "-o", str(wav)]) == 1
    assert "id 'u33.wav': not in" in capsys.readouterr().err
