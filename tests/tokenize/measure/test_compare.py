"""`compare` against each figure's own definition, on clips whose classes are known."""

import json
import re

import helpers
import numpy as np
import pytest
import random_weights
import soundfile
import torch

from codecssl.tokenize.cli import main
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.measure import compare_report
from codecssl.tokenize.measure.compare import CompareConfig, _coded_bits, choose, compare, measure
from codecssl.tokenize.measure.fidelity import align, mel_distance, si_sdr
from codecssl.tokenize.measure.latent_probe import LatentProbe, accuracy, default_probes, pool
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.sources.sources import read_sources


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """12 clips of 0.8 s (tones or noise, 3 speakers) and one clip of another task."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i in range(13):
        wave = helpers.wave(12_800, i, rate=16_000, levels=(0.2, 0.6), noise=0.02 if i % 2 else 3.0)
        soundfile.write(folder / f"{i}.wav", wave.numpy().clip(-0.99, 0.99), 16_000, subtype="FLOAT")
        task = "other" if i == 12 else "kind"
        rows.append({"path": f"{i}.wav", "task": task, "label": ("noise", "tone")[i % 2], "speaker": i // 4})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return random_weights.write_hificodec(tmp_path_factory.mktemp("codec"))


def items_of(manifest, **options):
    config = CompareConfig(codecs=("x",), data=(str(manifest),), **options)
    return choose(read_sources([str(manifest)]), config)


def test_the_figures_of_a_codec(manifest, path):
    items = items_of(manifest, where=("task=kind",))
    found = measure(f"{path}:3", items, [LatentProbe(label="label", group="speaker")], 0.5, "cpu")
    codec = load_codec(str(path), num_codebooks=3)
    waves = [torch.from_numpy(soundfile.read(manifest.parent / item.path, dtype="float32")[0])[:8000] for item in items]
    codes = helpers.codes_of(codec, waves)
    decoded = [codec.decode(c).numpy() for c in codes]
    pairs = [align(wave.numpy(), output) for wave, output in zip(waves, decoded)]
    assert found["mel_distance"] == pytest.approx(np.mean([mel_distance(*pair) for pair in pairs]))
    assert found["si_sdr_db"] == pytest.approx(np.median([si_sdr(*pair) for pair in pairs]))
    assert (found["clips"], found["audio_seconds"], found["frame_rate"]) == (12, 6.0, 50.0)
    assert found["kbps"] == pytest.approx(3 * 6 * 50 / 1000)  # 64 entries
    used = [len(torch.cat([c[k] for c in codes]).unique()) for k in range(3)]
    assert found["used"] == pytest.approx(sum(used) / (3 * 64))
    assert [book["used"] for book in found["codebooks"]] == used
    assert found["kbps_entropy_coded"] > 0
    assert found["kbps_order_0"] == pytest.approx(sum(book["entropy_bits"] for book in found["codebooks"]) * 50 / 1000)
    assert found["encode_x_real_time"] > 0
    assert found["peak_gigabytes"] > 0.1
    assert found["probes"]["label/speaker"]["clips"] == 12


def test_entropy_coded_bits_are_those_of_the_source():
    """Uniform draws of 64 cost 6 bits. Codes that repeat with probability 0.9, else are one of 16, cost 0.95."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, 64, (20, 2000))
    moves = rng.random((20, 2000)) < 0.1
    moves[:, 0] = True
    last = np.maximum.accumulate(np.where(moves, np.arange(2000), 0), axis=1)
    held = np.take_along_axis(rng.integers(0, 16, (20, 2000)), last, axis=1)
    frames = np.full(20, 2000)
    uniform = _coded_bits(helpers.card([64]), [[plane] for plane in draws], frames)
    assert uniform / 40_000 == pytest.approx(6.0, abs=0.1)
    p = np.full(16, 0.1 / 16)
    p[0] += 0.9
    assert _coded_bits(helpers.card([16]), [[plane] for plane in held], frames) / 40_000 == pytest.approx(
        -(p * np.log2(p)).sum(), rel=0.1
    )


def test_a_codec_that_does_not_decode_has_no_fidelity(manifest, tmp_path):
    found = measure(str(random_weights.write_qwen3_tts(tmp_path)), items_of(manifest), [], 1.0, "cpu")
    assert found["mel_distance"] is found["si_sdr_db"] is found["decode_x_real_time"] is None
    assert found["not_decoded"].startswith("codec qwen3_tts_12hz: encodes only")
    whole = {"data": ["x"], "clips": 13, "hours": 0.01, "probes": [], "codecs": [found]}
    assert "| - |" in compare_report.markdown(whole)
    assert "encodes only" in compare_report.markdown(whole)


def test_probes_find_what_separates_and_nothing_else():
    rng = np.random.default_rng(0)
    rows = [{"label": i % 3, "speaker": i // 10, "accent": None if i else "x"} for i in range(60)]
    features = np.concatenate([rng.standard_normal((60, 5)), 9 * np.eye(3)[np.arange(60) % 3]], axis=1)
    assert accuracy(features, rows, LatentProbe(label="label"))["accuracy"] == 1.0
    apart = accuracy(features, rows, LatentProbe(label="label", group="speaker"))
    assert apart == {"accuracy": 1.0, "chance": 1 / 3, "classes": 3, "clips": 60}
    assert accuracy(features, rows, LatentProbe(label="speaker"))["accuracy"] < 0.5
    assert [probe.name for probe in default_probes(rows)] == ["label", "speaker"]
    with pytest.raises(UserError, match="--label accent: no two classes have 3 clips"):
        accuracy(features, rows, LatentProbe(label="accent"))
    with pytest.raises(UserError, match="all clips have one one;"):
        accuracy(features, [row | {"one": 1} for row in rows], LatentProbe(label="label", group="one"))


def test_a_group_is_never_on_both_sides_of_a_fold():
    """The label is the speaker's own, so that only clips of other speakers could tell it."""
    rng = np.random.default_rng(0)
    rows = [{"label": i // 6 % 2, "speaker": i // 6} for i in range(36)]
    features = np.eye(6)[np.arange(36) // 6] * 5 + 0.01 * rng.standard_normal((36, 6))
    assert accuracy(features, rows, LatentProbe(label="label"))["accuracy"] == 1.0
    assert accuracy(features, rows, LatentProbe(label="label", group="speaker"))["accuracy"] < 0.7


def test_pooled_latents_are_mean_and_deviation():
    latents = np.array([[1.0, 3.0], [5.0, 5.0]], np.float32)
    assert pool(latents).tolist() == [2.0, 5.0, 1.0, 0.0]


def test_clips_are_chosen_by_their_columns_and_evenly(manifest):
    assert [item.path for item in items_of(manifest, where=("task=oth*",))] == ["12.wav"]
    assert [item.path for item in items_of(manifest, where=("path=?.wav",), clips=4)] == [
        f"{i}.wav" for i in (0, 3, 6, 9)
    ]
    with pytest.raises(UserError, match="matches task=no"):
        items_of(manifest, where=("task=no",))
    with pytest.raises(UserError, match="--where task: must be COLUMN=PATTERN"):
        items_of(manifest, where=("task",))


def test_the_command_writes_table_and_plots(manifest, path, tmp_path, capsys):
    options = ["--data", str(manifest), "--label", "label", "--clips", "8", "--output", str(tmp_path / "out")]
    assert main(["compare", f"{path}:2", str(path), *options]) == 0
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("| /")]
    assert [row.split("|")[2].strip() for row in rows] == ["2 x 64", "4 x 64"]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["kbps"] for row in found["codecs"]] == [0.6, 1.2]
    assert f"{found['codecs'][1]['mel_distance']:.3f}" in rows[1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert len(re.findall("<tr>", page)) == 3
    assert table.splitlines()[0] in (tmp_path / "out" / "report.md").read_text()
    for name in ("mel_distance.svg", "probe_accuracy.svg"):
        assert "kbit/s" in (tmp_path / "out" / name).read_text() or "<path" in (tmp_path / "out" / name).read_text()


def test_an_unknown_codec_is_one_line(manifest, capsys):
    assert main(["compare", "encodek", "--data", str(manifest)]) == 1
    assert "unknown codec 'encodek'" in capsys.readouterr().err


def test_a_codec_that_cannot_be_loaded_is_reported_before_any_work(manifest, path):
    done = []
    with pytest.raises(UserError, match="num_codebooks 9: hificodec_16khz has 1 to 4"):
        compare(CompareConfig(codecs=(str(path), f"{path}:9"), data=(str(manifest),)), done.append)
    assert not done
