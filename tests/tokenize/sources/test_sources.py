"""Sources: what they list, in which order, under which ids."""

import os
from pathlib import Path

import pytest

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources import sources
from codecssl.tokenize.sources.sources import read_sources


@pytest.fixture
def tree(tmp_path):
    for name in ("b/z.wav", "b/a.FLAC", "a.wav", "a.flac", "Ä.mp3", "b.wav", "read.me", "c/none.txt"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "tree"


def ids(*sources):
    return [item.id for item in read_sources([str(s) for s in sources])]


def test_a_folder_is_listed_by_the_bytes_of_its_names(tree):
    assert ids(tree) == ["a.flac", "a.wav", "b/a.FLAC", "b/z.wav", "b.wav", "Ä.mp3"]


def test_links_are_followed_except_in_loops(tree):
    (tree / "c" / "up").symlink_to(tree)
    (tree / "c" / "b").symlink_to(tree / "b")
    assert ids(tree).count("c/b/z.wav") == 1
    assert len(ids(tree)) == 8


def test_a_glob_follows_links_but_not_in_circles(tree, monkeypatch):
    (tree / "c" / "up").symlink_to(tree)
    (tree / "c" / "b").symlink_to(tree / "b")
    expected = ["a.wav", "b/z.wav", "b.wav", "c/b/z.wav"]
    assert ids(tree / "**" / "*.wav") == expected
    monkeypatch.chdir(tree / "c")
    assert ids("../c/../**/*.wav") == expected, "the path before the first wildcard may visit a folder twice"
    monkeypatch.chdir(tree)
    assert ids("**/*.wav") == expected


def test_an_empty_name_is_not_the_working_folder(tree, monkeypatch):
    monkeypatch.chdir(tree)
    with pytest.raises(UserError, match="an empty name; give . for the working folder"):
        ids("")
    assert ids(".")[0] == "a.flac"


def test_files_of_a_folder_open_under_the_paths_of_pathlib(tree, monkeypatch):
    monkeypatch.chdir(tree)
    for folder in (".", "b", "./b/", "../tree", str(tree)):
        paths = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in (".wav", ".flac", ".mp3"))
        assert sorted(item.file for item in read_sources([folder])) == paths


def test_a_glob_and_a_file(tree):
    assert ids(tree / "**" / "*.wav") == ["a.wav", "b/z.wav", "b.wav"]
    assert ids(tree / "a.wav") == ["a.wav"]


def test_several_sources_keep_their_ids_apart(tree, tmp_path):
    (tmp_path / "other" / "tree").mkdir(parents=True)
    (tmp_path / "other" / "tree" / "a.wav").touch()
    both = ids(tree, tmp_path / "other" / "tree")
    assert len(both) == len(set(both)) == 7
    assert both[0] == "0-tree/a.flac"
    assert both[-1] == "1-tree/a.wav"
    assert ids(tree / "b", tree / "b.wav")[-1] == "b.wav/b.wav"


def test_tables_with_labels_and_segments(tree):
    table = tree / "list.tsv"
    table.write_text("path\tstart\tend\tspeaker\na.wav\t0.5\t1\tanna\nb/z.wav\t\t\tbert\n")
    first, second = read_sources([str(table)])
    assert (first.id, first.start, first.end, first.labels) == ("a.wav#0.5-1", 0.5, 1.0, {"speaker": "anna"})
    assert (second.id, second.start, second.file) == ("b/z.wav", None, str(tree / "b/z.wav"))
    table.with_suffix(".csv").write_text("path,id\na.wav,x\nb.wav,x\n")
    with pytest.raises(UserError, match=r"list\.csv, line 3: id 'x' is there twice"):
        ids(table.with_suffix(".csv"))
    table.with_suffix(".csv").write_text("path,id\na.wav,x,3\n")
    with pytest.raises(UserError, match="the number of fields differs from the header"):
        ids(table.with_suffix(".csv"))


@pytest.mark.parametrize("name", ["gone", "c", "*.ogg"])
def test_a_source_without_audio_is_an_error(tree, name):
    with pytest.raises(UserError, match="no audio found|no such file or folder"):
        ids(tree / name)


def test_skipping_leaves_out_the_first_of_all_sources(tree):
    sources = [str(tree / "b"), str(tree / "a.wav"), str(tree)]
    whole = list(read_sources(sources))
    for skip in (0, 1, 2, 3, 8, 9, 50):
        assert list(read_sources(sources, skip)) == whole[skip:]


def test_names_that_are_not_utf8_stay_apart(tree):
    for name in (b"\xff.wav", b"\xfe.wav"):
        with open(os.fsencode(tree / "c") + b"/" + name, "wb") as file:
            file.write(name)
    items = list(read_sources([str(tree / "c")]))
    assert [item.id for item in items] == ["\\udcfe.wav", "\\udcff.wav"]
    assert [item.open().read() for item in items] == [b"\xfe.wav", b"\xff.wav"]
    assert len({item.digest() for item in items}) == 2


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["lists/train.tsv", "dev.jsonl"], r"It holds manifests: give .*dev\.jsonl or .*train\.tsv"),
        (["0.tar", "1.tar"], r"It holds tars: give 'wds:.*\*\.tar'"),
        (["x/0.tar.gz"], r"give 'wds:.*x/\*\.tar\.gz'"),
        (["state.json", "dataset_info.json", "data.arrow"], "It is a saved dataset: give hf:.*:SPLIT"),
        (["data/train.parquet"], "It holds a dataset: give hf:.*:SPLIT"),
        (["read.me"], r"files must end in .*\.caf"),
    ],
)
def test_the_error_of_a_folder_without_audio_names_its_contents(tmp_path, files, says):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"no audio found.*{says}"):
        ids(tmp_path)


def test_an_unlistable_folder_is_a_one_line_error(tree, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="tree/b: cannot be listed: Permission denied"):
        ids(tree / "b")
    assert ids(tree) == ["a.flac", "a.wav", "b", "b.wav", "Ä.mp3"], "the other files must be listed"


def test_files_left_out_of_a_folder_are_counted(tree):
    for name in ("x.m4a", "x.webm", "x.mp2", "x.wv1", "x.wave", "._a.wav", "clip.mp4", "clip.MOV"):
        (tree / name).touch()
    sources.left_out.clear()
    assert {"x.m4a", "x.webm", "x.mp2", "x.wv1", "x.wave"} < set(ids(tree))
    assert dict(sources.left_out) == {"._*": 1, ".mp4": 1, ".mov": 1}


def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    [item] = read_sources([str(tmp_path)])
    with pytest.raises(UserError, match="not a regular file"):
        item.open()
