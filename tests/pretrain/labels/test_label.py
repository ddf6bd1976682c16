"""Clusters and label folders: against scikit-learn, by hand, and through the trainer."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import mutual_info_score
from sklearn.preprocessing import StandardScaler

from codecssl.pretrain.cli import main
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.export.export import export, load_pretrained
from codecssl.pretrain.labels import label as label_module
from codecssl.pretrain.labels.clustering import Clustering, Quality, fit, phone_measures
from codecssl.pretrain.labels.label import LabelConfig, label
from codecssl.pretrain.labels.labellers import Extractor, windows
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.pretrain.run import run
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.write_codes import write_shards

CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0" * 64, sample_rate=16_000, hop_length=320,
    codebook_sizes=(16, 12, 8), codes_per_frame=(1, 1, 1), latent_dim=12,
)  # fmt: skip


def blobs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    owner = random.integers(0, 6, count)
    middle = np.random.default_rng(99).normal(size=(6, 8)) * 6
    return (middle[owner] + random.normal(size=(count, 8))).astype(np.float32), owner


def test_assign_is_the_nearest_centroid_and_its_distance() -> None:
    features, _ = blobs(500)
    made = Clustering(features[::50].copy(), {})
    labels, distance = made.assign(features)
    exact = cdist(features.astype(np.float64), made.centroids.astype(np.float64), "sqeuclidean")
    assert np.array_equal(labels, exact.argmin(1))
    assert np.allclose(distance, exact.min(1), rtol=1e-4, atol=1e-3)


def test_fit_finds_blobs_and_depends_on_the_seed_alone() -> None:
    features, owner = blobs(3000)

    def batches() -> Iterator[np.ndarray]:
        yield from np.array_split(features, 7)

    centroids = fit(batches(), 6, frames=2500, seed=1)
    labels, _ = Clustering(centroids, {}).assign(features)
    assert len({(a, b) for a, b in zip(labels.tolist(), owner.tolist())}) == 6, "each blob must have one cluster"
    assert np.array_equal(centroids, fit(batches(), 6, frames=2500, seed=1))
    with pytest.raises(UserError, match="only 3000 frames"):
        fit(batches(), 5000, frames=6000, seed=1)


def test_phone_measures_against_loops_and_scikit_learn() -> None:
    random = np.random.default_rng(0)
    phones, clusters = random.integers(0, 4, 400), random.integers(0, 7, 400)
    clusters[phones == 2] = 3
    joint = np.zeros((4, 7), dtype=np.int64)
    for phone, cluster in zip(phones, clusters):
        joint[phone, cluster] += 1
    found = phone_measures(joint)
    commonest = {c: np.bincount(phones[clusters == c]).argmax() for c in set(clusters.tolist())}
    assert found["phone_purity"] == pytest.approx(np.mean([commonest[c] == p for p, c in zip(phones, clusters)]))
    main_cluster = {p: np.bincount(clusters[phones == p]).argmax() for p in range(4)}
    assert found["cluster_purity"] == pytest.approx(np.mean([main_cluster[p] == c for p, c in zip(phones, clusters)]))
    shares = np.bincount(phones) / 400
    entropy = -(shares * np.log(shares)).sum()
    assert found["pnmi"] == pytest.approx(mutual_info_score(phones, clusters) / entropy)
    quality = Quality(7)
    quality.add(clusters, np.full(400, 2.0, np.float32))
    report = quality.report()
    assert report["inertia_per_frame"] == pytest.approx(2.0)
    assert report["clusters_used"] == len(set(clusters.tolist()))
    assert "pnmi" not in report


@pytest.fixture
def trained(make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path) -> Path:
    run(small_config(make_shards("data"), optim={"steps": 2}), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("frames", [1, 99, 100, 101, 149, 150, 151, 777])
def test_windows_cover_every_frame_once_with_context(frames: int) -> None:
    found = list(windows(frames, 100))
    assert [at for _, _, first, last in found for at in range(first, last)] == list(range(frames))
    for begin, end, first, last in found:
        assert end - begin == min(100, frames)
        assert begin == 0 or first - begin >= 25
        assert end == frames or end - last >= 25


def test_a_rotary_model_labels_utterances_beyond_its_longest_input(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    model = {"positions": "rotary", "rotary_max_frames": 60}
    run(small_config(make_shards("data"), model=model, optim={"steps": 1}), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    data = Shards(tmp_path / "data")
    extract, whole = Extractor(str(tmp_path / "model"), 1, data.card, device="cpu"), load_pretrained(tmp_path / "model")
    codes = data.codes(int(np.argmax(data.frames)))
    assert codes.shape[1] > 100
    [features] = extract([codes])
    assert features.shape == (codes.shape[1], 32)
    for begin, end, first, last in windows(codes.shape[1], 60):
        piece = torch.from_numpy(codes[:, begin:end].astype(np.int64))[None]
        expected = whole.extract(piece, [end - begin])[1][0].numpy()
        assert np.allclose(features[first:last], expected[first - begin : last - begin], atol=1e-5)
    label(LabelConfig(source=str(tmp_path / "model"), data=(data.path,), output=tmp_path / "labels", clusters=4))
    assert int(Shards(tmp_path / "labels").frames.sum()) == int(data.frames.sum())


def test_labels_are_the_nearest_centroids_of_the_layer_and_can_be_trained_on(
    trained: Path, small_config: Callable[..., RunConfig], make_shards: Callable[..., Path], tmp_path: Path
) -> None:
    data = Shards(tmp_path / "data")
    made = label(LabelConfig(source=str(trained), data=(data.path,), output=tmp_path / "labels", layer=1, clusters=9))
    labels, model = Shards(tmp_path / "labels"), load_pretrained(tmp_path / "labels.model")
    clustering = Clustering.load(tmp_path / "labels" / "clustering.safetensors")
    assert clustering.made_of["layer"] == "1"
    assert made["frames"] == int(data.frames.sum())
    for index in (0, 7, len(data) - 1):
        codes = torch.from_numpy(data.codes(index).astype(np.int64))[None]
        hidden = model.extract(codes, [codes.shape[2]])[1][0].double().numpy()
        exact = cdist(hidden, clustering.centroids.astype(np.float64)).argmin(1)
        assert (labels.codes(index)[0] == exact).mean() > 0.99
        assert labels.utterance(index).id == data.utterance(index).id
    config = small_config(
        data.path, data={"labels": [str(labels.path)]}, objective={"target": "labels"}, optim={"steps": 3}
    )
    run(config, tmp_path / "second")
    rows = read_rows(tmp_path / "second" / "metrics.jsonl")
    assert len(rows[-1]["accuracy"]) == 1, "there must be one stream of labels"
    again = tmp_path / "again"
    other = make_shards("other", seed=5)
    same = LabelConfig(
        source=str(tmp_path / "labels.model"), data=(data.path, other), output=again, layer=1,
        clustering=tmp_path / "labels" / "clustering.safetensors",
    )  # fmt: skip
    label(same)
    assert Shards(again / "0-data").fingerprint == labels.fingerprint, "the same centroids must give the same labels"
    assert len(Shards(again / "1-other")) == len(Shards(other))


def test_cmvn_clusters_the_normalised_states_of_each_utterance(trained: Path, tmp_path: Path) -> None:
    """Oracle: scikit-learn's StandardScaler, whose deviation has no floor, of the layer's states."""
    data, labels = Shards(tmp_path / "data"), tmp_path / "labels"
    options = ["--layer", "1", "--clusters", "9", "--data", str(data.path), "--output", str(labels)]
    assert main(["label", str(trained), *options, "--cmvn"]) == 0
    made, model = Shards(labels), load_pretrained(tmp_path / "labels.model")
    clustering = Clustering.load(labels / "clustering.safetensors")
    agree = []
    for index in range(len(data)):
        codes = torch.from_numpy(data.codes(index).astype(np.int64))[None]
        hidden = model.extract(codes, [codes.shape[2]])[1][0].double().numpy()
        agree.append(
            made.codes(index)[0] == cdist(StandardScaler().fit_transform(hidden), clustering.centroids).argmin(1)
        )
    assert np.concatenate(agree).mean() > 0.8
    assert main(["label", str(trained), *options]) == 1, "the same folder, other features"


def test_a_model_of_the_first_codebooks_labels_shards_with_more(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """EnCodecMAE reads 8 of 32 codebooks. The other codebooks must not affect or prevent its self-training."""
    run(small_config(make_shards("data"), data={"num_codebooks": 2}, optim={"steps": 1}), tmp_path / "run")
    data, first = Shards(tmp_path / "data"), np.array([[1], [1], [0]])
    found = label(LabelConfig(source=str(tmp_path / "run"), data=(data.path,), output=tmp_path / "a", clusters=9))
    assert found["frames"] == int(data.frames.sum())
    write_shards(tmp_path / "fewer", data.card, [(u.id, data.codes(u.index) * first, {}) for u in data.utterances()])
    same = LabelConfig(source=str(tmp_path / "a.model"), data=(tmp_path / "fewer",), output=tmp_path / "b", clusters=9)
    label(same)
    for index in range(len(data)):
        assert np.array_equal(Shards(tmp_path / "a").codes(index), Shards(tmp_path / "b").codes(index))
    one = replace(data.card, codebook_sizes=(16,), codes_per_frame=(1,))
    write_shards(tmp_path / "one", one, [("u", data.codes(0)[:1], {})])
    with pytest.raises(UserError, match=r"trained on codec synthetic.*codebook_sizes \[16, 12\] against \[16\]"):
        label(replace(same, data=(tmp_path / "one",), output=tmp_path / "c"))


def test_a_sample_may_be_spread_over_many_utterances(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EnCodecMAE's self-training clusters 10,000 frames of as many crops, not all frames of a few."""
    seen: list[np.ndarray] = []

    def fitted(batches: Iterator[np.ndarray], clusters: int, *, frames: int, seed: int) -> np.ndarray:
        seen.extend(batches)
        return seen[0][:clusters]

    monkeypatch.setattr(label_module, "fit", fitted)
    made = LabelConfig(source=str(trained), data=(tmp_path / "data",), output=tmp_path / "labels", clusters=2,
                       sample_frames=30, utterance_frames=2)  # fmt: skip
    label(made)
    assert {len(part) for part in seen} == {2}
    assert len(seen) == len(Shards(tmp_path / "data"))
    with pytest.raises(UserError, match="--utterance-frames 0: must be at least 1"):
        replace(made, utterance_frames=0)


def contents(folder: Path) -> dict[str, bytes]:
    """Contents of all files. safetensors writes the metadata of the centroids in any order."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.suffix != ".safetensors" else b""
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def sliced(
    trained: Path, make_shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LabelConfig:
    """Two folders of data, phones with times in the second, and label shards of few utterances."""
    monkeypatch.setattr(label_module, "_SHARD_UTTERANCES", 7)
    export(trained, tmp_path / "model")
    data = Shards(tmp_path / "data")
    phones = [["a", 0.0, 0.1], ["b", 0.1, 0.3]]
    write_shards(tmp_path / "more", data.card, [(f"p{i}", data.codes(i), {"phones": phones}) for i in range(9)])
    return LabelConfig(
        source=str(tmp_path / "model"), data=(data.path, tmp_path / "more"), output=tmp_path / "whole", clusters=9
    )


def test_a_killed_label_resumes_and_tasks_share_the_work(
    sliced: LabelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = label(sliced)
    assert report is not None
    assert report["phone_frames"] == 9 * 15
    whole = contents(sliced.output)
    assert set(whole) >= {"label.json", "report.json", "0-data/dataset.json", "1-more/dataset.json"}
    assert not [name for name in whole if "counts" in name or "work" in name]

    killed = replace(sliced, output=tmp_path / "killed")
    write, written = label_module.write_shard, []

    def write_two(folder: Path, shard: int, *rest: object) -> None:
        if len(written) == 2:
            (folder / "work" / f"{shard:05d}").mkdir(parents=True)
            (folder / "work" / f"{shard:05d}" / "00000.block").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append((folder.name, shard))
        write(folder, shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(label_module, "write_shard", write_two)
    with pytest.raises(KeyboardInterrupt):
        label(killed)
    assert not (killed.output / "report.json").exists()
    assert not list(killed.output.glob("*/dataset.json"))
    written.clear()
    monkeypatch.setattr(label_module, "write_shard", lambda folder, shard, *rest: (
        written.append((folder.name, shard)), write(folder, shard, *rest)))  # fmt: skip
    monkeypatch.setattr(label_module, "fit", None)  # the clusters are there
    assert label(killed) == report
    assert ("0-data", 1) not in written
    assert written[0] == ("0-data", 2)
    assert contents(killed.output) == whole
    written.clear()
    assert label(killed) == report, "the second call must do nothing"
    assert written == []
    monkeypatch.undo()


def test_tasks_share_the_work(
    sliced: LabelConfig, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = label(sliced)
    of_run = replace(sliced, source=str(trained), output=tmp_path / "of_run", tasks=2)
    assert label(of_run) is None
    monkeypatch.setattr("codecssl.pretrain.export.export.export", None)  # was done by the first
    found = label(replace(of_run, task=1))
    assert {**found, "made_of": None} == {**report, "made_of": None}
    shared = replace(sliced, output=tmp_path / "shared", tasks=3)
    assert label(replace(shared, task=2)) is None
    assert label(replace(shared, task=0)) is None
    assert label(replace(shared, task=1)) == report
    assert contents(shared.output) == contents(sliced.output)


def test_tasks_at_the_same_time(sliced: LabelConfig, tmp_path: Path) -> None:
    label(sliced)
    script = (
        "import sys; from codecssl.pretrain.labels import label; label._SHARD_UTTERANCES = 7;"
        "from codecssl.pretrain.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = ["label", sliced.source, "--data", *map(str, sliced.data), "--clusters", "9", "--output",
               str(tmp_path / "shared"), "--tasks", "3", "--task"]  # fmt: skip
    tasks = [subprocess.Popen([sys.executable, "-c", script, *command, str(task)]) for task in range(3)]
    assert [task.wait() for task in tasks] == [0, 0, 0]
    assert contents(tmp_path / "shared") == contents(sliced.output)


def test_settings_of_a_failed_start_can_be_corrected(sliced: LabelConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="frames to cluster; ask for fewer"):
        label(replace(sliced, clusters=5000))
    assert label(sliced) is not None
    with pytest.raises(UserError, match="frames to cluster; ask for fewer"):
        label(replace(sliced, clusters=5000, output=tmp_path / "two", tasks=2))
    with pytest.raises(UserError, match="begun with clusters 5000, this is 9"):  # by a task that may be at work
        label(replace(sliced, output=tmp_path / "two", tasks=2, task=1))


def test_a_run_that_trains_on_is_labelled_by_the_checkpoint_of_the_beginning(
    trained: Path,
    small_config: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LabelConfig(source=str(trained), data=(tmp_path / "data",), output=tmp_path / "labels", clusters=9)
    write = label_module.write_shard
    monkeypatch.setattr(label_module, "write_shard", None)
    with pytest.raises(TypeError):
        label(config)
    monkeypatch.setattr(label_module, "write_shard", write)
    step = json.loads((tmp_path / "labels.model" / "config.json").read_text())["training"]["step"]
    shutil.rmtree(trained)
    run(small_config(tmp_path / "data", optim={"steps": step + 1}), trained)
    assert label(config) is not None
    assert json.loads((tmp_path / "labels.model" / "config.json").read_text())["training"]["step"] == step


def test_another_label_is_refused_in_the_folder_of_one(sliced: LabelConfig, tmp_path: Path) -> None:
    label(sliced)
    for changes, reported in (
        ({"clusters": 8}, "whole: was begun with clusters 9, this is 8; give the same, or another --output"),
        ({"layer": 0}, "was begun with layer 2, this is 0"),
        ({"data": sliced.data[:1]}, "was begun with data"),
    ):
        with pytest.raises(UserError, match=reported):
            label(replace(sliced, **changes))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="task 2 of 2: --task counts from 0"):
        replace(sliced, tasks=2, task=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UserError, match="mine: is not empty; remove it, or give another --output"):
        label(replace(sliced, output=tmp_path / "mine"))


def test_labels_from_a_file(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    data = Shards(make_shards("data", count=5))
    rows = [
        {"id": u.id, "labels": [(u.index + t) % 4 for t in range(u.frames)]} for u in reversed(list(data.utterances()))
    ]
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    label(LabelConfig(source=str(path), data=(data.path,), output=tmp_path / "labels"))
    labels = Shards(tmp_path / "labels")
    assert labels.card.codebook_sizes == (4,)
    for index in range(5):
        assert labels.codes(index)[0].tolist() == [(index + t) % 4 for t in range(int(data.frames[index]))]
    path.write_text("".join(json.dumps({**row, "labels": [3] * len(row["labels"])}) + "\n" for row in rows))
    with pytest.raises(UserError, match="all labels are 3; nothing can be learnt"):
        label(LabelConfig(source=str(path), data=(data.path,), output=tmp_path / "same"))
    rows[2]["labels"] = rows[2]["labels"][:-1]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"labels for .* which has .* frames"):
        label(LabelConfig(source=str(path), data=(data.path,), output=tmp_path / "short"))


def test_phones_with_times_are_scored(tmp_path: Path) -> None:
    """Codes that follow the phone exactly: the file's labels, which are the codes, must know all of it."""
    items, rows = [], []
    for number in range(6):
        phones = [["a", 0.0, 0.2], ["b", 0.2, 0.5], ["c", 0.5, 0.6]]
        labels = [0] * 10 + [1] * 15 + [2] * 5  # at 50 frames per second
        items.append((f"u{number}", np.tile(labels, (3, 1)), {"phones": phones}))
        rows.append(json.dumps({"id": f"u{number}", "labels": labels}))
    write_shards(tmp_path / "data", CARD, items)
    (tmp_path / "given.jsonl").write_text("\n".join(rows))
    found = label(
        LabelConfig(source=str(tmp_path / "given.jsonl"), data=(tmp_path / "data",), output=tmp_path / "labels")
    )
    assert (found["phone_frames"], found["phones"]) == (180, 3)
    assert [found[key] for key in ("phone_purity", "cluster_purity", "pnmi")] == pytest.approx([1.0] * 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--layer", "1"], "not a run folder"),
        (["nowhere", "--clusters", "1"], "must be from 2"),
        (["nowhere.jsonl"], "nowhere.jsonl: rows must be"),
        (["nowhere", "--sample-frames", "10"], "must be at least --clusters"),
        (["nowhere", "--utterance-frames", "0"], "--utterance-frames 0: must be at least 1"),
        (["nowhere", "--device", "tpu"], "device 'tpu': give cpu"),
    ],
)
def test_invalid_label_settings_are_errors_of_one_line(
    make_shards: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    data = make_shards()
    assert main(["label", *arguments, "--data", str(data), "--output", str(tmp_path / "labels")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "labels" / "dataset.json").exists()
