"""Embeddings: equal to the model's own states, independent of batches, windows, kills and of how work is divided."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from safetensors.numpy import load_file

from codecssl.pretrain.export.pretrained import from_pretrained
from codecssl.superb.cli import main
from codecssl.superb.embed import embed as module
from codecssl.superb.embed.embed import EmbedConfig, embed
from codecssl.superb.embed.states import LayerChoice, WaveStates
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.run import run
from codecssl.tokenize.shards import Shards

RATE = 16_000


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Seven good files of 0.02 to 2.5 s, and two that cannot be read."""
    root, random = tmp_path_factory.mktemp("audio"), np.random.default_rng(0)
    for number, seconds in enumerate([0.5, 1.0, 0.02, 2.5, 0.7, 1.5, 0.3]):
        soundfile.write(root / f"u{number}.wav", 0.1 * random.standard_normal(int(seconds * RATE)), RATE)
    (root / "empty.wav").write_bytes(b"")
    soundfile.write(root / "nan.wav", np.full(1000, np.nan), RATE, subtype="FLOAT")
    return root


def config(audio, upstream, output, **options):
    values = {"sources": (str(audio),), "upstream": str(upstream), "shard_inputs": 4, **options}
    return EmbedConfig(output=output, **values)


def rows(output):
    return [row for path in sorted((output / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def files(output):
    return {p.relative_to(output): p.read_bytes() for p in sorted(output.rglob("*")) if p.is_file()}


def test_embeddings_equal_the_pooled_states_of_the_model(audio, upstream, tmp_path):
    run(TokenizeConfig(sources=(str(audio),), output=tmp_path / "shards", workers=0))
    shards, model = Shards(tmp_path / "shards"), from_pretrained(upstream)
    totals = embed(config(audio, upstream, tmp_path / "waves", layer=1, pool="meanstd", frames=True))
    assert totals == {"shards": 3, "embeddings": 7, "failed": 2}
    embed(EmbedConfig(sources=(str(shards.path),), upstream=str(upstream), output=tmp_path / "tokens", layer=1,
                      pool="meanstd"))  # fmt: skip
    of_tokens = {row["id"]: row for row in rows(tmp_path / "tokens")}
    for index, utterance in enumerate(shards.utterances()):
        codes = torch.from_numpy(shards.codes(index).astype(np.int64))[None]
        states = model(codes, output_hidden_states=True).hidden_states[1][0].double().numpy()
        expected = np.concatenate([states.mean(0), states.std(0)])
        assert np.allclose(of_tokens[utterance.id]["embedding"], expected, atol=1e-5)
        if utterance.samples < 800:  # a wave as short as that is followed by zeros, as in s3prl
            continue
        [row] = [row for row in rows(tmp_path / "waves") if row["id"] == utterance.id]
        assert np.allclose(row["embedding"], expected, atol=1e-5)
        assert row["num_frames"] == len(states)
        assert row["seconds"] == utterance.samples / RATE


def test_frames_are_kept_next_to_the_rows(audio, upstream, tmp_path):
    embed(config(audio, upstream, tmp_path, frames=True))
    for path in sorted((tmp_path / "data").glob("*.parquet")):
        states = load_file(tmp_path / "frames" / path.with_suffix(".safetensors").name)
        for number, row in enumerate(pq.read_table(path).to_pylist()):
            own = states[str(number)]
            assert own.shape == (row["num_frames"], 32)
            assert np.allclose(own.astype(np.float64).mean(0), row["embedding"], atol=1e-6)


def test_a_killed_run_and_divided_work_leave_the_same_bytes(audio, upstream, tmp_path, monkeypatch):
    embed(config(audio, upstream, tmp_path / "whole"))
    for task in range(2):
        last = embed(config(audio, upstream, tmp_path / "two", tasks=2, task=task))
    assert last == {"shards": 3, "embeddings": 7, "failed": 2}
    write = module._write

    def killed(own, shard, results):
        if shard == 1:
            raise KeyboardInterrupt
        write(own, shard, results)

    monkeypatch.setattr(module, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(config(audio, upstream, tmp_path / "cut"))
    monkeypatch.setattr(module, "_write", write)
    embed(config(audio, upstream, tmp_path / "cut"))
    for name in ("two", "cut"):
        assert {p: b for p, b in files(tmp_path / name).items() if p.suffix != ".lock"} == {
            p: b for p, b in files(tmp_path / "whole").items() if p.suffix != ".lock"
        }


def test_every_input_is_a_row_or_a_failure(audio, upstream, tmp_path):
    embed(config(audio, upstream, tmp_path))
    failed = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert sorted(item["path"] for item in failed) == ["empty.wav", "nan.wav"]
    assert sorted(row["path"] for row in rows(tmp_path)) == [f"u{i}.wav" for i in range(7)]


class Ramp:
    """An upstream whose state at a frame is the sum of the samples of that frame: it has no context."""

    def get_downsample_rates(self, key):
        return 320

    def __call__(self, waves):
        padded = [torch.nn.functional.pad(wave, (0, -len(wave) % 320)).unflatten(0, (-1, 320)).sum(1) for wave in waves]
        return {"hidden_states": [torch.nn.utils.rnn.pad_sequence(padded, batch_first=True)[:, :, None]]}


@pytest.mark.parametrize("samples", [1, 800, 31_999, 32_000, 100_001, 700_000])
@pytest.mark.parametrize("block", [7_777, 50_000])
def test_windows_keep_every_frame_once(samples, block):
    states = WaveStates(Ramp(), LayerChoice(None), "cpu", window_seconds=1.0, overlap_seconds=0.1)
    wave = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    pieces = list(states.windows(wave[at : at + block] for at in range(0, samples, block)))
    expected = np.pad(wave, (0, -max(samples, 800) % 320 + max(0, 800 - samples))).reshape(-1, 320).sum(1)
    assert np.allclose(np.concatenate(pieces)[:, 0], expected, atol=1e-3)


def test_long_token_utterances_are_cut_into_windows(upstream, tmp_path, audio):
    """With windows of 1 s, most frames have less context than in the whole input. No frame is lost or repeated."""
    run(TokenizeConfig(sources=(str(audio),), output=tmp_path / "shards", workers=0))
    base = {"sources": (str(tmp_path / "shards"),), "upstream": "codes", "frames": True}
    embed(EmbedConfig(output=tmp_path / "whole", **base))
    embed(EmbedConfig(output=tmp_path / "cut", window_seconds=0.4, overlap_seconds=0.06, **base))
    whole, cut = (load_file(tmp_path / name / "frames" / "00000.safetensors") for name in ("whole", "cut"))
    for key, states in whole.items():
        assert np.array_equal(states, cut[key])


@pytest.mark.parametrize("pool", [1, 2, 4])
@pytest.mark.parametrize("frames", [3, 12, 13, 57])
def test_windows_of_tokens_keep_every_state_once(pool, frames):
    """A task codec has `pool` states a frame of codes."""
    inputs = module.TokenInputs.__new__(module.TokenInputs)
    inputs.window, inputs.overlap = 10, 2
    inputs._states = lambda index, start, stop: np.arange(start * pool, stop * pool)[:, None]
    assert np.array_equal(np.concatenate(list(inputs._pieces(0, frames)))[:, 0], np.arange(frames * pool))


def test_user_errors_are_one_line(audio, upstream, tmp_path, capsys):
    with pytest.raises(UserError, match="--layer 9: .* has fewer hidden states"):
        embed(config(audio, upstream, tmp_path / "a", layer=9))
    assert not (tmp_path / "a").exists()
    embed(config(audio, upstream, tmp_path / "b"))
    with pytest.raises(UserError, match="begun with pool mean, this run has meanstd"):
        embed(config(audio, upstream, tmp_path / "b", pool="meanstd"))
    with pytest.raises(UserError, match="not empty and not a folder of embeddings"):
        embed(config(audio, upstream, audio))
    run(TokenizeConfig(sources=(str(audio),), output=tmp_path / "shards", workers=0))
    with pytest.raises(UserError, match="reads audio, and .* holds codes"):
        embed(config(tmp_path / "shards", "fbank", tmp_path / "c"))
    with pytest.raises(UserError, match="--layer 9: .* has fewer hidden states"):
        embed(config(tmp_path / "shards", upstream, tmp_path / "c", layer=9))
    assert not (tmp_path / "c").exists()
    assert main(["embed", str(audio), "--upstream", str(upstream), "-o", str(tmp_path / "d"), "--layer", "x"]) == 1
    assert "--layer x: give a number, or mean" in capsys.readouterr().err


def test_the_command_prints_its_totals(audio, upstream, tmp_path, capsys):
    assert main(["embed", str(audio), "--upstream", str(upstream), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: 7 embeddings, 2 failed\n"
