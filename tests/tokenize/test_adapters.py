"""Stock WebDataset, Hugging Face datasets and torch give the codes that `Shards` gives."""

import json
import shutil
from functools import partial

import datasets
import numpy as np
import pytest
import webdataset
from datasets.distributed import split_dataset_by_node
from helpers import card
from torch.utils.data import DataLoader

from codecssl.tokenize.adapters import as_hf_dataset, utterances
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset
from codecssl.tokenize.shards import Shards

RATES = {"one rate": (1, 1, 1), "several": (1, 2, 4)}


def make_card(rates, segments=False):
    length = 3200 if segments else 0
    return card((1000, 1024, 65536), rates, segment_samples=length, segment_stride=length)


def labels_of(number):
    """Labels of every kind, some of them missing here and there."""
    labels = {"speaker": f"s{number % 3}", "phones": ["a", "ö"] * (number % 2), "n": number, "id": "theirs"}
    labels |= {"score": number if number % 2 else number / 2, "slots": {"object": "lamp", "n": [number]}}
    labels |= {"mixed": number if number % 3 else "three", "huge": 2**70 + number}
    return labels if number % 5 else {"speaker": "none else"}


def make(root, rates, entropy_code, segments=False):
    """24 utterances in two shards of three blocks; one is longer than a segment of the entropy coder."""
    made, rng = make_card(rates, segments), np.random.default_rng(0)
    for shard in range(2):
        writer = ShardWriter(root, shard, made, entropy_code=entropy_code)
        for block in range(3):
            group = [_encoded(made, 12 * shard + 4 * block + i, rng) for i in range(4)]
            writer.add_block(4, group, [])
        writer.finish("")
    finish_dataset(root, {"codec": made.to_dict(), "sources": [], "compression": "range" if entropy_code else None}, 2)
    return root


def _encoded(made, number, rng):
    frames = 3100 if number == 5 else int(rng.integers(1, 50))
    planes = [rng.integers(0, size, frames * n) for size, n in zip(made.codebook_sizes, made.codes_per_frame)]
    return EncodedUtterance(
        id=f"speaker.1/u{number}.wav",
        path=f"u{number}.wav",
        codes=[plane.astype(np.uint16) for plane in planes],
        samples=frames * 320,
        source_sha256=rng.bytes(32).hex(),
        source_rate=8000,
        source_samples=frames * 160,
        labels=labels_of(number),
        scales=rng.random(made.segments_of(frames * 320)).astype("f4") if made.segment_samples else None,
    )


@pytest.fixture(scope="module", params=["one rate", "several", "compressed", "several, compressed", "scales"])
def made(request, tmp_path_factory):
    rates = RATES["several" if "several" in request.param else "one rate"]
    folder = tmp_path_factory.mktemp("made")
    return Shards(make(folder, rates, "compressed" in request.param, segments=request.param == "scales"))


def tars(shards):
    return [str(path) for path in sorted(shards.path.glob("shards/*.tar"))]


def same(samples, shards):
    """The samples of the WebDataset stage are the dataset's utterances."""
    assert len(samples) == len(shards) == 24
    by_id = {sample["__key__"]: sample for sample in samples}
    for utterance in shards.utterances():
        sample = by_id[utterance.id]
        assert sample["codes"].dtype == np.uint16
        assert np.array_equal(sample["codes"], shards.codes(utterance.index))
        assert sample["json"] == utterance.labels == labels_of(utterance.index)
        assert (utterance.scales is None) == ("scales" not in sample)
        assert utterance.scales is None or np.array_equal(sample["scales"], utterance.scales)


@pytest.mark.parametrize("decode", [False, True])
def test_a_stage_of_webdataset_gives_utterances(made, decode):
    dataset = webdataset.WebDataset(tars(made), shardshuffle=False)
    dataset = (dataset.decode() if decode else dataset).compose(utterances)
    samples = list(dataset)
    same(samples, made)
    assert [s["__key__"] for s in samples] == [u.id for u in made.utterances()]


def test_shuffled_blocks_worker_processes_and_tars_without_a_card(made, tmp_path):
    blocks = list(webdataset.WebDataset(tars(made), shardshuffle=False))
    same(list(utterances(blocks[::-1])), made)
    for tar in tars(made):
        shutil.copy(tar, tmp_path)
    moved = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    dataset = webdataset.WebDataset(moved, shardshuffle=False)
    with pytest.raises(UserError, match=r"no codec card next to it .*; give card="):
        next(iter(dataset.compose(utterances)))
    dataset = webdataset.WebDataset(moved, shardshuffle=False).compose(partial(utterances, card=made.card))
    same(list(DataLoader(dataset, batch_size=None, num_workers=2, collate_fn=_as_it_is)), made)


def _as_it_is(sample):
    return sample


@pytest.mark.parametrize("rates", RATES)
def test_the_webdataset_loader_of_datasets_opens_the_tars(tmp_path, monkeypatch, rates):
    """The loader yields blocks, which `utterances` splits. It does not support labels of mixed types."""
    monkeypatch.setitem(globals(), "labels_of", lambda number: {"speaker": f"s{number}", "n": number})
    made = Shards(make(tmp_path / "d", RATES[rates], False))
    for streaming in (True, False):
        found = datasets.load_dataset(
            "webdataset",
            data_files={"train": tars(made)},
            split="train",
            streaming=streaming,
            cache_dir=str(tmp_path / "cache"),
        )
        same(list(utterances(found, card=made.card)), made)


def rows_match(rows, shards, codes=np.asarray):
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows) == len(shards)
    for utterance in shards.utterances():
        row = dict(by_id[utterance.id])
        assert np.array_equal(codes(row.pop("codes")), shards.codes(utterance.index))
        assert (row.pop("id"), row.pop("path")) == (utterance.id, utterance.path)
        assert (row.pop("samples"), row.pop("source_sha256")) == (utterance.samples, utterance.source_sha256)
        if utterance.scales is not None:
            assert np.array_equal(np.float32(row.pop("scales")), utterance.scales)
        for name in ("slots", "mixed", "huge"):
            row[name] = row[name] and json.loads(row[name])
        row["id"] = row.pop("label_id")
        assert {name: value for name, value in row.items() if value is not None} == utterance.labels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_hugging_face_dataset(made, cache):
    found = as_hf_dataset(made.path)
    rows_match(list(found), made)
    assert found.features["codes"] == as_hf_dataset(made.path, streaming=True).features["codes"]
    assert found.with_format("numpy")[3]["codes"].shape == made.codes(3).shape
    assert found.features["score"].dtype == "float64"
    assert found[1]["phones"] == ["a", "ö"]


def test_a_streaming_hugging_face_dataset_split_over_nodes_and_workers(made):
    found = as_hf_dataset(made.path, streaming=True)
    assert found.num_shards == 6
    rows_match(list(found), made)
    for nodes in (2, 3):
        parts = [list(split_dataset_by_node(found, rank, nodes)) for rank in range(nodes)]
        assert {len(part) for part in parts} == {24 // nodes}
        rows_match([row for part in parts for row in part], made)
    rows_match(list(DataLoader(found, batch_size=None, num_workers=2)), made)


def test_processes_share_the_work(made, cache):
    rows_match(list(as_hf_dataset(made.path, num_proc=2)), made)


def test_other_codes_at_the_same_path_are_another_dataset(tmp_path, cache):
    make(tmp_path / "d", (1, 1, 1), False)
    before = list(as_hf_dataset(tmp_path / "d"))
    shutil.rmtree(tmp_path / "d")
    make(tmp_path / "d", (1, 2, 4), False)
    rows_match(list(as_hf_dataset(tmp_path / "d")), Shards(tmp_path / "d"))
    assert len(before) == 24


def test_shards_are_a_torch_dataset(made):
    collated = DataLoader(range(len(made)), batch_size=5, num_workers=2, collate_fn=partial(_codes, made))
    found = [codes for batch in collated for codes in batch]
    assert all(np.array_equal(codes, made.codes(i)) for i, codes in enumerate(found))
    assert len(found) == 24


def _codes(shards, indices):
    return [shards.codes(i) for i in indices]
