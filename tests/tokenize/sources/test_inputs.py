"""One input: opening it, its digest, its name among all others."""

import io
import pickle
import random

import pytest

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources import open_audio
from codecssl.tokenize.sources.inputs import Input, Seen, split_options
from codecssl.tokenize.sources.open_audio import open_file

CONTENT = bytes(range(256)) * 20


def item(**changes):
    return Input(**{"id": "a", "path": "a.wav", "file": "/x/a.wav"} | changes)


@pytest.mark.parametrize("held", [1 << 20, 10])
@pytest.mark.parametrize(("offset", "size"), [(None, None), (0, 5120), (100, 1000), (5119, 1)])
def test_a_part_of_a_file_behaves_as_a_file_of_its_own(tmp_path, monkeypatch, held, offset, size):
    monkeypatch.setattr(open_audio, "HELD_BYTES", held)
    (tmp_path / "x").write_bytes(CONTENT)
    part = CONTENT if offset is None else CONTENT[offset : offset + size]
    ours, plain = open_file(str(tmp_path / "x"), "name.mp3", offset, size), io.BytesIO(part)
    assert ours.name == "name.mp3"
    rng = random.Random(0)
    for _ in range(300):
        if rng.random() < 0.5:
            whence = rng.choice([0, 1, 2])
            low = {0: 0, 1: -plain.tell(), 2: -len(part)}[whence]
            place = rng.randint(low, len(part) + 10)
            assert ours.seek(place, whence) == plain.seek(place, whence)
        else:
            count = rng.choice([-1, 0, 1, 7, 500, 10_000])
            assert ours.read(count) == plain.read(count)
        assert ours.tell() == plain.tell()
    ours.close()
    assert ours.closed


def test_inputs_that_cannot_be_opened_have_a_reason(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    for changes, says in (
        ({"file": str(tmp_path / "gone")}, "cannot read: No such file"),
        ({"file": str(tmp_path)}, "cannot read: Is a directory"),
        ({"file": "nul\0"}, "cannot read: embedded null byte"),
        ({"file": str(tmp_path / "x"), "offset": 3, "size": 4}, "x ends 2 bytes before a.wav does"),
        ({"file": str(tmp_path / "x"), "row": 0, "column": "audio"}, "cannot read row 0"),
        ({"problem": "no audio in it"}, "no audio in it"),
    ):
        with pytest.raises(UserError, match=says):
            item(**changes).open()


def test_the_digest_depends_on_content_and_not_on_location():
    base = item()
    assert base.digest() == item(file="/elsewhere/a.wav").digest() == pickle.loads(pickle.dumps(base)).digest()
    # as written into the shards of version 0.1.0: finished datasets stay finished
    assert base.digest().hex()[:16] == "62f93801d123864c"
    others = [
        item(id="b"),
        item(path="b.wav"),
        item(start=0.5),
        item(end=0.5),
        item(labels={"a": 1}),
        item(offset=1, size=2),
        item(offset=2, size=2),
        item(offset=2, size=1),
        item(row=1, column="a"),
        item(row=2, column="a"),
        item(row=1, column="b"),
        item(problem="none"),
    ]
    assert len({base.digest(), *(other.digest() for other in others)}) == 1 + len(others)


def test_seen_is_a_set_of_names():
    rng, plain, seen = random.Random(1), set(), Seen()
    for _ in range(30_000):
        name = f"u{rng.randrange(20_000)}"
        assert seen.add(name) == (name not in plain)
        plain.add(name)
    assert seen._slots.itemsize * len(seen._slots) < 22 * len(plain)


def test_options_follow_the_last_question_mark_that_begins_one():
    assert split_options("wds:a-?.tar", ["audio"]) == ("wds:a-?.tar", {})
    assert split_options("wds:a-?.tar?audio=x.wav", ["audio"]) == ("wds:a-?.tar", {"audio": "x.wav"})
    assert split_options("hf:n:s?id=&audio=a=b", ["audio", "id"]) == ("hf:n:s", {"id": "", "audio": "a=b"})
