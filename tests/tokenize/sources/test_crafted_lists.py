"""Crafted lists of audio: reading one gives inputs, which are read or fail with a reason, or ends with one line."""

import json

import numpy as np
import pytest
import soundfile
from crafted import NASTY, change_bytes, fuzzed
from helpers import card
from hypothesis import given
from hypothesis import strategies as st

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.encode import read
from codecssl.tokenize.format.records import Failure
from codecssl.tokenize.sources.sources import read_sources

FIELDS = "path audio_filepath id start end duration offset channel text begin_time recording supervisions".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lists")
    soundfile.write(root / "a.wav", np.zeros((1600, 2)), 16_000)
    return root


def use(path):
    try:
        for item in read_sources([str(path)]):
            result = read(item, card([16]))
            assert not isinstance(result, Failure) or "\n" not in result.reason
    except UserError as error:
        assert "\n" not in str(error)


@fuzzed(60)
@given(st.data())
def test_rows_with_any_value(folder, data):
    rows, values = [], st.sampled_from([*NASTY, "a.wav", "nan", "-0", "1e400"])
    for number in range(data.draw(st.integers(1, 3))):
        row = {"path": "a.wav", "id": f"u{number}", "start": 0.01, "duration": 0.05}
        for _ in range(data.draw(st.integers(1, 3))):
            row[data.draw(st.sampled_from(FIELDS))] = data.draw(values)
        rows.append(json.dumps(row))
    path = folder / data.draw(st.sampled_from(["l.jsonl", "l.json"]))
    path.write_text("\n".join(rows))
    use(path)


LISTS = {
    "l.csv": b"path,start,duration,text\na.wav,0,0.05,hello\na.wav,0.02,0.05,x\n",
    "l.tsv": b"path\tstart\tend\na.wav\t0\t0.05\n",
    "fairseq.tsv": b"/nowhere\na.wav\t1600\n",
    "wav.scp": b"u1 a.wav\nu2 sox a.wav -t wav - |\n",
    "list.txt": b"a.wav\n",
    "l.jsonl": b'{"path": "a.wav", "start": 0.01}\n{"path": "a.wav", "id": "b"}\n',
}


@fuzzed(60)
@given(st.data())
def test_lists_with_any_bytes(folder, data):
    name = data.draw(st.sampled_from(sorted(LISTS)))
    (folder / name).write_bytes(change_bytes(LISTS[name], data))
    use(folder / name)
