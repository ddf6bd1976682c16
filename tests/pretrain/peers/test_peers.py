"""The comparison with HuBERTs on log-mels and on samples: all three train on the same audio, and open afterwards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from codecssl.configs.load import from_dict
from codecssl.pretrain.bench import hubert_model
from codecssl.pretrain.config import MaskConfig, RunConfig
from codecssl.pretrain.export.export import load_pretrained
from codecssl.pretrain.labels.label import LabelConfig, label
from codecssl.pretrain.peers import hubert
from codecssl.pretrain.peers.compare import CLUSTERS, compare, logmel_hubert
from codecssl.pretrain.run_folder import read_config
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset
from codecssl.tokenize.mel import MelSpec, mel_plane
from codecssl.tokenize.shards import Shards

CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0" * 64, sample_rate=16_000, hop_length=320,
    codebook_sizes=(16, 12), codes_per_frame=(1, 1), latent_dim=4,
)  # fmt: skip
SPEC = MelSpec.for_codec(20, CARD)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Shards of 24 noisy tones, with their audio next to them."""
    random, utterances = np.random.default_rng(0), []
    for number in range(24):
        frames = int(random.integers(40, 70))
        time = np.arange(frames * 320) / 16_000
        wave = 0.1 * np.sin(2 * np.pi * random.uniform(100, 4000) * time) + random.normal(0, 0.03, len(time))
        soundfile.write(tmp_path / f"{number}.wav", wave, 16_000)
        utterances.append(
            EncodedUtterance(
                id=f"u{number}", path=f"{number}.wav", source_sha256="0" * 64, source_rate=16_000,
                samples=len(wave), source_samples=len(wave), mel=mel_plane(SPEC, wave.astype(np.float32)),
                codes=[random.integers(0, size, frames).astype(np.uint16) for size in CARD.codebook_sizes],
            )
        )  # fmt: skip
    writer = ShardWriter(tmp_path / "shards", 0, CARD)
    writer.add_block(24, utterances, [])
    writer.finish("0" * 64)
    finish_dataset(tmp_path / "shards", {"codec": CARD.to_dict(), "sources": [], "mel": SPEC.to_dict()}, 1)
    return tmp_path / "shards"


def config(shards: Path) -> RunConfig:
    return from_dict(RunConfig, {
        "model": dict(dim=32, layers=2, heads=2, ffn_dim=48, conv_kernel=8, conv_groups=4, embedding_init="random",
                      norm="pre", positions="sinusoidal", input="both", layerdrop=0.0),
        "mask": {"kind": "exact"}, "objective": {"name": "encodecmae", "quantizer_dropout": 0.0},
        "data": {"dirs": [str(shards)], "batch_frames": 160, "crop_frames": 40, "min_frames": 20,
                 "valid_fraction": 0.1},
        "log": {"log_every": 2, "valid_every": 1000, "checkpoint_every": 1000},
    })  # fmt: skip


def test_all_three_train_and_open(corpus: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    made = compare(config(corpus), tmp_path / "peers", cpu_seconds=0.5, audio=tmp_path, conv_dim=8, say=lines.append)
    assert set(made) == {"ours", "logmel_hubert", "hubert"}
    assert all(row["steps"] >= 1 and row["audio_seconds"] > 0 for row in made.values())
    assert made["hubert"]["cpu_seconds"] >= 0.5
    assert load_pretrained(tmp_path / "peers" / "ours").config.input == "both"
    logmel = load_pretrained(tmp_path / "peers" / "logmel_hubert")
    assert (logmel.config.input, logmel.config.positions) == ("mel", "conv")
    from transformers import HubertModel

    opened = HubertModel.from_pretrained(tmp_path / "peers" / "hubert")
    assert opened.config.num_hidden_layers == 2
    assert opened.config.conv_dim == [8] * 7
    assert json.loads((tmp_path / "peers" / "peers.json").read_text()) == made
    again = compare(config(corpus), tmp_path / "peers", cpu_seconds=0.5, audio=tmp_path, conv_dim=8, say=lines.append)
    assert again == made
    assert sum(line.endswith(": training") for line in lines) == 3, "finished trainings must be kept"


def test_all_three_predict_the_labels_of_the_config(corpus: Path, tmp_path: Path) -> None:
    labels, output = tmp_path / "labels", tmp_path / "peers"
    label(LabelConfig(source="mfcc", data=(corpus,), output=labels, clusters=7, cmvn=True))
    given = config(corpus)
    given = replace(
        given,
        objective=replace(given.objective, name="codec2vec", target="labels"),
        data=replace(given.data, labels=(str(labels),)),
    )
    seen: dict[str, Any] = {}
    train = hubert.train

    def spied(*arguments: Any, **options: Any) -> Any:
        seen["labels"], seen["classes"] = [r.labels for r in arguments[1]], arguments[2]
        return train(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hubert, "train", spied)
        compare(given, output, cpu_seconds=0.3, audio=tmp_path, conv_dim=8, say=lambda _: None)
    assert seen["classes"] == 7
    assert all(np.array_equal(row, Shards(labels).codes(index)[0]) for index, row in enumerate(seen["labels"]))
    for name in ("ours", "logmel_hubert"):
        made = read_config(output / f"{name}.run")
        assert made.data.labels == (str(labels),)
    assert not (output / "labels").exists()
    other = replace(given, data=replace(given.data, labels=(str(labels), str(labels))))
    with pytest.raises(UserError, match=r"data.labels: 2 folders for 1 of data.dirs"):
        compare(other, tmp_path / "none", cpu_seconds=0.3, audio=tmp_path, conv_dim=8, say=lambda _: None)
    without = replace(given, data=replace(given.data, labels=()))
    with pytest.raises(UserError, match=r"data.labels: none given for objective.target labels"):
        compare(without, tmp_path / "none", cpu_seconds=0.3, audio=tmp_path, conv_dim=8, say=lambda _: None)
    assert not (tmp_path / "none").exists()


def test_a_training_that_fails_is_an_error_of_one_line(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codecssl.pretrain.peers.compare.to_yaml", lambda config: "optim: {lr: -1}\n")
    with pytest.raises(UserError, match=r"codecssl-pretrain run .*ours.yaml .*: exit status 1; its error is above"):
        compare(config(corpus), tmp_path / "peers", cpu_seconds=0.3, audio=tmp_path, conv_dim=8, say=lambda _: None)
    assert not (tmp_path / "peers" / "ours").exists()


def test_the_logmel_hubert_predicts_the_labels_from_mels_alone(corpus: Path) -> None:
    made = logmel_hubert(config(corpus), Path("labels"))
    assert made.objective.target == "labels"
    assert made.model.input == "mel"
    assert made.mask.kind == "spans"
    assert made.data.batch_frames == config(corpus).data.batch_frames


def test_loss_of_the_waveform_hubert_is_cross_entropy_at_masked_frames_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model returns logits of known labels. The loss depends on the labels of masked frames only."""
    waves, labels = torch.zeros(2, 41 * 320), torch.randint(0, CLUSTERS, (2, 41))
    seen: dict[str, torch.Tensor] = {}

    class Fake:
        def _get_feat_extract_output_lengths(self, samples: int) -> int:
            return (samples - 400) // 320 + 1

        def train(self) -> None:
            pass

        def __call__(self, waves: torch.Tensor, mask_time_indices: torch.Tensor) -> "Fake":
            seen["mask"] = mask_time_indices
            self.last_hidden_state = F.one_hot(labels[:, :40], CLUSTERS).float() * 3
            return self

    loss = hubert._loss(
        Fake(), torch.nn.Identity(), waves, labels, MaskConfig(kind="spans", span_frames=10, start_probability=0.08), 7
    )
    assert seen["mask"].shape == (2, 40)
    assert 0 < int(seen["mask"].sum()) < 80
    expected = -3.0 + np.log(np.exp(3.0) + CLUSTERS - 1)
    assert float(loss) == pytest.approx(expected, rel=1e-3)


def test_the_front_end_has_one_frame_for_320_samples() -> None:
    model = hubert_model(config(Path("none")).model, conv_dim=8)
    assert int(model._get_feat_extract_output_lengths(320 * 50)) == 49


def test_data_that_cannot_be_compared_is_refused_before_anything_is_written(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "peers"
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--cpu-seconds .*: must be above 0 and finite"):
            compare(config(corpus), output, cpu_seconds=seconds, audio=tmp_path)
    with pytest.raises(UserError, match="not a folder of token shards"):
        compare(config(tmp_path / "nowhere"), output, cpu_seconds=1.0)
    (tmp_path / "3.wav").unlink()
    with pytest.raises(UserError, match=r"3\.wav: no audio file of 'u3'; give its folder as --audio"):
        compare(config(corpus), output, cpu_seconds=1.0, audio=tmp_path)
    assert not output.exists()


def test_crops_are_of_one_length_from_long_enough_recordings_with_their_own_labels() -> None:
    """Sample value and label of a frame both tell recording and place, so that a shifted crop would show."""
    made = [
        hubert.Recording(
            np.repeat(np.arange(count) + 1000 * number, 320)[: count * 320 - 100].astype(np.int16),
            (np.arange(count) + 1000 * number).astype(np.uint16),
        )
        for number, count in enumerate((40, 60, 90, 400))
    ]
    random, seen = np.random.default_rng(0), set()
    for _ in range(60):
        waves, labels = hubert.crops(made, 80, 800, random)
        frames = labels.shape[1]
        seen.add(frames)
        assert len(labels) == 800 // frames
        assert waves.shape == (len(labels), 320 * frames)
        at_middle = (waves.reshape(len(labels), frames, 320)[:, :, 160] * 32768).round().long()
        assert torch.equal(at_middle, labels)
        assert all(frames <= len(made[int(row[0]) // 1000].labels) for row in labels)
    assert seen == {40, 60, 80}
