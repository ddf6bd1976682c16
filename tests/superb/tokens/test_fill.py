"""Filling the token cache: once by any number of processes, complete after kills, without effect on results."""

import json
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_network, verify

from codecssl.superb.tokens import fill as filling
from codecssl.superb.tokens.fill import CacheJob, fill
from codecssl.superb.tokens.token_cache import TokenCache, codec_folder, wave_key
from codecssl.superb.tokens.waves import Wave, waves_of
from codecssl.tokenize.adapters import utterances
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.shards import Shards

GAIN = (("channels", "1"), ("rate", "16000"), ("gain", "-3.0"))


@pytest.fixture
def waves(tmp_path: Path) -> list[Wave]:
    """Nine files: two have the same audio, one has none, and one is cut at random."""
    rng, folder, found = np.random.default_rng(0), tmp_path / "audio", []
    folder.mkdir()
    for i in range(9):
        wave = 0.1 * rng.standard_normal(800 + 700 * i)
        soundfile.write(folder / f"{i}.wav", wave if i != 7 else np.full(400, 0.25), 8_000 if i == 2 else 16_000)
        found.append(Wave(path=str(folder / f"{i}.wav"), effects=GAIN if i == 3 else (), longest=8.0))
    (folder / "4.wav").write_bytes((folder / "7.wav").read_bytes())
    (folder / "5.wav").write_text("a letter")
    found[6] = Wave(path=found[6].path, longest=0.1)
    return [*found, Wave(path=found[8].path, start=0.1, end=0.2)]


@pytest.fixture(scope="module")
def codec_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from codecssl.tokenize.backends import tiny_16khz

    path = tmp_path_factory.mktemp("codec") / "tiny_16khz.safetensors"
    tiny_16khz.save_weights(random_network(7), path, {})
    return path


def job(root: Path, waves: list[Wave], codec: Any, **options: Any) -> CacheJob:
    return CacheJob(root=root, name="ks", waves=waves, card=codec.card, load=lambda: codec, **options)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in [("SHARD_WAVES", 4), ("BLOCK_WAVES", 2), ("GROUP_WAVES", 2)]:
        monkeypatch.setattr(filling, name, size)


def loaded(waves: list[Wave]) -> list[torch.Tensor]:
    found = [wave.load() for i, wave in enumerate(waves) if i != 5]
    return [wave for wave in found if wave is not None]


def test_every_distinct_wave_is_there_once(
    waves: list[Wave], codec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    seen: list[int] = []
    done = fill(job(tmp_path / "cache", waves, codec), on_progress=seen.append)
    expected = loaded(waves)
    cache = TokenCache(tmp_path / "cache", codec.card)
    for wave in expected:
        assert np.array_equal(cache.find(wave_key(wave)), codec.encode([wave])[0].codes.numpy())
    assert len(cache) == len(done) == len({wave_key(wave) for wave in expected}) == 7
    assert cache.find(wave_key(torch.zeros(5))) is None
    failed = [json.loads(line) for line in (done.shards.path / "failed.jsonl").read_text().splitlines()]
    assert [row["path"] for row in failed] == [waves[5].path]
    assert seen[-1] == len(waves)
    assert seen == sorted(seen)


def test_a_set_is_a_dataset_of_the_tokenize_stage(
    waves: list[Wave], codec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify` finds no damage, the readers read it, and no other files are left."""
    import webdataset

    small(monkeypatch)
    folder = fill(job(tmp_path / "cache", waves, codec)).shards.path
    assert verify(folder) == []
    tars = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).compose(utterances))
    keys = {wave_key(wave) for wave in loaded(waves)}
    assert {sample["__key__"] for sample in samples} == keys
    assert {u.source_sha256 for u in Shards(folder).utterances()} == keys
    assert sorted(path.name for path in codec_folder(tmp_path / "cache", codec.card).iterdir()) == [folder.name]
    names = {"dataset.json", "index.npy", "blocks.npy", "failed.jsonl", "keys.npy", "shards"}
    assert {path.name for path in folder.iterdir()} == names


def test_nothing_is_encoded_twice(waves: list[Wave], codec: Any, tmp_path: Path) -> None:
    """A second task's set holds only new waves. Filling the same set again needs no codec."""
    root, encoded = tmp_path / "cache", []

    def load() -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(card=codec.card, encode=lambda wavs: encoded.extend(wavs) or codec.encode(wavs))

    first = CacheJob(root=root, name="ks", waves=waves[:4], card=codec.card, load=load)
    assert len(fill(first)) == 4
    assert len(fill(first)) == len(encoded) == 4
    assert len(fill(CacheJob(root=root, name="sid", waves=waves, card=codec.card, load=load))) == 3
    assert len(encoded) == 7
    empty = fill(CacheJob(root=root, name="ic", waves=waves[:2], card=codec.card, load=load))
    assert len(empty) == 0
    assert verify(empty.shards.path) == []
    assert len(TokenCache(root, codec.card)) == 7


def test_a_changed_file_is_another_wave(waves: list[Wave], codec: Any, tmp_path: Path) -> None:
    first = job(tmp_path / "cache", waves[:2], codec)
    before = fill(first).shards.path
    soundfile.write(waves[0].path, 0.2 * np.ones(500), 16_000)
    second = job(tmp_path / "cache", waves[:2], codec)
    assert second.folder != before
    assert len(fill(second)) == 1


def test_another_codec_is_another_folder(waves: list[Wave], codec: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    done = fill(job(tmp_path, waves[:1], codec))
    other = replace(codec.card, weights_sha256="1" * 64)
    assert len(TokenCache(tmp_path, other)) == 0
    codec_folder(tmp_path, other).mkdir()
    done.shards.path.rename(codec_folder(tmp_path, other) / "ks")
    with pytest.raises(UserError, match="made with another codec .weights_sha256"):
        TokenCache(tmp_path, other)


def test_opening_reads_no_keys_and_no_codes(codec: Any, tmp_path: Path) -> None:
    """Keys are memory-mapped, and one look-up touches a few of them, at any size of a set."""
    from codecssl.superb.tokens.token_cache import KeyedShards
    from codecssl.tokenize.write_codes import write_shards

    write_shards(tmp_path / "set", codec.card, [(str(i), np.full((8, 1), i % 1024), {}) for i in range(3000)])
    keys = KeyedShards(tmp_path / "set", codec.card)
    assert not keys.keys.flags.owndata  # a view of the map
    looks, column, key = [], keys.keys["key"], keys.shards.utterance(1234).source_sha256

    class CountingCodec:
        def __len__(self) -> int:
            return len(column)

        def __getitem__(self, index: int) -> Any:
            looks.append(index)
            return column[index]

    keys.keys = {"key": CountingCodec(), "index": keys.keys["index"]}  # type: ignore[assignment]
    assert (keys.find(key) == 1234 % 1024).all()
    assert len(looks) < 16


def _fill_elsewhere(root: Path, waves: list[Wave], weights: str, out: Any = None) -> None:
    torch.set_num_threads(1)
    filling.SHARD_WAVES, filling.BLOCK_WAVES, filling.GROUP_WAVES = 8, 2, 1
    load = partial(load_codec, weights)
    done = fill(CacheJob(root=root, name="ks", waves=waves, card=load().card, load=load))
    if out is not None:
        out.put(len(done))


@pytest.fixture
def many(tmp_path: Path) -> list[Wave]:
    rng, found = np.random.default_rng(1), []
    for i in range(64):
        soundfile.write(tmp_path / f"m{i}.wav", 0.1 * rng.standard_normal(16_000), 16_000)
        found.append(Wave(path=str(tmp_path / f"m{i}.wav")))
    return found


def test_processes_share_the_work_and_a_kill_loses_little(many: list[Wave], codec_file: Path, tmp_path: Path) -> None:
    """One process is killed while it encodes. Two later ones finish its work; the set equals that of one run."""
    context, root, weights = multiprocessing.get_context("fork"), tmp_path / "cache", str(codec_file)
    card = load_codec(weights).card
    killed = context.Process(target=_fill_elsewhere, args=(root, many, weights))
    killed.start()
    deadline = time.monotonic() + 120
    while not list(root.glob("*/*/work/*/00001.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)  # type: ignore[arg-type]
    killed.join()
    left = list(root.glob("*/*/work/*/*.json"))
    assert left
    assert not list(root.glob("*/*/dataset.json"))
    stamps = {path: path.stat().st_mtime_ns for path in left}
    queue = context.Queue()
    two = [context.Process(target=_fill_elsewhere, args=(root, many, weights, queue)) for _ in range(2)]
    for process in two:
        process.start()
    assert [queue.get(timeout=120) for _ in two] == [64, 64]
    for process in two:
        process.join()
    assert stamps
    (folder,) = codec_folder(root, card).iterdir()
    assert verify(folder) == []
    alone = context.Process(target=_fill_elsewhere, args=(tmp_path / "alone", many, weights))
    alone.start()
    alone.join()
    (other,) = codec_folder(tmp_path / "alone", card).iterdir()
    for path in sorted((folder / "shards").iterdir()):
        assert path.read_bytes() == (other / "shards" / path.name).read_bytes()


def test_workers_give_the_same_set(many: list[Wave], codec_file: Path, tmp_path: Path) -> None:
    load = partial(load_codec, str(codec_file))
    card = load().card
    sets = [
        fill(CacheJob(root=tmp_path / str(n), name="ks", waves=many, card=card, load=load, workers=n)).shards
        for n in (0, 1)
    ]
    assert sets[0].fingerprint == sets[1].fingerprint


def test_a_full_disk_is_a_one_line_error(
    waves: list[Wave], codec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(filling, "finish_dataset", full)
    with pytest.raises(UserError, match="disk full; make room and run the same command again"):
        fill(job(tmp_path / "cache", waves, codec))


def test_waves_match_those_of_s3prl(corpus: Path) -> None:
    """For keyword spotting, each sample equals that of the problem's own dataset."""
    from codecssl.superb.corpora.corpus import open_corpus
    from codecssl.superb.patches import import_patches
    from codecssl.superb.tasks import TASKS

    import_patches.install()
    import s3prl.problem
    from s3prl.dataio.dataset import LoadAudio

    splits = open_corpus(corpus).select(TASKS["ks"]).splits
    waves = waves_of(TASKS["ks"], splits)
    conf = s3prl.problem.SuperbKS().default_config()["build_dataset"]["train"]
    theirs = LoadAudio([str(e.path) for e in splits["train"]], **conf)
    ours = {wave.path: wave.load() for wave in waves}
    assert len(waves) == 48
    for i, example in enumerate(splits["train"]):
        assert torch.equal(ours[str(example.path)], theirs[i]["wav"])


@pytest.mark.parametrize("frame_shift", [320, 213])
def test_diarisation_cuts_recordings_as_its_dataset_does(frame_shift: int, tmp_path: Path) -> None:
    """Waves are longer and shorter than a chunk of 2000 frames. s3prl reads the CSV and the Kaldi folder made of it."""
    from codecssl.superb.corpora.corpus import Example
    from codecssl.superb.patches import import_patches
    from codecssl.superb.runner.csvs import write_csvs
    from codecssl.superb.tasks import TASKS

    import_patches.install()
    from s3prl.dataio.dataset.diarization import DiarizationDataset
    from s3prl.problem.diarization.util import csv_to_kaldi_dir

    rng, examples = np.random.default_rng(0), []
    for name, samples in [("a", 700_123), ("b", 50_001)]:
        soundfile.write(tmp_path / f"{name}.wav", 0.1 * rng.standard_normal(samples), 16_000)
        turns = [("s", 0.0, 2.0), ("t", 1.0, 3.0)]
        examples.append(Example(id=name, path=tmp_path / f"{name}.wav", columns={"segments": turns}))
    (table,) = write_csvs(TASKS["sd"], {"train": examples}, tmp_path, None).values()  # type: ignore[arg-type]
    csv_to_kaldi_dir(table, tmp_path / "kaldi")
    theirs = DiarizationDataset("train", tmp_path / "kaldi", 2000, frame_shift, num_speakers=2)
    ours = waves_of(TASKS["sd"], {"train": examples}, frame_shift)
    assert len(ours) == len(theirs) > 2
    for wave, item in zip(ours, theirs, strict=True):
        assert wave_key(wave.load()) == wave_key(torch.from_numpy(item["x"]))  # type: ignore[arg-type]


def test_query_by_example_reads_a_file_at_its_own_rate(tmp_path: Path) -> None:
    """The upstream gets the samples at 8 kHz, the rate of QUESST14."""
    from codecssl.superb.corpora.corpus import Example
    from codecssl.superb.runner import qbe
    from codecssl.superb.tasks import TASKS

    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(6000), 8_000)
    soundfile.write(tmp_path / "b.wav", 0.1 * np.random.default_rng(0).standard_normal(200), 8_000)
    examples = [Example(id=name, path=tmp_path / name, columns={}) for name in ("a.wav", "b.wav")]
    heard: list[torch.Tensor] = []

    def upstream(wavs: list[torch.Tensor]) -> Any:
        heard.extend(wavs)
        return {"hidden_states": [torch.randn(1, 5, 2)]}

    qbe._features(examples, upstream, 0, "cpu")
    waves = waves_of(TASKS["qbe"], {"test": examples})
    assert [len(wave) for wave in heard] == [12_000, 800]
    for wave, theirs in zip(waves, heard, strict=True):
        assert torch.equal(wave.load(), theirs)


def test_speaker_verification_drops_silence_in_training_only(corpus: Path) -> None:
    from codecssl.superb.corpora.corpus import Example
    from codecssl.superb.tasks import TASKS

    example = Example(id="a", path=corpus / "00.flac", columns={})
    train, test = waves_of(TASKS["asv"], {"train": [example], "test": [example]})
    assert [effect[0] for effect in train.effects] == ["channels", "rate", "gain", "silence"]
    assert train.longest == 8.0
    assert (test.effects, test.longest) == ((), None)


def test_the_command_fills_and_reports(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from codecssl.superb.cli import main

    arguments = ["cache", "--upstream", "tiny_16khz", "--tasks", "ks,ic", "--data", str(corpus), "--output"]
    assert main([*arguments, str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert "codes of ks by tiny_16khz: 48 new waves of 48" in out
    assert "codes of ic by tiny_16khz: 48 new waves of 48" in out  # without keyword spotting's gain
    assert main([*arguments, str(tmp_path / "c")]) == 0
    assert "new waves" not in capsys.readouterr().out
    assert len(TokenCache(tmp_path / "c", load_codec("tiny_16khz").card)) == 96


def test_an_upstream_without_codes_is_refused(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from codecssl.superb.cli import main

    assert main(["cache", "--upstream", "fbank", "--data", str(corpus), "--output", str(tmp_path)]) == 1
    assert "upstream fbank: reads waves, not codes" in capsys.readouterr().err
