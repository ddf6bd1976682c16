"""Manifests and lists on standard input: what users' tables look like, and what is wrong with them."""

import gzip
import io
import json
from pathlib import Path

import pytest

from codecssl.tokenize.cli import main
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.manifest import read_list, read_manifest, read_rows, spool_stdin
from codecssl.tokenize.sources.sources import read_sources


def rows(path):
    return list(read_sources([str(path)]))


def simple(items):
    return [(item.id, item.path, item.file, item.start, item.end, item.labels) for item in items]


def test_a_suffix_without_a_reader_is_an_error_and_not_read_as_a_table(tmp_path):
    table = tmp_path / "list.psv"
    table.write_text("path\tspeaker\na.wav\tanna\n")
    with pytest.raises(
        UserError, match=r"list.psv: not a manifest by its name; it must end in one of .tsv .csv .jsonl "
    ):
        read_manifest(table)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_line_ends_and_byte_order_marks_of_any_system(tmp_path, ends, mark, kind):
    if kind == "jsonl":
        lines = ['{"path": "ä.wav", "start": "0.5", "speaker": "anna"}', "", '{"path": "/abs/b.wav", "start": ""}']
    else:
        lines = ["path,start,speaker", "ä.wav,0.5,anna", "/abs/b.wav,,"]
    text = mark + ends.join(lines) + ends
    path = tmp_path / f"list.{kind}"
    path.write_bytes((text.replace(",", "\t") if kind == "tsv" else text).encode())
    first, second = rows(path)
    assert (first.id, first.file, first.start, first.labels) == (
        "ä.wav#0.5-",
        str(tmp_path / "ä.wav"),
        0.5,
        {"speaker": "anna"},
    )
    assert (second.id, second.path, second.file, second.start) == ("/abs/b.wav", "/abs/b.wav", "/abs/b.wav", None)


def test_a_quotation_mark_in_a_tsv_is_text_and_in_a_csv_quotes(tmp_path):
    table = tmp_path / "list.tsv"
    table.write_text('path\ttext\na.wav\t"Oh, he said\nb.wav\t"no"\nc.wav\tyes"\n')
    assert [item.labels["text"] for item in rows(table)] == ['"Oh, he said', '"no"', 'yes"']
    table = tmp_path / "list.csv"
    table.write_text('path,text\na.wav,"Oh, he\nsaid"\nb.wav,no\n')
    assert [item.labels["text"] for item in rows(table)] == ["Oh, he\nsaid", "no"]


def test_segments_far_into_a_file_have_ids_of_their_own(tmp_path):
    table = tmp_path / "list.jsonl"
    times = [(10000.01, 10000.02), (10000.02, 10000.03), (0.1, 0.30000000000000004)]
    table.write_text("\n".join(json.dumps({"path": "a.wav", "start": s, "end": e}) for s, e in times))
    assert [item.id for item in rows(table)] == ["a.wav#10000.01-10000.02", "a.wav#10000.02-10000.03", "a.wav#0.1-0.3"]


def test_ids_that_are_numbers_and_labels_of_all_kinds(tmp_path):
    table = tmp_path / "list.jsonl"
    labels = {"n": 1, "x": 0.5, "yes": True, "none": None, "list": ["a", 1, [None]], "deep": {"a": {"b": 1}}}
    table.write_text(
        json.dumps({"path": "a.wav", "id": 0} | labels) + '\n{"path": "b.wav", "nan": NaN, "s": "\\ud800"}'
    )
    first, second = rows(table)
    assert (first.id, first.labels) == ("0", labels)
    assert second.labels == {"nan": None, "s": "\\ud800"}, "what UTF-8 cannot hold must not stop the writing later"
    json.dumps(second.labels, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.jsonl", '{"path": "a"}\n[1]', "line 2: a row must be a JSON object, this is list"),
        ("x.jsonl", '{"path": "a", "start": "soon"}', "line 1: start 'soon' is not a number of seconds"),
        ("x.jsonl", '{"path": "a", "end": NaN}', "line 1: end nan is not a number"),
        ("x.jsonl", '{"path": "a", "end": 0}', "line 1: end 0.0 is not after start 0.0"),
        ("x.csv", "path,end\na,-1\n", "line 2: end -1.0 is negative"),
        ("x.csv", "path,start\na,-1\n", "line 2: start -1.0 is negative"),
        ("x.csv", "sound,id\na,1\n", "line 2: no 'path' column; the columns are sound, id"),
        ("x.csv", "path,id\nb,1\n\na,1\n", "line 4: id '1' is there twice"),
        ("x.csv", f"path,t\na,{'x' * 140_000}\n", "line 2: field larger than"),
        ("x.tsv", "path\tid\na\n", "line 2: the number of fields differs from the header"),
        ("x.tsv", "", "no rows in it"),
        ("x.csv", "path\n", "no rows in it"),
    ],
)
def test_an_invalid_table_is_an_error_with_its_line(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        rows(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_a_table_in_another_encoding_is_an_error(tmp_path, name):
    (tmp_path / name).write_bytes('path,text\n{"path": "ä.wav"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}: not UTF-8 .* at byte"):
        rows(tmp_path / name)


LIST = b'\xef\xbb\xbfa.wav\r\n\n/abs/b c .wav\n{"path": "d.wav", "id": "d", "end": 2, "speaker": 1}\n\xff.wav\n'


def test_a_list_holds_paths_and_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = list(read_list(io.BytesIO(LIST)))
    assert [(item.id, item.file, item.end, item.labels) for item in items] == [
        ("a.wav", "a.wav", None, {}),
        ("/abs/b c .wav", "/abs/b c .wav", None, {}),
        ("d", "d.wav", 2.0, {"speaker": 1}),
        ("\\udcff.wav", "\udcff.wav", None, {}),
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LIST)))
    assert simple(read_sources(["-"])) == simple(items)
    with pytest.raises(UserError, match="standard input, line 2: id 'x' is there twice"):
        list(read_list(io.BytesIO(b"x\nx\n")))


def test_a_spooled_list_reads_as_the_list_from_anywhere_and_again(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "a.wav").write_bytes(b"sound")
    spooled = spool_stdin(io.BytesIO(LIST), tmp_path / "out" / "stdin.jsonl")
    monkeypatch.chdir(tmp_path)
    first, *rest = rows(spooled)
    assert first.open().read() == b"sound"
    assert (first.id, first.path, first.file) == ("a.wav", "a.wav", str(tmp_path / "here" / "a.wav"))
    assert [item.id for item in rest] == [item.id for item in list(read_list(io.BytesIO(LIST)))[1:]]
    assert rest[-1].file == str(tmp_path / "here" / "\udcff.wav")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["stdin.jsonl"]


def test_spooling_again_takes_the_same_list_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "stdin.jsonl"
    with pytest.raises(UserError, match="standard input: no paths"):
        spool_stdin(io.BytesIO(b"\n"), target)
    with pytest.raises(UserError, match="standard input, line 2: not JSON"):
        spool_stdin(io.BytesIO(b"a.wav\n{oops\n"), target)
    assert not list(tmp_path.iterdir())
    spool_stdin(io.BytesIO(LIST), target)
    before = target.read_bytes()
    for again in (LIST, b""):
        assert spool_stdin(io.BytesIO(again), target) == str(target)
    with pytest.raises(UserError, match="another list, or from another folder"):
        spool_stdin(io.BytesIO(b"a.wav\n"), target)
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="another list, or from another folder"):
        spool_stdin(io.BytesIO(LIST), target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(stream, target):
        Path("/dev/full").write_text("list")

    monkeypatch.setattr("codecssl.tokenize.sources.manifest.spool_stdin", full)
    assert main(["run", "-", "--output", str(tmp_path / "out")]) == 1
    assert (
        capsys.readouterr().err == f"error: {tmp_path / 'out'}: disk full; make room and run the same command again\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a.wav", "task": "er"}\n{"path": "b.wav"\n', "list.jsonl, line 2: not JSON"),
        ('{"path": "a.wav", "task": "er"}\n\n{"path": "b.wav"}\n', "list.jsonl, line 3: no column task"),
        ("[1]\n", "list.jsonl, line 1: a row must be a JSON object"),
        (None, "list.jsonl: no such file"),
    ],
)
def test_invalid_rows_are_named(tmp_path, text, message):
    path = tmp_path / "list.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(path, "path", "task")


def test_rows_keep_every_column(tmp_path):
    (tmp_path / "list.jsonl").write_text('{"path": "a.wav", "label": 3}\n\n{"path": "b.wav"}\n')
    assert read_rows(tmp_path / "list.jsonl", "path") == [{"path": "a.wav", "label": 3}, {"path": "b.wav"}]


def segments(path):
    return [(item.file, item.start, item.end, item.duration, item.channel) for item in rows(path)]


def test_columns_of_nemo_lhotse_and_kaldi_choose_the_segment(tmp_path):
    table, a = tmp_path / "list.jsonl", str(tmp_path / "a.wav")
    table.write_text(
        '{"path": "a.wav", "start": 1, "duration": 2}\n{"audio_filepath": "a.wav", "offset": 0.5, "duration": 1}\n'
        '{"path": "a.wav", "begin_time": 1, "end_time": "1.5", "channel": 1}\n{"path": "a.wav", "duration": 3}\n'
    )
    assert segments(table) == [
        (a, 1.0, 3.0, None, None),
        (a, 0.5, 1.5, None, None),
        (a, 1.0, 1.5, None, 1),
        (a, None, None, 3.0, None),
    ]
    assert [item.labels for item in rows(table)] == [{}, {}, {}, {"duration": 3}]
    assert [item.id for item in rows(table)] == ["a.wav#1-3", "a.wav#0.5-1.5", "a.wav#1-1.5@1", "a.wav"]
    for value in ('"telephone"', "-1", "0.5", "[0, 1]", "true"):
        table.write_text(f'{{"path": "a.wav", "channel": {value}}}')
        with pytest.raises(UserError, match="line 1: channel .* is not a channel's number"):
            rows(table)


def test_usual_lists_are_read(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "c.mp3").touch()
    lists = {
        "list.txt": b"a.wav\nb.wav\n",
        "nemo.json": b'{"audio_filepath": "a.wav"}\n{"audio_filepath": "b.wav"}\n',
        "list.jsonl.gz": gzip.compress(b'{"path": "a.wav"}\n{"path": "b.wav"}\n'),
        "wav.scp": b"u1 a.wav\nu2 b.wav\n",
        "fairseq.tsv": str(tmp_path).encode() + b"\na.wav\t16000\nb.wav\t32000\n",
    }
    for name, content in lists.items():
        (tmp_path / name).write_bytes(content)
        assert [item.file for item in rows(tmp_path / name)] == [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")], name
    assert [item.id for item in rows(tmp_path / "wav.scp")] == ["u1", "u2"]
    (tmp_path / "train.tsv").write_text("client_id\tpath\tsentence\n1\tc.mp3\tHello\n")
    assert [item.file for item in rows(tmp_path / "train.tsv")] == [str(tmp_path / "clips" / "c.mp3")]


def test_a_command_in_a_wav_scp_is_refused_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "wav.scp").write_text("u1 sph2pipe -f wav a.sph |\n")
    assert main(["run", str(tmp_path / "wav.scp"), "--output", str(tmp_path / "out")]) == 1
    assert "wav.scp, line 1: a command (sph2pipe -f wav a.sph |), and commands are not run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
