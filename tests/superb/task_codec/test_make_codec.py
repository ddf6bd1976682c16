"""`codecssl-superb task-codec` on tones: errors, random draws, and answers of its codec from shards alone."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import codes_of
from torch.autograd import gradcheck

from codecssl.superb.cli import main
from codecssl.superb.task_codec.bottleneck import later_states
from codecssl.superb.task_codec.codec_folder import load
from codecssl.superb.task_codec.config import BottleneckTrainConfig
from codecssl.superb.task_codec.examples import examples, refuse_too_few_frames, repeats
from codecssl.superb.task_codec.head_training import Summaries
from codecssl.superb.task_codec.heads import ClassHead, CtcHead, errors
from codecssl.superb.task_codec.make_codec import TaskCodecConfig, make_task_codec, prepare, settle
from codecssl.superb.task_codec.rates.table import markdown, summary
from codecssl.superb.task_codec.training import distillation
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.config import TokenizeConfig
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.run import run
from codecssl.tokenize.shards import Shards
from codecssl.tokenize.sources.audio import read_wave
from codecssl.tokenize.write_codes import write_shards

QUICK = BottleneckTrainConfig(
    head_steps=60,
    a_steps=50,
    b_steps=60,
    batch_size=8,
    revive_steps=10,
    evaluations=3,
    head_learning_rate=1e-2,
    a_learning_rate=1e-2,
    b_learning_rate=1e-2,
)


@pytest.fixture(scope="module")
def manifest(corpus, tmp_path_factory):
    """The corpus's short tones: four pitches are the speakers."""
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    path = tmp_path_factory.mktemp("tones") / "manifest.jsonl"
    chosen = [row | {"path": str(corpus / row["path"])} for row in rows if "sid" in row["task"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return path


@pytest.fixture(scope="module")
def shards(manifest, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "tokens"
    run(TokenizeConfig(sources=(str(manifest),), output=output, workers=0))
    return output


def config_of(upstream, data, output, **changes):
    options = {"task": "sid", "layer": 1, "rate_bps": 100.0, "codebook_dim": 8, "train": QUICK, **changes}
    return TaskCodecConfig(upstream=upstream, data=data, output=output, **options)


@pytest.fixture(scope="module")
def made(upstream, shards, tmp_path_factory):
    """A codec for sid with one codebook of 256, its config.json, and its progress messages."""
    folder = tmp_path_factory.mktemp("made") / "codec"
    rows = []
    return folder, make_task_codec(config_of(upstream, shards, folder), rows.append), rows


def test_codec_answers_from_shards_as_from_audio(made, manifest, tmp_path):
    """Answers are equal for wave -> codec -> head, for wave -> shards -> head and for the model's own states."""
    folder, description, _ = made
    assert description["training"]["rate"] == "100 bit/s (1 x 256 at 12.5 Hz)"
    run(TokenizeConfig(sources=(str(manifest),), codec=str(folder), output=tmp_path / "s", workers=0))
    tokens, codec, whole = Shards(tmp_path / "s"), load_codec(str(folder)), load(folder)
    assert tokens.card.bits_per_second == 100
    assert float(tokens.card.frame_rate) == 12.5
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    batched = codec.encode([torch.from_numpy(read_wave(Path(row["path"]), 16_000)) for row in rows[:4]])
    for index, row in enumerate(rows[:4]):
        stored = torch.from_numpy(tokens.codes(index).astype(np.int64))[None]
        assert torch.equal(stored[0], batched[index].codes)
        wave = torch.from_numpy(read_wave(Path(row["path"]), 16_000))
        from_shards = whole.logits(stored, [stored.shape[2]])
        state = whole.model.extract(codec.base.encode([wave])[0].codes[None], [-(-len(wave) // 320)])[1]
        pooled, _ = whole.bottleneck.pooled(state, [state.shape[1]])
        found = whole.bottleneck.rvq(pooled, torch.ones(pooled.shape[:2], dtype=torch.bool))
        expanded = whole.bottleneck.expand(found.features)
        states = later_states(whole.model, expanded, [expanded.shape[1]], 1)
        from_audio = whole.head(states, [expanded.shape[1]])
        torch.testing.assert_close(from_shards, from_audio, rtol=0, atol=1e-4)
    assert main(["answer", "--codec", str(folder), "--data", str(tmp_path / "s"), "--output", str(tmp_path / "a")]) == 0
    answers = [json.loads(line)["answer"] for line in (tmp_path / "a").read_text().splitlines()]
    right = [answer == [row["speaker"]] for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(right[36:]) > 0.7  # the test part: pitches are distinguished


def test_reports_use_and_errors(made):
    folder, description, rows = made
    training = description["training"]
    assert training["parts"] == {"train": 24, "valid": 12, "test": 12}
    assert [a + b for a, b in zip(training["used_entries"], training["dead_entries"], strict=True)] == [256]
    assert training["test_error_by_codebooks"][-1] < 0.5
    assert training["test_error_unquantised"] < 0.5
    stages = [json.loads(line)["stage"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == ["a", "b"]
    assert len(rows) == len(stages)
    assert "12.5 Hz" in (folder / "README.md").read_text()


def test_resumes_bit_for_bit_and_skips_finished_stages(made, upstream, shards, tmp_path, monkeypatch):
    from codecssl.superb.task_codec import training as compress_train

    calls = 0
    step = compress_train.BottleneckTraining._losses_b

    def killed(self, rows):
        nonlocal calls
        if calls == 15:
            raise KeyboardInterrupt
        calls += 1
        return step(self, rows)

    plain = compress_train.BottleneckTraining.run
    monkeypatch.setattr(compress_train.BottleneckTraining, "run", lambda self, log, save: plain(self, log, save, 0.0))
    monkeypatch.setattr(compress_train.BottleneckTraining, "_losses_b", killed)
    config = config_of(upstream, shards, tmp_path / "codec")
    with pytest.raises(KeyboardInterrupt):
        make_task_codec(config, lambda text: None)
    assert not (tmp_path / "codec" / "config.json").exists()
    monkeypatch.setattr(compress_train.BottleneckTraining, "_losses_b", step)
    reported = []
    make_task_codec(config, reported.append)
    assert reported[0] == "resumes at stage 2, step 15"
    whole, resumed = (load(folder).state_dict() for folder in (made[0], tmp_path / "codec"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    make_task_codec(config, reported.append)
    assert reported[-1].endswith("finished before")
    with pytest.raises(UserError, match="made with other settings or data; give another --output"):
        make_task_codec(config_of(upstream, shards, tmp_path / "codec", rate_bps=50.0), reported.append)


def test_without_labels_there_is_no_head(upstream, shards, tmp_path):
    config = config_of(upstream, shards, tmp_path / "codec", task="none", frame_rate=12.5, rate_bps=150.0)
    description = make_task_codec(config, lambda text: None)
    assert description["head"] is None
    assert description["rvq"]["num_codebooks"] == 2
    rows = [json.loads(line) for line in (tmp_path / "codec" / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"a"}
    assert rows[-1]["distance"] < 0.2  # of layer-normed states, whose own square is 1
    with pytest.raises(UserError, match="has no head; make one with a --task"):
        load(tmp_path / "codec").logits(torch.zeros(1, 2, 3, dtype=torch.int64), [3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"task": "kz"}, "task kz: give none, pr"), ({"layer": 3}, "layer 3: this model has 0"),
     ({"rate_bps": 5.0}, "less than one bit"), ({"task": "pr"}, "no utterance in the data has both this task")],
)  # fmt: skip
def test_invalid_arguments_are_one_line_errors(upstream, shards, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make_task_codec(config_of(upstream, shards, tmp_path / "x", **changes))


def test_refuses_folders_of_others(upstream, shards, tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear")
    arguments = ["task-codec", "--upstream", str(upstream), "--layer", "1", "--data", str(shards)]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    assert "letter.txt, which codecssl-superb task-codec did not write" in capsys.readouterr().err


def test_reads_audio_too(upstream, manifest, shards, tmp_path):
    """A manifest is tokenized first, to the codes that the shards have."""
    audio = prepare(upstream, manifest, tmp_path, "cpu")
    given = prepare(upstream, shards, tmp_path, "cpu")
    assert audio.shards.fingerprint == given.shards.fingerprint
    config = config_of(upstream, manifest, tmp_path)
    assert settle(config, audio) == settle(config, given)


# ---------------------------------------------------------------- parts, and what CTC can use


def spoken(card, folder, frames, labels):
    items = [(f"u{i}", np.zeros((card.num_rows, n), np.uint16), row) for i, (n, row) in enumerate(zip(frames, labels))]
    return write_shards(folder, card, items)


def test_rates_that_ctc_cannot_use_are_refused(shipped, tmp_path):
    """Ten labels with two repeats want 12 frames of codes: 48 at 50 Hz where four become one."""
    phones = "A B B C D E E F G H"
    rows = [{"task": "pr", "phones": phones, "speaker": f"s{i % 5}"} for i in range(20)]
    found = examples(spoken(shipped.card, tmp_path / "s", [48] * 20, rows), "pr", "probes", 0)
    assert found.kind == "ctc"
    assert found.names[0] == "<blank>"
    assert repeats(found.labels[0]) == 2
    assert found.apart == "speaker"
    assert refuse_too_few_frames(found, [12] * 20, "r") == found
    with pytest.raises(UserError, match="rate r: 20 of 20 utterances have fewer frames .* higher --frame-rate"):
        refuse_too_few_frames(found, [11] * 20, "r")


def test_parts_keep_speakers_apart_and_follow_the_seed(shipped, tmp_path):
    rows = [{"task": "er", "label": "ab"[i % 2], "speaker": f"s{i % 6}"} for i in range(60)]
    data = spoken(shipped.card, tmp_path / "s", [20] * 60, rows)
    parts = [examples(data, "emotion", "probes", seed).parts for seed in (0, 0, 1, 2)]
    assert parts[0] == parts[1]
    assert len({p["test"] for p in parts}) > 1
    folds = [examples(data, "emotion", "probes", 0, fold) for fold in range(4)]
    assert sorted(i for fold in folds for i in fold.parts["test"]) == list(range(60))  # each is tested once
    for each in parts:
        assert sorted(i for rows in each.values() for i in rows) == list(range(60))
        assert not {i % 6 for i in each["test"]} & {i % 6 for i in (*each["train"], *each["valid"])}


# ---------------------------------------------------------------- losses and errors


def test_distillation_is_a_masked_mean_and_passes_gradcheck():
    torch.manual_seed(0)
    student, teacher = ([torch.randn(2, 3, 5, dtype=torch.float64) for _ in range(2)] for _ in range(2))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    expected = 0.0
    for s, t in zip(student, teacher):
        for b, frame in ((0, 0), (0, 1), (0, 2), (1, 0)):
            difference = F.layer_norm(s[b, frame], (5,)) - F.layer_norm(t[b, frame], (5,))
            expected += float((difference**2).mean()) / 4 / 2
    assert float(distillation(student, teacher, mask)) == pytest.approx(expected, rel=1e-12)
    assert gradcheck(lambda *s: distillation(s, teacher, mask), [s.requires_grad_() for s in student])


def test_ctc_head_ignores_padding_and_edits_are_counted():
    torch.manual_seed(0)
    head, states = CtcHead(6, 2, 4).double(), [torch.randn(2, 9, 6, dtype=torch.float64) for _ in range(2)]
    lengths, labels = [9, 5], [(1, 2, 2, 3), (3,)]
    loss = head.loss(head(states, lengths), lengths, labels)
    changed = [torch.where((torch.arange(9) < torch.tensor([9, 5])[:, None])[..., None], s, s + 7) for s in states]
    assert float(head.loss(head(changed, lengths), lengths, labels)) == pytest.approx(float(loss))
    logits = torch.full((1, 6, 3), -5.0)
    for t, label in enumerate([0, 1, 1, 0, 1, 2]):
        logits[0, t, label] = 0.0
    assert head.answers(logits, [6]) == [[1, 1, 2]]
    assert head.answers(logits, [3]) == [[1]]
    assert errors([[1, 1, 2], [3]], [(1, 2), (4,)]) == (2, 3)


def test_the_class_head_averages_over_frames():
    """The mean over time before the linear maps is the mean after them; padding has no part."""
    torch.manual_seed(0)
    head, states = ClassHead(6, 2, 3).double(), [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    head.scores.data = torch.tensor([0.3, -0.2], dtype=torch.float64)
    weights, lengths = head.scores.softmax(dim=0), [5, 2]
    found = head(states, lengths)
    for item, n in enumerate(lengths):
        frames = [sum(w * F.layer_norm(s[item, t], (6,)) for w, s in zip(weights, states)) for t in range(n)]
        expected = head.answer(torch.stack([head.projection(frame) for frame in frames]).mean(dim=0))
        torch.testing.assert_close(found[item], expected)


def test_summaries_do_not_depend_on_batches_or_memory():
    torch.manual_seed(0)
    head, lengths = CtcHead(6, 1, 3), [7, 3, 5]
    rows = [torch.randn(n, 6) for n in lengths]
    calls = []

    def states(indices):
        calls.append(list(indices))
        return [torch.nn.utils.rnn.pad_sequence([rows[i] for i in indices], batch_first=True)], [
            lengths[i] for i in indices
        ]

    kept, forgetful = Summaries(head, states), Summaries(head, states, most_bytes=0)
    for summaries in (kept, forgetful, kept, forgetful):
        found, frames = summaries([2, 0])
        assert frames == [5, 7]
        torch.testing.assert_close(found[1, 0], F.layer_norm(rows[0], (6,)))
        torch.testing.assert_close(found[0, 0, :5], F.layer_norm(rows[2], (6,)))
    assert len(calls) == 3  # once for the one that keeps


def point(method, seed, fold, wrong, nominal=100.0, **more):
    bits = {"filled_bits": 110.0, "cross_entropy_bits": 90.0, "streams_bits": 99.0, "stored_bits": 120.0}
    common = {"task": "sid", "layer": 2, "shape": method, "metric": "accuracy", "apart": None, "labels": 50}
    common["commonest"] = 10
    where = {"seed": seed, "fold": fold, "method": method}
    return {**common, **where, "nominal_bps": nominal, "wrong": wrong, "seconds": 1.0, **bits, **more}


def test_report_table_and_plot(tmp_path):
    """Errors are summed over folds (here 10 and 20 of 100), then compared seed by seed."""
    from codecssl.superb.task_codec.rates.plot import draw

    rows = []
    for seed, (whole, kept) in enumerate([((5, 5), (8, 2)), ((12, 8), (18, 10))]):
        for fold in (0, 1):
            rows.append(point("model", seed, fold, whole[fold], 4000.0))
            rows.append(point("compress", seed, fold, kept[fold]))
            rows.append(point("compress", seed, fold, whole[fold], 50.0, shape="small"))
    points = summary(rows)
    assert [p["method"] for p in points] == ["compress", "compress", "model"]
    assert points[1]["kept"] == pytest.approx((1 + 0.72 / 0.8) / 2)
    assert (points[1]["seeds"], points[1]["folds"], points[1]["labels"]) == (2, 2, 100)
    text = markdown(points)
    assert "| sid | 2 | compress | compress | 100.0 | 110.0 | 90.0 | 99.0 | 120.0 | 81.0 | 9.0 | 95.0 | 2 |" in text
    assert "* sid, layer 2: 99 % of the model's accuracy at 50 bit/s (small), the lowest such rate here." in text
    draw(tmp_path / "x.png", points)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_kept_accuracy_is_undefined_at_chance_level():
    rows = [point("model", 0, 0, 40, 4000.0), point("compress", 0, 0, 30)]  # 20 %, as the commonest answer
    assert "not meaningful: the most frequent answer alone has 20.0 %" in markdown(summary(rows))


def test_phone_errors_are_compared_in_points():
    rows = [point("model", 0, 0, 20, 4000.0, metric="per"), point("compress", 0, 0, 25, metric="per")]
    points = summary(rows)
    assert points[0]["mean"] == 0.5
    assert points[0]["kept"] == pytest.approx(0.1)
    assert "99 % of" not in markdown(points).split("Mean and")[0]


def test_ctc_end_to_end(upstream, corpus, tmp_path):
    """Sentences of three phones, read as audio, at 25 Hz: trained, written, measured as phone error rate."""
    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    chosen = [row | {"path": str(corpus / row["path"])} for row in rows if "pr" in row["task"].split(",")]
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    train = dataclasses.replace(QUICK, head_steps=10, a_steps=10, b_steps=10, batch_size=4)
    config = config_of(upstream, path, tmp_path / "codec", task="pr", rate_bps=100.0, train=train)
    description = make_task_codec(config, lambda text: None)
    assert description["training"]["rate"] == "100 bit/s (1 x 16 at 25 Hz)"
    assert description["head"] == {"kind": "ctc", "labels": ["<blank>", "H", "L", "M"]}
    assert 0 < description["training"]["test_error_by_codebooks"][0] < 10
    assert "phone error rate" in (tmp_path / "codec" / "README.md").read_text()


def test_report_end_to_end(upstream, shards, tmp_path, capsys):
    """Every kind of point is there with its rates, and a second call computes nothing."""
    arguments = ["compress-report", "--upstream", str(upstream), "--task", "sid", "--data", str(shards)]
    arguments += ["--output", str(tmp_path), "--layers", "1", "--rates-bps", "200", "--seeds", "0"]
    arguments += ["--head-steps", "10", "--a-steps", "5", "--b-steps", "5"]
    assert main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    methods = ["model", "all layers", "compress", "compress", "k-means", "codebooks", "tables"]
    assert [(row["fold"], row["method"]) for row in rows] == [(0, method) for method in methods]  # the rows name parts
    for row in rows:
        assert 0 <= row["wrong"] <= row["labels"] == 12
        assert row["cross_entropy_bits"] > 0
        assert row["stored_bits"] > row["streams_bits"] > 0
        assert row["filled_bits"] >= row["nominal_bps"] * row["seconds"]
    assert [row["nominal_bps"] for row in rows] == [4000, 4000, 100, 200, 200, 500, 500]
    assert (tmp_path / "report.png").is_file()
    assert "| sid | 1 | compress | 1 of 2 x 256 at 12.5 Hz | 100.0 |" in (tmp_path / "report.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "points").rglob("*.json")}
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "points").rglob("*.json")} == before


# ---------------------------------------------------------------- as an upstream


def test_codec_is_an_upstream(made, manifest):
    """Waves become states after the bottleneck at the base codec's rate. The head gives the same answers."""
    from codecssl.superb.upstreams.build import UpstreamBuilder
    from codecssl.superb.upstreams.names import parse, parse_all

    folder = made[0]
    assert parse(str(folder)).kind == "model"
    assert parse_all([str(folder), "codes"])[1].argument is None
    expert, whole, codec = UpstreamBuilder().build(parse(str(folder))), load(folder), load_codec(str(folder))
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    waves = [torch.from_numpy(read_wave(Path(row["path"]), 16_000)) for row in (rows[0], rows[5])]
    assert expert.get_downsample_rates("hidden_states") == 320
    states = expert(waves)["hidden_states"]
    assert len(states) == 2
    for item, codes in enumerate(codes_of(codec, waves)):
        expected = whole.extract(codes[None], [codes.shape[1]])
        frames = -(-len(waves[item]) // 320)
        for state, other in zip(states, expected, strict=True):
            torch.testing.assert_close(state[item, :frames], other[0, :frames], rtol=0, atol=1e-4)
