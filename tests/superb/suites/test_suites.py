"""Encoders for evaluation suites: each passes its suite's own validator, where that is installed."""

import json
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from codecssl.pretrain.export.pretrained import from_pretrained
from codecssl.superb.hear.task_folder import Clip, write_task
from codecssl.superb.suites import hear_2021, x_ares, xares_llm
from codecssl.superb.suites.wave_features import WaveFeatures
from codecssl.tokenize.common.errors import UserError

MODEL = "laptop_16khz"


@pytest.fixture(scope="module")
def two_pitches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder of three folds, whose two classes differ in pitch."""
    random, clips = np.random.default_rng(0), []
    for i in range(36):
        wave = np.sin(np.arange(4_000 + 100 * i) * (0.05 + 0.2 * (i % 2)) + random.random()) / 2
        label = ["low", "high"][i % 2]
        clips.append(Clip(file=f"{i}.wav", split=f"fold{i % 3:02d}", wave=wave.astype(np.float32), labels=[label]))
    kind = {"embedding_type": "scene", "prediction_type": "multiclass", "split_mode": "presplit_kfold", "nfolds": 3}
    metadata = {"task_name": "two-pitches", "version": "1", "evaluation": ["top1_acc"], **kind}
    return write_task(tmp_path_factory.mktemp("tasks"), metadata, clips)


def test_features_equal_the_states_of_the_model() -> None:
    """The oracle is `from_pretrained` on each wave alone."""
    waves = [0.1 * torch.randn(n) for n in (16_000, 7_777)]
    model = from_pretrained(MODEL)
    for layer, expected in ((None, lambda s: torch.stack(s).mean(0)), (2, lambda s: s[2])):
        for wave, frames in zip(waves, WaveFeatures(MODEL, layer)(waves)):
            states = expected(model(wave, sampling_rate=16_000).hidden_states)
            torch.testing.assert_close(frames, states[0], rtol=1e-6, atol=1e-5)


def test_the_environment_names_upstream_and_layer(monkeypatch: pytest.MonkeyPatch, upstream: Path) -> None:
    monkeypatch.setenv("CODECSSL_UPSTREAM", str(upstream))
    monkeypatch.setenv("CODECSSL_LAYER", "1")
    wave = 0.1 * torch.randn(4_000)
    assert torch.equal(x_ares.CodecSSLEncoder()(wave)[0], WaveFeatures(str(upstream), 1)([wave])[0])
    monkeypatch.setenv("CODECSSL_LAYER", "9")
    with pytest.raises(UserError, match="layer 9: .* has fewer hidden states"):
        x_ares.CodecSSLEncoder()
    monkeypatch.setenv("CODECSSL_LAYER", "last")
    with pytest.raises(UserError, match="CODECSSL_LAYER last: give a number, or mean"):
        x_ares.CodecSSLEncoder()


def test_long_waves_are_cut_into_windows() -> None:
    features = WaveFeatures("logmel")
    wave = 0.1 * torch.randn(40 * 16_000)
    [whole] = features([wave])
    assert whole.shape == (4_000, 80)
    assert torch.equal(whole[:100], features([wave[:16_400]])[0][:100])


def test_x_ares_own_checker_takes_the_encoder() -> None:
    checker = pytest.importorskip("xares.audio_encoder_checker", reason="pip install codecssl[xares]")
    from xares.utils import attr_from_py_path

    kind = attr_from_py_path("codecssl/superb/suites/x_ares.py", endswith="Encoder")
    encoder = kind(MODEL)
    assert checker.check_audio_encoder(encoder)
    assert encoder.hop_size_in_ms == 20.0
    encoder.output_dim += 1
    assert not checker.check_audio_encoder(encoder)


def test_xares_llm_masks_are_those_of_each_wave() -> None:
    """XARES-LLM's interface: 1 keeps, 0 masks, `mask.size(-1) == features.size(1)`; the mask of samples may be None."""
    encoder = xares_llm.CodecSSLEncoder(MODEL)
    waves = 0.1 * torch.randn(3, 16_000)
    frames, mask = encoder(waves, None)
    assert frames.shape == (3, 50, encoder.output_dim)
    assert mask.all()
    samples = torch.arange(16_000) < torch.tensor([16_000, 8_000, 4_100])[:, None]
    frames, mask = encoder(waves, samples.long())
    assert mask.sum(1).tolist() == [50, 25, 13]
    torch.testing.assert_close(frames[2, :13], encoder(waves[2:, :4_100])[0][0], rtol=1e-6, atol=1e-5)
    assert not frames[2, 13:].any()


def test_the_module_passes_the_validator_of_hear(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validator imports tensorflow to tell tensorflow's models apart; a stand-in class is enough for ours."""
    tensorflow = types.ModuleType("tensorflow")
    tensorflow.Module = type("Module", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    validate = pytest.importorskip("hearvalidator.validate", reason="pip install --no-deps hearvalidator")
    validate.ValidateModel("codecssl.superb.suites.hear_2021", MODEL, "cpu")()
    wrong = hear_2021.load_model(MODEL)
    wrong.scene_embedding_size += 1
    monkeypatch.setattr(hear_2021, "load_model", lambda path="": wrong)
    with pytest.raises(validate.ModelError, match="Output embedding size"):
        validate.ValidateModel("codecssl.superb.suites.hear_2021", MODEL, "cpu")()


def test_hear_times_are_even_and_close() -> None:
    model = hear_2021.load_model(MODEL)
    frames, times = hear_2021.get_timestamp_embeddings(0.1 * torch.randn(2, 8_001), model)
    assert times[0].tolist() == [10 + 20 * i for i in range(26)]
    assert frames.shape == (2, 26, 256)
    slow = hear_2021.HearModel("logmel")
    slow.repeats, slow.step_ms = 2, 40.0  # as of a codec with frames of 80 ms
    frames, times = hear_2021.get_timestamp_embeddings(0.1 * torch.randn(1, 800), slow)
    assert times[0].tolist() == [20 + 40 * i for i in range(10)]
    assert torch.equal(frames[0, 0::2], frames[0, 1::2])


def test_mteb_evaluates_the_encoder(two_pitches: Path) -> None:
    """MTEB's own evaluation of a task folder."""
    mteb = pytest.importorskip("mteb", reason="pip install codecssl[mteb]")
    from codecssl.superb.hear.as_maeb import RememberingAudio, evaluate_maeb, maeb_task
    from codecssl.superb.suites import maeb

    model = maeb.load(MODEL)
    meta = model.mteb_model_meta
    assert (meta.embed_dim, meta.modalities) == (256, ["audio"])
    assert isinstance(model, mteb.models.EncoderProtocol)
    task = maeb_task(two_pitches, fold=1)
    scores = task.evaluate(model, "test", encode_kwargs={"batch_size": 4})
    assert scores["default"]["accuracy"] == 1.0
    assert (len(task.dataset["train"]), len(task.dataset["test"])) == (24, 12)
    lengths = {len(row["audio"]["array"]) for row in task.dataset["test"]}
    assert lengths == {4_000 + 100 * i for i in range(1, 36, 3)}, "the second fold's clips"
    remembering = RememberingAudio("two", upstream=MODEL)
    seen: list[int] = []
    remembering.model.register_forward_pre_hook(lambda module, inputs: seen.extend(len(wave) for wave in inputs[0]))
    assert evaluate_maeb(two_pitches, remembering) == [1.0] * 3
    assert sorted(seen) == [4_000 + 100 * i for i in range(36)], "each clip once, though every fold has all"


def test_x_ares_runs_the_task(two_pitches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """X-ARES's own runner, with the modules that its command line takes."""
    runner = pytest.importorskip("xares.run", reason="pip install codecssl[xares]")
    from codecssl.superb.hear.as_x_ares import evaluate_x_ares, write_x_ares_task

    module = write_x_ares_task(two_pitches, tmp_path / "x_ares_tasks")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CODECSSL_UPSTREAM", MODEL)
    files = ("codecssl/superb/suites/x_ares.py", f"x_ares_tasks/{module.name}")
    assert runner.worker(*files, do_encode=True)[0] == "two-pitches"
    _, mlp, knn, private = runner.worker(*files, do_mlp=True, do_knn=True)
    assert (mlp[0], knn[0], private) == (1.0, 1.0, True)
    [encoded] = (module.with_suffix("") / "embeddings").iterdir()
    assert len(list(encoded.glob("wds-encoded-fold-*.tar"))) == 3
    with tarfile.open(next(encoded.glob("wds-encoded-fold-fold01-*.tar"))) as tar:
        labels = [json.load(tar.extractfile(name)) for name in sorted(tar.getnames()) if name.endswith("json")]
    assert [row["file"] for row in labels] == [f"{i}.wav" for i in sorted(range(1, 36, 3), key=str)]

    before = {path: path.stat().st_mtime_ns for path in encoded.iterdir()}
    for upstream in ("logmel", MODEL):  # another upstream does not get the scores of the first
        assert evaluate_x_ares(module, x_ares.CodecSSLEncoder(upstream))["mlp"] > 0.9
    assert len(list(encoded.parent.iterdir())) == 2
    assert {path: path.stat().st_mtime_ns for path in encoded.iterdir()} == before
    assert write_x_ares_task(two_pitches, module.parent) == module
    assert encoded.exists()
    (two_pitches / "labelvocabulary.csv").write_text("idx,label\n0,low\n1,high\n")
    write_x_ares_task(two_pitches, module.parent)
    assert not encoded.exists(), "embeddings of a task that has changed"
