"""HEAR's metrics, predictor and task folders."""

import importlib.metadata
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from codecssl.superb.cli import main
from codecssl.superb.hear import notes
from codecssl.superb.hear.evaluate import _active, embed, evaluate
from codecssl.superb.hear.local_tasks import write_tasks
from codecssl.superb.hear.metrics import Event, event_f1, metric, segment_error_rate
from codecssl.superb.hear.predictor import GRID, Perceptron, PredictorSettings, events_of, predict, train
from codecssl.superb.hear.run import run
from codecssl.superb.hear.task_folder import Clip, TaskFolder, write_task
from codecssl.superb.probe.probe import Probe
from codecssl.superb.suites.hear_2021 import HearModel
from codecssl.tokenize.common.errors import UserError

QUICK = PredictorSettings(points=3, hidden_dim=32, max_epochs=60, patience=10)


def random_events(random: np.random.Generator, count: int) -> list[Event]:
    starts = np.sort(random.uniform(0, 9_000, count))
    return [Event(str(random.choice(["a", "b"])), float(s), float(s + random.uniform(100, 900))) for s in starts]


def jittered(random: np.random.Generator, events: list[Event]) -> list[Event]:
    kept = [event for event in events if random.random() < 0.8]
    moved = [(random.normal(0, 60), random.normal(0, 90)) for _ in kept]
    return [Event(e.label, max(0.0, e.start + a), e.end + b + 1) for e, (a, b) in zip(kept, moved)]


@pytest.mark.parametrize("seed", range(4))
def test_event_metrics_are_those_of_sed_eval(seed: int) -> None:
    try:  # s3prl's start replaces packages that are missing by modules that say so
        importlib.metadata.version("sed_eval")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install sed_eval")
    import sed_eval
    from dcase_util import containers

    random = np.random.default_rng(seed)
    expected = {f"{i}.wav": random_events(random, 8) for i in range(3)}
    found = {file: jittered(random, events) + random_events(random, 2) for file, events in expected.items()}

    def listed(events: dict[str, list[Event]], file: str) -> object:
        rows = [{"event_label": e.label, "event_onset": e.start / 1000, "event_offset": e.end / 1000, "file": file}
                for e in events[file]]  # fmt: skip
        return containers.MetaDataContainer(rows)

    for name, options in {
        "event_onset_200ms_fms": {"t_collar": 0.2, "evaluate_offset": False},
        "event_onset_50ms_fms": {"t_collar": 0.05, "evaluate_offset": False},
        "event_onset_offset_50ms_20perc_fms": {"t_collar": 0.05, "percentage_of_length": 0.2},
    }.items():
        oracle = sed_eval.sound_event.EventBasedMetrics(["a", "b"], **options)
        for file in expected:
            oracle.evaluate(listed(expected, file), listed(found, file))
        assert metric(name)(found, expected) == pytest.approx(
            oracle.results_overall_metrics()["f_measure"]["f_measure"]
        )
    oracle = sed_eval.sound_event.SegmentBasedMetrics(["a", "b"], time_resolution=1.0)
    for file in expected:
        oracle.evaluate(listed(expected, file), listed(found, file))
    rate = oracle.results_overall_metrics()["error_rate"]["error_rate"]
    assert metric("segment_1s_er")(found, expected) == pytest.approx(rate)


def test_events_are_matched_at_most_once_and_as_many_as_possible() -> None:
    """The oracle tries every assignment of guesses to events."""
    random = np.random.default_rng(0)
    for _ in range(30):
        events = [Event("a", float(s), float(s + 300)) for s in random.integers(0, 600, 3)]
        guesses = [Event("a", float(s), float(s + 300)) for s in random.integers(0, 600, 3)]
        most = max(sum(abs(e.start - guesses[j].start) <= 100 for e, j in zip(events, order))
                   for order in itertools.permutations(range(3)))  # fmt: skip
        assert event_f1({"f": guesses}, {"f": events}, onset_ms=100) == pytest.approx(most / 3)
    assert event_f1({}, {"f": [Event("a", 0, 1)]}, onset_ms=100) == 0
    assert event_f1({"f": [Event("b", 0, 1)]}, {"f": [Event("a", 0, 1)]}, onset_ms=100) == 0


def test_segment_errors_by_hand() -> None:
    expected = {"f": [Event("a", 0, 1_500), Event("b", 2_000, 3_000)]}
    assert segment_error_rate(expected, expected) == 0
    assert segment_error_rate({}, expected) == 1  # three deletions of three
    assert segment_error_rate({"f": [Event("b", 0, 2_000)]}, expected) == 1  # two substitutions, one deletion
    assert segment_error_rate({"f": [*expected["f"], Event("c", 0, 6_000)]}, expected) == 2  # six insertions


def test_scene_metrics_by_hand() -> None:
    targets = np.eye(24)[[0, 12, 5]]
    scores = np.eye(24)[[12, 12, 4]]
    assert metric("pitch_acc")(scores, targets) == pytest.approx(1 / 3)
    assert metric("chroma_acc")(scores, targets) == pytest.approx(2 / 3)
    two = np.eye(2)[[0, 0, 1, 1]]
    ranked = np.array([[0.9, 0.1], [0.4, 0.6], [0.5, 0.5], [0.2, 0.8]])
    assert metric("aucroc")(ranked, two) == pytest.approx(0.75)  # three of four pairs in order
    assert metric("d_prime")(ranked, two) == pytest.approx(0.9539, abs=1e-4)  # sqrt(2) * 0.6745
    with pytest.raises(UserError, match="metric f1: not one of HEAR's"):
        metric("f1")


def test_probabilities_become_events() -> None:
    times = np.arange(100) * 20.0
    probabilities = np.zeros((100, 2))
    probabilities[10:40, 0] = 0.9
    probabilities[20, 0] = 0.1  # a hole that the median filter closes
    probabilities[60:63, 1] = 0.9  # shorter than the filter keeps
    found = events_of(probabilities, times, ["a", "b"], median_ms=100, shortest_ms=125)
    assert found == [Event("a", 200.0, 780.0)]
    assert events_of(probabilities, times, ["a", "b"], median_ms=0, shortest_ms=30)[-1] == Event("b", 1200.0, 1240.0)
    assert events_of(np.ones((5, 1)), times[:5], ["a"], median_ms=0, shortest_ms=0) == [Event("a", 0.0, 80.0)]


def test_the_predictor_keeps_its_best_epoch() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    targets = torch.eye(2)[(x[:, 0] > 0).long()]
    scores = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    seen = []

    def validate(model: Perceptron) -> float:
        seen.append({key: value.clone() for key, value in model.state_dict().items()})
        return next(scores)

    settings = PredictorSettings(hidden_dim=8, validate_every=2, patience=3, max_epochs=50)
    trained = train(x, targets, validate, GRID[0], settings, multilabel=False)
    assert (trained.epoch, trained.score, len(seen)) == (4, 0.9, 5)  # three validations without a better one
    for key, value in trained.model.state_dict().items():
        assert torch.equal(value, seen[1][key])
    learned = train(x, targets, lambda model: 0.0, GRID[0], PredictorSettings(hidden_dim=32, max_epochs=60),
                    multilabel=False)  # fmt: skip
    assert learned.epoch == 3  # never better than the first validation
    assert len({(p.hidden_layers, p.lr, p.initialization) for p in PredictorSettings(points=16).drawn()}) == 16


def test_the_predictor_learns() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 4)
    targets = torch.stack([x[:, 0] > 0, x[:, 1] > 0], 1).float()
    settings = PredictorSettings(hidden_dim=64, max_epochs=60)

    def validate(model: Perceptron) -> float:
        return float(((predict(model, x, multilabel=True) > 0.5) == (targets.numpy() > 0.5)).mean())

    assert train(x, targets, validate, GRID[0], settings, multilabel=True).score > 0.95


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TaskFolder]:
    """Notes alone, one copy; few and short."""
    root = tmp_path_factory.mktemp("tasks")
    one = [clip for clip in notes.instrument_clips(1, 0) if clip.labels[0] in ("bell", "clarinet")][::2]
    base = {"embedding_type": "scene", "prediction_type": "multiclass", "split_mode": "presplit_kfold", "nfolds": 3}
    clips = [
        Clip(file=c.file, split=f"fold{i % 3:02d}", wave=c.wave[:4_000], labels=c.labels) for i, c in enumerate(one)
    ]
    write_task(root, {"task_name": "two", "version": "v1", **base, "evaluation": ["top1_acc"]}, clips)
    event = {"embedding_type": "event", "prediction_type": "multilabel", "split_mode": "trainvaltest"}
    event |= {"evaluation": ["event_onset_200ms_fms", "segment_1s_er"]}
    write_task(root, {"task_name": "scenes", "version": "v1", **event}, notes.event_clips((1, 1, 1), 0, seconds=4.0))
    return {path.name: TaskFolder(path) for path in root.iterdir()}


def test_folds_equal_those_of_hear(tasks: dict[str, TaskFolder]) -> None:
    """test=fold00, valid=fold01, the rest trains; then the next."""
    folds = tasks["two-v1-full"].folds
    assert [(fold.test, fold.valid, fold.train) for fold in folds] == [
        ("fold00", "fold01", ("fold02",)), ("fold01", "fold02", ("fold00",)), ("fold02", "fold00", ("fold01",)),
    ]  # fmt: skip
    assert tasks["scenes-v1-full"].folds == [(("train",), "valid", "test")]


def test_embeddings_of_events_have_their_labels(tasks: dict[str, TaskFolder]) -> None:
    task = tasks["scenes-v1-full"]
    data = embed(task, "test", HearModel("logmel"))
    assert data.embeddings.shape == (400, 80)
    [events] = task.labels("test").values()
    for time, target in zip(data.times, data.targets):
        active = {e["label"] for e in events if e["start"] <= time <= e["end"]}
        assert active == {task.vocabulary[i] for i in target.nonzero().flatten().tolist()}
    edge = _active(task, [{"label": "bell", "start": 10.0, "end": 30.0}], torch.tensor([9.9, 10.0, 30.0, 30.1]))
    assert edge[:, task.index["bell"]].tolist() == [0, 1, 1, 0]


def test_a_task_is_evaluated_and_kept(tasks: dict[str, TaskFolder], tmp_path: Path) -> None:
    folders = [task.path for task in tasks.values()]
    rows = run(["logmel"], folders, tmp_path, QUICK, on_progress=lambda line: None)
    assert {row["task"]: len(row["folds"]) for row in rows} == {"two": 3, "scenes": 1}
    [two] = [row for row in rows if row["task"] == "two"]
    assert two["scores"]["top1_acc"] == pytest.approx(np.mean([fold["top1_acc"] for fold in two["folds"]]))
    assert two["scores"]["top1_acc"] > 0.7  # bells and clarinets by their spectrum, at other pitches
    [result] = (tmp_path / "hear" / "two").glob("*/result.json")
    kept = json.loads(result.read_text())
    result.write_text(json.dumps(kept | {"scores": {"top1_acc": 0.123}}))
    again = run(["logmel"], [tasks["two-v1-full"].path], tmp_path, QUICK, on_progress=lambda line: None)
    assert again[0]["scores"] == {"top1_acc": 0.123}  # read, not computed
    table = (tmp_path / "hear.md").read_text()
    assert "| two | top1_acc |" in table
    assert "| scenes | segment_1s_er |" in table
    first = evaluate(tasks["two-v1-full"], HearModel("logmel"), QUICK)
    assert first["scores"] == two["scores"]  # by the seed alone


def test_probes_become_tasks(tmp_path: Path) -> None:
    random, rows = np.random.default_rng(0), []
    for i in range(16):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * random.standard_normal(1_000 + i), 16_000)
        row = {"path": f"{i}.wav", "task": "kws", "label": "ab"[i % 2], "speaker": f"s{i // 4}", "seconds": 1.0}
        rows.append(json.dumps(row) + "\n")
    (tmp_path / "manifest.jsonl").write_text("".join(rows))
    probes = [Probe(name="word", label="label", task="kws", group="speaker"), Probe(name="none", label="x", task="y")]
    lines: list[str] = []
    found = write_tasks(tmp_path / "t", tmp_path / "manifest.jsonl", probes, copies=0, on_progress=lines.append)
    assert [path.name for path in found] == ["note_events-codecssl1-full", "word-codecssl1-full"]
    assert "none: left out, no rows in the manifest" in lines
    task = TaskFolder(found[1])
    for split in task.splits:
        assert len(task.labels(split)) == 4
        speakers = {int(file[:5]) // 4 for file in task.labels(split)}
        assert len(speakers) == 1, "no speaker may be in two folds"
    wave, rate = soundfile.read(task.clip("fold00", sorted(task.labels("fold00"))[0]))
    assert rate == 16_000
    assert 1_000 <= len(wave) < 1_016


def test_notes_have_their_pitch() -> None:
    """The oracle is the autocorrelation of the wave."""
    for timbre in notes.TIMBRES:
        for pitch in (48, 60, 71):
            wave = notes.note(timbre, pitch, 0.5, np.random.default_rng(pitch))[1_600:]
            lags = np.correlate(wave, wave, "full")[len(wave) - 1 :]
            expected = 16_000 / (440 * 2 ** ((pitch - 69) / 12))
            window = np.arange(int(expected * 0.8), int(expected * 1.2) + 1)
            best = window[lags[window].argmax()]
            if timbre != "bell":  # its partials are not multiples of one frequency
                assert abs(12 * np.log2(best / expected)) < 0.7, (timbre, pitch)
            assert np.abs(wave).max() <= 0.71


def test_user_errors_are_one_line(
    tasks: dict[str, TaskFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--upstream", "logmel", "--output", str(tmp_path / "out")]
    assert main(["hear", str(tmp_path), *out]) == 1
    assert "not a task folder of hearpreprocess" in capsys.readouterr().err
    assert main(["hear", str(tasks["two-v1-full"].path), *out, "--grid-points", "17"]) == 1
    assert "--grid-points 17: from 1 to 16" in capsys.readouterr().err
    bad = write_task(tmp_path, tasks["two-v1-full"].metadata | {"task_name": "bad", "evaluation": ["segment_1s_er"]},
                     [Clip(file="a.wav", split="fold00", wave=np.zeros(100, np.float32), labels=["x"])])  # fmt: skip
    with pytest.raises(UserError, match="metric segment_1s_er does not fit a task of scenes"):
        TaskFolder(bad)
    assert not (tmp_path / "out").exists()
