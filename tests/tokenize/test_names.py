"""Names of folders and files whose bytes are not UTF-8, and inputs that no table should hold."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from codecssl.tokenize.cli import main
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources.sources import read_sources


def test_folders_and_files_with_any_bytes_in_their_names(tmp_path, hashcodec, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    audio, out = os.fsdecode(b"sp\xffeech"), os.fsdecode(b"o\xfeut")
    deep = tmp_path / audio / os.fsdecode(b"d\xe9")
    deep.mkdir(parents=True)
    (deep / os.fsdecode(b"a\xff.wav")).write_bytes(wav(tmp_path))
    (tmp_path / audio / os.fsdecode(b"\xff.wav")).write_text("no sound")
    run = ["run", audio, "-o", out, "--codec", "hash_16khz", "--workers", "0"]
    for command in (run, [*run, "--retry-failed"], ["status", out], ["stats", out], ["verify", out, "--sample", "0"]):
        assert main(command) == 0
    printed = capfd.readouterr()
    assert "o\\udcfeut: finished" in printed.out
    assert "Traceback" not in printed.err
    shards = Shards(out)
    assert list(shards.ids()) == ["d\\udce9/a\\udcff.wav"]
    assert main(["run", os.fsdecode(b"n\xff"), "-o", "x"]) == 1
    assert capfd.readouterr().err == "error: source 'n\\udcff': no such file or folder\n"


@pytest.mark.parametrize("stage", ["tokenize", "pretrain", "superb"])
def test_a_missing_folder_with_such_a_name_is_a_one_line_error(stage):
    command = {"tokenize": ["verify"], "pretrain": ["status"], "superb": ["report"]}[stage]
    words = [sys.executable, "-m", f"codecssl.{stage}", *command, b"n\xffone"]
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().count("\n") == 1
    assert "n\\udcffone" in done.stderr.decode()


def wav(folder):
    soundfile.write(folder / "x.wav", np.full(4000, 0.1), 16_000)
    content = (folder / "x.wav").read_bytes()
    (folder / "x.wav").unlink()
    return content


DIGITS = "1" * 10_000


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.jsonl", f'{{"path": "a", "n": {DIGITS}}}', "line 1: a number of more than 4300 digits"),
        ("x.jsonl", f'{{"path": "a", "start": {DIGITS}}}', "line 1: a number of more than 4300 digits"),
        ("x.jsonl", '{"path": "a", "n": ' + "[" * 500 + "]" * 500 + "}", "line 1: a label is nested more than 32 deep"),
        ("x.jsonl", '{"path": "a", "start": Infinity}', "line 1: start inf is not a number of seconds"),
        ("x.csv", "path,start\na,inf\n", "line 2: start inf is not a number of seconds"),
        ("x.csv", "path,start\na,nan\n", "line 2: start nan is not a number of seconds"),
        ("x.csv", f"path,start\na,{DIGITS}\n", "line 2: start inf is not a number of seconds"),
        ("x.csv", f"path,channel\na,{DIGITS}\n", "line 2: channel '1111"),
        ("x.jsonl.gz", "no gzip", "x.jsonl.gz: not a whole gzip file"),
    ],
)
def test_crafted_rows_are_one_line_errors(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        list(read_sources([str(tmp_path / name)]))
    assert len(str(caught.value)) < 400


def test_deeply_nested_json_is_a_one_line_error(tmp_path):
    """In a process of its own: CPython 3.11 can end with an internal error after it ran out of recursion."""
    (tmp_path / "x.jsonl").write_text('{"path": "a", "n": ' + "[" * 10_000 + "]" * 10_000 + "}")
    words = [sys.executable, "-m", "codecssl.tokenize", "run", "x.jsonl", "-o", "out", "--workers", "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stderr == "error: x.jsonl, line 1: JSON nested too deep; a label may have 32 levels\n"


def test_a_fairseq_list_with_an_invalid_number(tmp_path):
    (tmp_path / "x.tsv").write_text(f"/data\na.wav\t16000\nb.wav\t{DIGITS}\nc.wav\t²\n")
    assert [item.labels["samples"] for item in read_sources([str(tmp_path / "x.tsv")])] == [16000, DIGITS, "²"]


def test_a_wav_of_one_hertz_takes_no_memory(tmp_path, hashcodec):
    soundfile.write(tmp_path / "x.wav", np.zeros(40_000), 1, subtype="PCM_16")
    command = ["run", str(tmp_path / "x.wav"), "-o", str(tmp_path / "out"), "--codec", "hash_16khz", "--workers", "0"]
    assert main(command) == 1
    [row] = map(json.loads, (tmp_path / "out/failed.jsonl").read_text().splitlines())
    assert row["reason"] == "sample rate 1 Hz: must be from 1000 to 1000000; correct the file's header"


def test_truncated_segments_and_cancelled_channels_are_counted(tmp_path, hashcodec, capsys):
    left = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000)
    soundfile.write(tmp_path / "anti.wav", np.stack([left, -left], 1), 16_000)
    soundfile.write(tmp_path / "mono.wav", left, 16_000)
    rows = [{"path": "anti.wav"}, {"path": "mono.wav", "start": 0.5, "end": 1.2}, {"path": "mono.wav"}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    command = ["run", str(tmp_path / "list.jsonl"), "-o", str(out), "--codec", "hash_16khz", "--workers", "0"]
    for _ in range(2):
        assert main(command) == 0
        first, second = capsys.readouterr().err.splitlines()
        assert first.startswith("note: 1 files whose channels cancel in their mean are almost silent")
        assert second == "note: 1 segments ended up to 0.5 s after their file and were cut there"
    assert Shards(out).header["totals"]["notes"] == {"cancelled": 1, "clipped": 1}
    mark = json.loads((out / "shards/00000.json").read_text())
    assert mark["notes"] == {"cancelled": ["anti.wav"], "clipped": ["mono.wav#0.5-1.2"]}
    assert main(["verify", str(out), "--sample", "0"]) == 0
    assert main(["stats", str(out)]) == 0
    assert "note             1 segments ended up to 0.5 s" in capsys.readouterr().out
    header = (out / "dataset.json").read_text()
    (out / "dataset.json").write_text(header.replace('"clipped": 1', '"clipped": 7'))
    assert main(["verify", str(out), "--sample", "0"]) == 1
