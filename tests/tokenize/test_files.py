"""Files that are there whole or not at all."""

import pytest

from codecssl.tokenize.files import atomic_file, names_in, temporaries, write_atomic


def test_a_file_is_not_there_until_it_is_whole(tmp_path):
    with atomic_file(tmp_path / "x") as file:
        file.write(b"half")
        assert names_in(tmp_path) == set()
        assert len(temporaries(tmp_path)) == 1
    assert (tmp_path / "x").read_bytes() == b"half"
    assert temporaries(tmp_path) == []


def test_what_fails_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "x", b"old")
    with pytest.raises(TypeError), atomic_file(tmp_path / "x") as file:
        file.writelines([b"new", None])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


def test_two_writers_at_a_time_do_not_meet(tmp_path):
    """Numbers of processes do not tell them apart: those of two containers are the same, as here."""
    with atomic_file(tmp_path / "x") as first:
        first.write(b"whole")
        first.flush()
        write_atomic(tmp_path / "x", b"2")
        assert (tmp_path / "x").read_bytes() == b"2"
        first.write(b" file")
    assert (tmp_path / "x").read_bytes() == b"whole file"
    assert names_in(tmp_path) == {"x"}
