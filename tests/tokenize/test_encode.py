"""Groups and windows of inputs: the same results in the same order for any grouping."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import random_codec

from codecssl.tokenize import encode as module
from codecssl.tokenize.cli import main
from codecssl.tokenize.codec import Encoded
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.encode import (
    Device,
    default_workers,
    device_of_workers,
    encode_inputs,
    encode_loaded,
    encode_on,
    failure,
    read,
)
from codecssl.tokenize.format.records import EncodedUtterance, Failure
from codecssl.tokenize.measure.bench import TokenizeBenchConfig, bench
from codecssl.tokenize.measure.check_codec import check_codec, synthetic_waves, table
from codecssl.tokenize.sources.sources import Input, read_sources

LENGTHS = (0.3, 2.0, 0.01, 1.1, 0.7, 1.9, 0.3)


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    random = np.random.default_rng(0)
    for number, seconds in enumerate(LENGTHS):
        wave = random.standard_normal(int(seconds * 16_000)).astype("f4") * 0.1
        soundfile.write(folder / f"{number}.wav", wave, 16_000)
    (folder / "3.flac").write_text("no audio")
    return folder


def same(left: list[EncodedUtterance | Failure], right: list[EncodedUtterance | Failure]) -> bool:
    def key(result: EncodedUtterance | Failure) -> tuple[object, ...]:
        if isinstance(result, Failure):
            return (result.id, result.reason)
        return (result.id, result.samples, *(plane.tobytes() for plane in result.codes))

    return [key(r) for r in left] == [key(r) for r in right]


def test_windows_by_length_give_the_same_results_in_order(audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of similar length from a window, as for a GPU; here on the CPU with tiny windows and batches."""
    codec = random_codec()
    items = list(read_sources([str(audio)]))
    alone = [encode_loaded(codec, [read(item, codec.card)])[0] for item in items]
    assert [type(r) for r in alone].count(Failure) == 1
    batches: list[list[int]] = []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda waves: batches.append([len(w) for w in waves]) or encode(waves))
    monkeypatch.setattr(module, "WINDOW_INPUTS", 5)
    monkeypatch.setattr(module, "BATCH_SECONDS", 2.5)
    device = Device(codec="none", num_codebooks=None, device="elsewhere")
    assert same(list(encode_inputs(device, codec, items, workers=0)), alone)
    assert max(map(len, batches)) > 1, "short waves must be encoded together"
    assert all(len(batch) * max(batch) <= 2.5 * 16_000 or len(batch) == 1 for batch in batches)
    monkeypatch.setattr(module, "GROUP_INPUTS", 3)
    assert same(list(encode_inputs(Device(codec="", num_codebooks=None, device="cpu"), codec, items, 0)), alone)


def test_long_inputs_are_streamed_to_the_same_codes(audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = random_codec()
    item = next(iter(read_sources([str(audio / "1.wav")])))
    held = encode_loaded(codec, [read(item, codec.card)])
    monkeypatch.setattr(module, "LONG_SECONDS", 0.5)
    loaded = read(item, codec.card)
    assert isinstance(loaded, module.LoadedAudio)
    assert loaded.wave is None
    assert same(encode_loaded(codec, [loaded]), held)


def test_a_wave_that_breaks_the_codec_costs_itself_only(audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = random_codec()
    encode = codec.encode

    def fragile(waves: list[torch.Tensor]) -> list[torch.Tensor]:
        if any(len(wave) == int(1.9 * 16_000) for wave in waves):
            raise RuntimeError("cannot")
        return encode(waves)

    monkeypatch.setattr(codec, "encode", fragile)
    items = list(read_sources([str(audio)]))
    results = encode_loaded(codec, [read(item, codec.card) for item in items])
    assert [r.id for r in results if isinstance(r, Failure)] == ["3.flac", "5.wav"]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("full"), OSError(28, "disk"), KeyError("bug")])
def test_errors_not_caused_by_a_file_stop_the_run(error: Exception) -> None:
    with pytest.raises(type(error)):
        failure(Input(id="a", path="a", file="a"), error)


def test_check_codec_counts_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = random_codec(num_codebooks=2)
    waves = synthetic_waves(codec.card)[:6]
    found = check_codec(codec, waves)
    assert found["differing"]["batched"] == found["differing"]["chunked"] == [0.0, 0.0]
    assert found["frames"] == sum(codec.card.frames_of(len(wave)) for wave in waves)
    encode = codec.encode

    def batch_dependent(given: list[torch.Tensor]) -> list[Encoded]:
        codes = [made.codes.clone() for made in encode(given)]
        if len(given) > 1:
            codes[3][1, 0] += 1
        return [Encoded(made) for made in codes]

    monkeypatch.setattr(codec, "encode", batch_dependent)
    found = check_codec(codec, waves)
    assert found["differing"]["batched"] == [0.0, 1 / found["frames"]]
    assert "not exact" in table(found)[-1]


def test_commands_check_codec_and_bench(audio: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-codec", "tiny_16khz", str(audio), "--seconds", "3", "--num-codebooks", "2"]) == 0
    assert "exact: batches and cuts change no code" in capsys.readouterr().out
    rows = list(bench(TokenizeBenchConfig(sources=(str(audio),), seconds=2.0, rounds=1)))
    assert any("plain way" in row["what"] for row in rows)
    assert sum(row.get("share", 0.0) for row in rows) == pytest.approx(1.0)
    assert all(row["x_real_time"] > 0 for row in rows if "x_real_time" in row)
    with pytest.raises(UserError, match="no readable audio"):
        list(bench(TokenizeBenchConfig(sources=(str(audio / "3.flac"),))))


def test_worker_i_has_gpu_i() -> None:
    assert device_of_workers("cuda", 5, 2) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    assert device_of_workers("cuda", 8, 8) == [f"cuda:{i}" for i in range(8)]
    for named, gpus in (("cuda", 1), ("cuda:1", 8), ("cpu", 8)):
        assert device_of_workers(named, 2, gpus) == [named, named], "all workers must use the one device"
    assert default_workers("cuda", 8) == 16
    assert default_workers("cuda", 1) == default_workers("cpu", 8) == default_workers()


def test_workers_on_several_devices_give_the_same_results_in_order(
    audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, each with its own device. torch accepts CPU indices as devices."""
    items = list(read_sources([str(audio)]))
    device = Device(codec="tiny_16khz", num_codebooks=None, device="cuda")
    codec = Device(codec="tiny_16khz", num_codebooks=None, device="cpu").load()
    alone = [encode_loaded(codec, [read(item, codec.card)])[0] for item in items]
    monkeypatch.setattr(module, "WINDOW_INPUTS", 3)
    assert same(list(encode_on(["cpu:0", "cpu:1"], device, items, None)), alone)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(module, "device_of_workers", lambda device, workers, gpus: ["cpu:0", "cpu:1"][:workers])
    assert same(list(encode_inputs(device, codec, items, workers=2)), alone), (
        "encode_inputs must use one worker per device"
    )
