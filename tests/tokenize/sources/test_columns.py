"""Lhotse's and Kaldi's manifests, as those toolkits write them."""

import json

import pytest

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.sources import read_sources


def recording(**more):
    source = {"type": "file", "channels": [0, 1], "source": "audio/call.wav"}
    return {"id": "call", "sources": [source], "sampling_rate": 8000, "num_samples": 80_000, "duration": 10.0} | more


def supervision(**more):
    place = {"id": "s1", "recording_id": "call", "start": 0.1, "duration": 1.5, "channel": 1}
    return place | {"text": "hello", "speaker": "anna", "custom": {"score": 3}} | more


def cut(**more):
    """A MonoCut in the layout of CutSet.to_jsonl."""
    place = {"id": "cut-1", "start": 2.5, "duration": 2.0, "channel": 1}
    return place | {"supervisions": [supervision()], "recording": recording(), "type": "MonoCut"} | more


def read(tmp_path, *rows):
    (tmp_path / "cuts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return list(read_sources([str(tmp_path / "cuts.jsonl")]))


def test_a_mono_cut_is_its_segment_and_channel_with_the_supervisions_labels(tmp_path):
    first, second, third = read(
        tmp_path,
        cut(custom={"snr": 12}),
        cut(id="cut-2", supervisions=[supervision(), supervision(id="s2")], recording=recording()),
        cut(id="cut-3", supervisions=[], channel=0),
    )
    assert (first.id, first.file, first.start, first.end, first.channel) == (
        "cut-1", str(tmp_path / "audio/call.wav"), 2.5, 4.5, 1,
    )  # fmt: skip
    assert first.labels == {"text": "hello", "speaker": "anna", "score": 3, "snr": 12}
    assert [s["id"] for s in second.labels["supervisions"]] == ["s1", "s2"]
    assert (third.channel, third.labels) == (0, {})


def test_a_file_of_a_second_channel_alone_is_read_from_its_first(tmp_path):
    source = {"type": "file", "channels": [1], "source": "b.wav"}
    [item] = read(tmp_path, cut(recording=recording(sources=[source])))
    assert item.channel == 0


def test_recordings_are_whole_files(tmp_path):
    [item] = read(tmp_path, recording())
    assert (item.id, item.start, item.end, item.channel, item.labels) == ("call", None, None, None, {})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"type": "MixedCut", "tracks": []}, "a MixedCut of Lhotse; only MonoCuts"),
        (cut(type="MultiCut", channel=[0, 1]), "a MultiCut of Lhotse"),
        (cut(channel=7), r"channel 7 of call, which has \[0, 1\]"),
        (cut(recording=recording(transforms=[{"name": "Speed"}])), "recording call has transforms"),
        (cut(recording=recording(sources=[{"type": "command", "source": "rm x"}])), "of the type command; only files"),
        (cut(recording=recording(sources=[])), "must have one source"),
        ({"type": "MonoCut", "id": "x", "features": {}}, "without a recording"),
        (supervision(), "a supervision of Lhotse without its recording"),
    ],
)
def test_other_rows_are_refused_with_their_line(tmp_path, row, says):
    with pytest.raises(UserError, match=f"cuts.jsonl, line 2: .*{says}"):
        read(tmp_path, cut(), row)


def test_kaldis_segments_speakers_and_texts_next_to_a_wav_scp(tmp_path):
    (tmp_path / "wav.scp").write_text("rec1 /data/a.wav\nrec2 b.wav\n")
    (tmp_path / "utt2spk").write_text("u1 anna\nu2 ben\n")
    (tmp_path / "text").write_text("u1 hello  there\n")
    whole = list(read_sources([str(tmp_path / "wav.scp")]))
    assert [(item.id, item.start, item.labels) for item in whole] == [("rec1", None, {}), ("rec2", None, {})]
    (tmp_path / "segments").write_text("u1 rec2 0.5 1.25\n\nu2 rec1 3 -1\n")
    first, second = read_sources([str(tmp_path / "wav.scp")])
    assert (first.id, first.file, first.start, first.end) == ("u1", str(tmp_path / "b.wav"), 0.5, 1.25)
    assert first.labels == {"speaker": "anna", "text": "hello  there"}
    assert (second.file, second.start, second.end, second.labels) == ("/data/a.wav", 3.0, None, {"speaker": "ben"})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("u1 rec9 0 1", "recording 'rec9' is not in"),
        ("u1 rec1 0", "must be an utterance, a recording, a start and an end"),
        ("u1 rec1 soon 1", "start 'soon' is not a number of seconds"),
    ],
)
def test_faulty_segments_are_named(tmp_path, line, says):
    (tmp_path / "wav.scp").write_text("rec1 a.wav\n")
    (tmp_path / "segments").write_text(f"u0 rec1 0 1\n{line}\n")
    with pytest.raises(UserError, match=f"line 2: {says}"):
        list(read_sources([str(tmp_path / "wav.scp")]))
