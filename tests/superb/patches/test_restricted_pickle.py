"""A run folder's pickles give back s3prl's encoders, and run nothing."""

import os
import pickle
from pathlib import Path

import pytest

from codecssl.superb.patches import import_patches, restricted_pickle, task_patches
from codecssl.tokenize.common.errors import UserError


@pytest.fixture(autouse=True)
def _installed() -> None:
    import_patches.install()
    task_patches.install()


class Evil:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> object:
        return self.call


@pytest.mark.parametrize(
    "call", [(os.system, "touch ran"), (eval, "open('ran', 'w')"), (getattr, "", "join"), (Path.touch, Path("ran"))]
)
def test_a_pickle_with_a_call_is_a_one_line_error(call, tmp_path: Path, monkeypatch) -> None:
    import s3prl.problem.base as base
    import s3prl.problem.common.superb_sid as sid

    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder.pkl").write_bytes(pickle.dumps(Evil(*call)))
    for module in (base, sid):
        with (tmp_path / "encoder.pkl").open("rb") as file, pytest.raises(UserError, match="encoder.pkl: holds "):
            module.pickle.load(file)
    assert not (tmp_path / "ran").exists()


def test_pickles_of_s3prl_itself_are_loaded(tmp_path: Path) -> None:
    from s3prl.dataio.encoder.category import CategoryEncoder, CategoryEncoders
    from s3prl.dataio.encoder.tokenizer import load_tokenizer

    words = tmp_path / "vocab"
    words.write_text("a\nb\n|\n")
    objects = [CategoryEncoder(["b", "a"]), CategoryEncoders([["a"], ["b", "c"]]), {"x": 1, "y": {2, 3}}]
    objects += [load_tokenizer(kind, vocab_file=str(words)) for kind in ("character", "word", "phoneme")]
    for number, value in enumerate(objects):
        (tmp_path / "p.pkl").write_bytes(pickle.dumps(value))
        with (tmp_path / "p.pkl").open("rb") as file:
            found = restricted_pickle.load(file)
        assert type(found) is type(value), number
        assert getattr(found, "__dict__", found).keys() == getattr(value, "__dict__", value).keys()
    assert restricted_pickle.load((tmp_path / "p.pkl").open("rb")).encode("a b") == objects[-1].encode("a b")


def test_a_table_of_pandas_comes_back(tmp_path: Path) -> None:
    import pandas
    import s3prl.problem.base as base

    (tmp_path / "t.csv").write_text("id,label,start_sec\nutt:1,yes,0.5\nutt:2,no,\n")
    table = pandas.read_csv(tmp_path / "t.csv")
    with (tmp_path / "valid_df.pkl").open("wb") as file:
        base.pickle.dump(table, file)
    with (tmp_path / "valid_df.pkl").open("rb") as file:
        pandas.testing.assert_frame_equal(base.pickle.load(file), table)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"cos\nsystem\n", b"(" * 1000])
def test_a_damaged_pickle_is_a_one_line_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "e.pkl").write_bytes(content)
    with (tmp_path / "e.pkl").open("rb") as file, pytest.raises(UserError, match="e.pkl: (damaged|holds)"):
        restricted_pickle.load(file)


def test_fine_tuning_is_refused() -> None:
    """If it were ignored, frozen results could be mistaken for fine-tuned ones."""
    from argparse import Namespace

    from codecssl.superb import hubconf

    hubconf.refuse_trainable()
    hubconf.refuse_trainable()
    from s3prl.downstream.runner import Runner

    runner = Runner.__new__(Runner)
    runner.args = Namespace(upstream="codecssl", upstream_trainable=True)
    with pytest.raises(UserError, match="-f/--upstream_trainable: it is always frozen"):
        runner._get_upstream()
    runner.args = Namespace(upstream="nothing_of_this_name", upstream_trainable=True)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        runner._get_upstream()
