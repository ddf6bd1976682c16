"""Hugging Face datasets: against what `datasets` itself wrote and reads, and read by processes that don't import it."""

import hashlib
import io
import pickle
import sys
import zipfile

import datasets
import numpy as np
import pytest
import soundfile
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value

from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.sources.audio import read_wave
from codecssl.tokenize.sources.sources import is_stream, read_sources

ROWS = 7


def flac(seed, frames=400):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.random.default_rng(seed).uniform(-0.5, 0.5, frames), 16_000, format="FLAC")
    return buffer.getvalue()


def dataset(rows=ROWS, **columns):
    defaults = dict(
        audio=[{"bytes": flac(i, 400 + 10 * i), "path": f"u{i}.flac"} for i in range(rows)],
        text=[f"héllo {i}" for i in range(rows)],
        emotion=[i % 3 - 1 for i in range(rows)],  # -1: datasets' own sign for "unknown"
        phones=[["A", "B"][: i % 3] for i in range(rows)],
        score=[float("nan") if i == 1 else i / 2 for i in range(rows)],
        vector=[[0.5] * (1001 if i == 0 else 3) for i in range(rows)],
        picture=[b"\x89PNG"] * rows,
    )
    made = Dataset.from_dict(defaults | columns)
    if "audio" not in columns:
        made = made.cast_column("audio", Audio())
    made = made.cast_column("picture", datasets.Image())  # broken: whoever decodes it fails
    return made.cast_column("emotion", ClassLabel(names=["calm", "angry"]))


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Disable the hub and torchcodec, and use a separate cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "TORCHCODEC_AVAILABLE", False, raising=False)
    for module in ("torchcodec", "torchcodec.encoders", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.fixture
def saved(tmp_path):
    dataset().save_to_disk(str(tmp_path / "saved"), num_shards=3)
    return tmp_path / "saved"


@pytest.fixture
def parquets(tmp_path):
    """A folder that load_dataset reads: two files of train, one of test."""
    folder = tmp_path / "parquets"
    folder.mkdir()
    made = dataset()
    made.select(range(4)).to_parquet(str(folder / "train-00000.parquet"))
    made.select(range(4, 7)).to_parquet(str(folder / "train-00001.parquet"))
    made.select([6, 0]).to_parquet(str(folder / "test-00000.parquet"))
    return folder


def inputs(source, skip=0):
    return list(read_sources([source], skip))


def sha256(item):
    with item.open() as file:
        return hashlib.sha256(file.read()).hexdigest()


def hashes(rows):
    return [hashlib.sha256(flac(i, 400 + 10 * i)).hexdigest() for i in rows]


def test_a_saved_dataset_is_listed_without_its_audio_and_read_row_by_row(saved):
    found = inputs(f"hf:{saved}:train")
    assert [item.id for item in found] == [f"{i:08d}" for i in range(ROWS)]
    assert [item.path for item in found] == [f"u{i}.flac" for i in range(ROWS)]
    assert [sha256(item) for item in found] == hashes(range(ROWS))
    assert len({item.file for item in found}) == 3
    for item in found:
        assert item.data is None
        assert len(pickle.dumps(item)) < 600
    theirs = datasets.load_from_disk(str(saved)).select_columns("audio").cast_column("audio", Audio(decode=False))
    assert [item.size for item in found] == [len(row["audio"]["bytes"]) for row in theirs]


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_labels_are_names_numbers_and_short_lists(parquets, kind):
    found = inputs(f"{kind}:{parquets}:train")
    assert found[1].labels == {
        "text": "héllo 1",
        "emotion": "calm",
        "phones": ["A"],
        "score": None,
        "vector": [0.5] * 3,
    }
    assert [item.labels["emotion"] for item in found[:3]] == [None, "calm", "angry"]
    assert found[0].labels["vector"] is None, "1001 floats must be taken for features, not for a label"
    assert inputs(f"{kind}:{parquets}:train?labels=text,phones")[2].labels == {"text": "héllo 2", "phones": ["A", "B"]}
    assert inputs(f"{kind}:{parquets}:train?labels=")[2].labels == {}


def test_a_stream_matches_the_files_and_carries_its_audio(parquets):
    listed, streamed = inputs(f"hf:{parquets}:train"), inputs(f"hf-stream:{parquets}:train")
    for field in ("id", "path", "labels", "size"):
        assert [getattr(a, field) for a in listed] == [getattr(b, field) for b in streamed]
    assert [sha256(item) for item in listed] == [sha256(item) for item in streamed] == hashes(range(ROWS))
    assert all(item.data for item in streamed)
    assert is_stream(f"hf-stream:{parquets}:train")
    assert not is_stream(f"hf:{parquets}:train")


@pytest.mark.parametrize(
    ("split", "rows"),
    [("test", [6, 0]), ("test+train", [6, 0, *range(7)]), ("train[2:5]", [2, 3, 4]), ("train[-1:]+test[:1]", [6, 6])],
)
def test_any_expression_of_splits(parquets, split, rows):
    assert [sha256(item) for item in inputs(f"hf:{parquets}:{split}")] == hashes(rows)


def test_skipping_is_leaving_out_the_first(parquets, saved):
    for source in (
        f"hf-stream:{parquets}:train",
        f"hf:{parquets}:train",
        f"hf:{saved}:train",
        f"hf-stream:{saved}:train",
    ):
        whole = inputs(source)
        assert inputs(source, skip=5) == whole[5:]
        assert inputs(source, skip=7) == []
    both = [f"hf-stream:{parquets}:test", f"hf-stream:{parquets}:train"]
    assert list(read_sources(both, skip=3)) == list(read_sources(both))[3:]
    assert list(read_sources(both, skip=1)) == list(read_sources(both))[1:]


def test_a_stream_skips_inside_datasets(parquets, monkeypatch):
    skipped = []
    skip = datasets.IterableDataset.skip
    monkeypatch.setattr(datasets.IterableDataset, "skip", lambda self, n: skipped.append(n) or skip(self, n))
    inputs(f"hf-stream:{parquets}:train", skip=5)
    assert skipped == [5]


def test_a_dict_of_splits_on_disk(tmp_path):
    DatasetDict(train=dataset(), dev=dataset(2)).save_to_disk(str(tmp_path / "both"))
    assert len(inputs(f"hf:{tmp_path / 'both'}:dev")) == 2
    with pytest.raises(UserError, match="no split 'test'; there are dev, train"):
        inputs(f"hf:{tmp_path / 'both'}:test")


def test_a_fresh_process_reads_rows_without_importing_datasets(saved, parquets, read_elsewhere):
    found = [*inputs(f"hf:{saved}:train"), *inputs(f"hf:{parquets}:test"), *inputs(f"hf-stream:{parquets}:test")]
    assert read_elsewhere(found, "datasets", "torch") == hashes([*range(ROWS), 6, 0, 6, 0])


def test_ids(tmp_path):
    def save(name, **columns):
        dataset(3, **columns).save_to_disk(str(tmp_path / name))
        return f"hf:{tmp_path / name}:train"

    ids = lambda source: [item.id for item in inputs(source)]  # noqa: E731
    source = save("found", id=["x/1", "x/2", None], number=[7, 8, 9])
    assert ids(source) == ["x/1", "x/2", "00000002"]
    assert ids(f"{source}?id=number") == ["7", "8", "9"]
    assert ids(f"{source}?id=") == ["00000000", "00000001", "00000002"]
    twice = save("twice", id=["x", "y", "x"])
    with pytest.raises(UserError, match=r"row 2: id 'x' is there twice; name another column with \?id="):
        ids(twice)
    with pytest.raises(UserError, match="row 2: id 'x' is there twice"):
        ids(twice.replace("hf:", "hf-stream:"))
    assert ids(f"{twice}?id=") == ["00000000", "00000001", "00000002"]


def test_paths_urls_and_bytes_as_audio(tmp_path):
    (tmp_path / "a.flac").write_bytes(flac(1))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("in/b.flac", flac(2))
    zipped = f"zip://in/b.flac::{tmp_path / 'b.zip'}"
    files = [str(tmp_path / "a.flac"), zipped, str(tmp_path / "gone.flac"), None, zipped.replace("b.flac", "c.flac")]
    made = dataset(5, audio=[b""] * 5).remove_columns("audio").add_column("file", files)
    made.save_to_disk(str(tmp_path / "paths"))
    for kind in ("hf", "hf-stream"):
        found = inputs(f"{kind}:{tmp_path / 'paths'}:train")
        assert [item.path for item in found] == ["a.flac", "b.flac", "gone.flac", "00000003", "c.flac"]
        assert [sha256(item) for item in found[:2]] == [hashlib.sha256(flac(i)).hexdigest() for i in (1, 2)]
        with pytest.raises(UserError, match="cannot read: No such file"):
            found[2].open()
        with pytest.raises(UserError, match="this row has no audio"):
            found[3].open()
        with pytest.raises(UserError, match="cannot read zip://in/c.flac"):
            found[4].open()
    dataset(2, audio=[flac(3), flac(4)]).save_to_disk(str(tmp_path / "bytes"))
    found = inputs(f"hf:{tmp_path / 'bytes'}:train")
    assert [sha256(item) for item in found] == [hashlib.sha256(flac(i)).hexdigest() for i in (3, 4)]
    assert found[0].size == len(flac(3))


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_decoded_arrays_become_wavs_of_the_same_samples(tmp_path, kind, dtype, channels):
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (channels, 300)).astype("f4")
    scale = 1 if dtype[0] == "f" else 2.0 ** (int(dtype[3:]) - 1)
    array = (samples.astype("f8") * scale).astype(dtype)
    inner = datasets.List(Value(dtype)) if channels == 1 else datasets.List(datasets.List(Value(dtype)))
    features = Features({"speech": {"array": inner, "sampling_rate": Value("int64")}})
    value = {"array": array[0] if channels == 1 else array, "sampling_rate": 8_000}
    Dataset.from_dict({"speech": [value]}, features=features).save_to_disk(str(tmp_path / "arrays"))
    [item] = inputs(f"{kind}:{tmp_path / 'arrays'}:train")
    with item.open() as file:
        read, rate = soundfile.read(file, dtype="float32", always_2d=True)
    assert rate == 8_000
    assert np.array_equal(read.T, (array / scale).astype("f4"))
    assert sha256(item) == sha256(item), "the bytes must not depend on the time"


def test_integers_of_unknown_scale_are_refused(tmp_path):
    Dataset.from_dict({"audio": [{"array": [1, 2], "sampling_rate": 8_000}]}).save_to_disk(str(tmp_path / "ints"))
    for kind in ("hf", "hf-stream"):
        [item] = inputs(f"{kind}:{tmp_path / 'ints'}:train")
        with pytest.raises(UserError, match="array of int64: must be float, int16 or int32"):
            item.open()


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_a_folder_of_audio_with_metadata_needs_no_torchcodec(tmp_path, kind):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.flac").write_bytes(flac(i))
    (folder / "metadata.csv").write_text("file_name,text\n0.flac,null\n1.flac,eins\n2.flac,zwei\n")
    found = inputs(f"{kind}:{folder}:train")
    assert [item.path for item in found] == ["0.flac", "1.flac", "2.flac"]
    assert [item.labels["text"] for item in found] == [None, "eins", "zwei"]
    assert [sha256(item) for item in found] == [hashlib.sha256(flac(i)).hexdigest() for i in range(3)]
    assert len(read_wave(found[0].open(), 16_000)) == 400


def test_the_digest_follows_the_row_and_the_audio(tmp_path):
    def digests(name, made):
        made.save_to_disk(str(tmp_path / name))
        return [item.digest() for item in inputs(f"hf:{tmp_path / name}:train?id=text")]

    before = digests("one", dataset())
    assert before == digests("same", dataset())
    assert len(set(before)) == ROWS
    audio = [{"bytes": flac(i, 400 + 10 * i + (i == 2)), "path": f"u{i}.flac"} for i in range(ROWS)]
    other = digests("other", dataset(audio=audio))
    assert [a != b for a, b in zip(before, other)] == [i == 2 for i in range(ROWS)]
    swapped = digests("swapped", dataset().select([1, 0, *range(2, ROWS)]))
    assert before[0] not in swapped


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("hf:{}", "write hf:NAME"),
        ("hf:{}:", "write hf:NAME"),
        ("hf:{}:a:b:c", "write hf:NAME"),
        ("hf:{}:nosuch", "Unknown split"),
        ("hf:/nowhere/at/all:train", "cannot be loaded"),
        ("hf:{}:train?audoi=x", "unknown option 'audoi'; there are audio, id, labels, revision"),
        ("hf:{}:train?audio=sound", "audio 'sound': the columns are audio, text"),
        ("hf:{}:train?id=x", "id 'x': the columns are"),
        ("hf:{}:train?labels=text,x", "labels 'x': the columns are"),
    ],
)
def test_user_errors_are_one_line(parquets, spec, says):
    with pytest.raises(UserError, match=r"source 'hf:.*") as caught:
        inputs(spec.format(parquets))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_ambiguous_audio_column_must_be_named(tmp_path):
    two = dataset(2).rename_column("audio", "mix")
    two.add_column("clean", two.with_format("arrow")[:]["mix"].to_pylist()).cast_column("clean", Audio()).save_to_disk(
        str(tmp_path / "two")
    )
    with pytest.raises(UserError, match=r"several columns of audio; choose with \?audio=COLUMN among mix, clean"):
        inputs(f"hf:{tmp_path / 'two'}:train")
    assert [item.column for item in inputs(f"hf:{tmp_path / 'two'}:train?audio=clean")] == ["clean"] * 2
    dataset(2).remove_columns("audio").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no column of audio"):
        inputs(f"hf:{tmp_path / 'none'}:train")


def test_the_error_of_an_interrupted_stream_names_place_and_remedy(parquets):
    second = parquets / "train-00001.parquet"
    second.write_bytes(second.read_bytes()[:-3000])
    stream = read_sources([f"hf-stream:{parquets}:train"])
    with pytest.raises(UserError, match="reading stopped: .*run the same command again") as caught:
        list(stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["hf", "hf-stream"])
def test_columns_of_segments_and_channels_work_as_in_manifests(tmp_path, kind):
    more = dict(start=[0.01] * 2, end=[0.02, None], channel=[0, None], duration=[0.5, 0.01])
    dataset(2, **more).save_to_disk(str(tmp_path / "cut"))
    first, second = inputs(f"{kind}:{tmp_path}/cut:train")
    assert (first.start, first.end, first.channel, second.start, second.end, second.channel) == (
        0.01, 0.02, 0, 0.01, 0.02, None,
    )  # fmt: skip
    assert not {"start", "end", "channel"} & {*first.labels, *second.labels}
    assert first.labels["text"] == "héllo 0"
    [one, _] = inputs(f"{kind}:{tmp_path}/cut:train?labels=start,text")
    assert (one.start, one.end, one.labels) == (None, 0.02, {"start": 0.01, "text": "héllo 0"})


def test_an_invalid_segment_column_is_named_with_the_remedy(tmp_path):
    dataset(2, start=["soon", "late"]).save_to_disk(str(tmp_path / "cut"))
    with pytest.raises(UserError, match=r"row 0: start 'soon' is not a number of seconds; with \?labels="):
        inputs(f"hf:{tmp_path}/cut:train")
    first, _ = inputs(f"hf:{tmp_path}/cut:train?labels=start")
    assert first.labels == {"start": "soon"}
