"""Probes: folds that keep groups apart, layers selected without the test folds, and both shards and audio."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import codes_of

from codecssl.superb import results
from codecssl.superb.probe import probe, tables
from codecssl.superb.probe.crossvalidate import Settings, assign_folds, evaluate
from codecssl.superb.probe.features import open_rows
from codecssl.superb.probe.logistic import fit_predict
from codecssl.superb.probe.probe import Probe, load_probes, pool
from codecssl.tokenize.common.errors import UserError

KS = Probe(name="ks", label="keyword", task="ks")


def test_the_shipped_probes() -> None:
    probes = {p.name: p for p in load_probes("probes")}
    assert {name: (p.label, p.group) for name, p in probes.items()} == {
        "digits": ("label", "speaker"),
        "keywords": ("label", None),
        "emotion": ("label", "speaker"),
        "speaker": ("speaker", None),
        "speaker_across_emotions": ("speaker", "label"),
        "language": ("label", None),
        "intent": ("label", None),
        "environment": ("label", None),
    }
    assert probes["environment"].takes({"task": "env", "fold": "2"})
    assert not probes["environment"].takes({"task": "env", "fold": "1"})
    assert probes["speaker"].takes({"task": "asr,pr,sid", "path": "asr_pr_sid_speechocean/1/2.flac"})
    assert not probes["speaker"].takes({"task": "asr,sid", "path": "asr_cv_en/2.mp3"})
    assert not probes["keywords"].takes({"task": "kws2"})


def test_groups_never_stand_on_both_sides() -> None:
    groups = np.array(list("aabbccddee") * 3)
    fold = assign_folds(np.array(list("xy") * 15), groups, 4, seed=0)
    assert all(len(set(fold[groups == g])) == 1 for g in "abcde")
    assert set(fold) == {0, 1, 2, 3}


def test_without_groups_folds_are_stratified_and_follow_the_seed() -> None:
    labels = np.array(list("xxxy") * 10)
    folds = [assign_folds(labels, None, 5, seed) for seed in (0, 0, 1)]
    assert all((labels[folds[0] == f] == "y").sum() == 2 for f in range(5))
    assert (folds[0] == folds[1]).all()
    assert (folds[0] != folds[2]).any()


def scikit_learn(C: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000, tol=1e-6))


@pytest.mark.parametrize(("rows", "columns", "classes"), [(150, 20, 3), (60, 90, 4), (120, 10, 2)])
def test_the_solver_matches_scikit_learn(rows: int, columns: int, classes: int) -> None:
    """There are more rows than columns, fewer, two classes (one weight vector there, two here), a constant column."""
    from sklearn.datasets import make_classification

    options = {"n_informative": 5, "n_classes": classes, "flip_y": 0.3, "random_state": 0}
    features, labels = make_classification(rows + 400, columns, **options)
    features[:, -1] = 3.1
    grid = (1.0, 1e-3, 1e-1)
    found = fit_predict(features[:rows], labels[:rows], features[rows:], grid)
    expected = [scikit_learn(C).fit(features[:rows], labels[:rows]).predict(features[rows:]) for C in grid]
    assert (found == expected).mean() > 0.997
    assert (found[0] != found[1]).mean() > 0.05


def test_accuracy_matches_scikit_learn() -> None:
    """One layer and one C, against cross_val_predict of the same pipeline on the same folds."""
    from sklearn.datasets import make_classification
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    features, labels = make_classification(200, 20, n_informative=4, n_classes=3, flip_y=0.3, random_state=0)
    folds = StratifiedKFold(4, shuffle=True, random_state=5)
    expected = cross_val_predict(scikit_learn(0.1), features, labels, cv=folds) == labels
    row = evaluate(features[:, None], labels, None, Settings(seeds=(5,), C=(0.1,)))
    assert row["layers"] == [pytest.approx(expected.mean(), abs=1e-5)]
    assert row["best_layer"] == row["optimistic_layer"] == row["layers"][0]
    assert row["right"] == ["".join("1" if right else "0" for right in expected)]
    assert row["chosen_C"] == [[0.1] * 4]


def test_layer_and_penalty_are_selected_without_the_test_folds() -> None:
    """The reference is a plain nested cross-validation on noise, where selection on test folds looks much better."""
    generator = np.random.default_rng(0)
    features, labels, grid = generator.standard_normal((60, 8, 5)), np.array([0, 1] * 30), (1e-3, 1e-1, 10.0)
    row = evaluate(features, labels, None, Settings(seeds=(0,), C=grid))
    fold, right, chosen = assign_folds(labels, None, 4, 0), 0.0, []
    for f in range(4):
        scores = {}
        for layer, C in product(range(8), grid):
            inner = []
            for g in set(range(4)) - {f}:
                train = (fold != f) & (fold != g)
                model = scikit_learn(C).fit(features[train, layer], labels[train])
                inner.append(model.score(features[fold == g, layer], labels[fold == g]))
            scores[layer, C] = np.mean(inner)
        layer, C = max(scores, key=lambda key: scores[key])
        chosen.append((layer, C))
        model = scikit_learn(C).fit(features[fold != f, layer], labels[fold != f])
        right += (model.predict(features[fold == f, layer]) == labels[fold == f]).sum()
    assert row["chosen_layers"] == [[layer for layer, _ in chosen]]
    assert row["chosen_C"] == [[C for _, C in chosen]]
    assert row["best_layer"] == pytest.approx(right / 60, abs=1e-5)
    assert row["optimistic_layer"] > row["best_layer"] + 0.03


def test_mean_and_deviation_over_time() -> None:
    states = np.random.default_rng(0).standard_normal((7, 3))
    assert np.allclose(pool(states, "meanstd"), [*states.mean(0), *states.std(0)])
    assert np.allclose(pool(states, "mean"), states.mean(0))


@pytest.mark.parametrize(
    ("where", "values"),
    [("a*", ["ab"]), ("!a*", ["b", "c"]), (["a*", "b"], ["ab", "b"]), (["*", "!b"], ["ab", "c"])],
)
def test_patterns_of_columns(where: Any, values: list[str]) -> None:
    taken = [v for v in ("ab", "b", "c") if Probe(name="p", label="x", where={"column": where}).takes({"column": v})]
    assert taken == values


def test_probing_audio_finds_the_classes_and_is_not_repeated(corpus: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Tones of four pitches: fbank names them; a second call computes nothing."""
    pitch = Probe(name="pitch", label="speaker", task="ks")
    printed: list[str] = []
    settings = Settings(seeds=(0, 1))
    rows = probe.run(["fbank"], corpus, [pitch, KS], tmp_path, settings, on_progress=printed.append)
    assert rows[0]["best_layer"] > 0.95
    assert rows[0]["utterances"] == 48
    assert rows[0]["chance"] == 0.25
    assert len(results.publish(tmp_path)) == 2
    assert "| pitch | fbank |" in tables.write_markdown(tmp_path).read_text()
    monkeypatch.setattr(probe, "_measure", None)
    assert probe.run(["fbank"], corpus, [pitch, KS], tmp_path, settings, on_progress=printed.append) == rows
    assert len(printed) == 4


def test_shards_and_audio_give_equal_rows(corpus: Path, model_folder: Path, loads_codec: Any, tmp_path: Path) -> None:
    """The codes in the shards are the ones that the expert makes of the files."""
    import torch

    from codecssl.tokenize.sources.audio import read_wave
    from codecssl.tokenize.write_codes import write_shards

    rows = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "ks" in row["task"].split(",")]
    waves = [torch.from_numpy(read_wave(corpus / row["path"], 16000)) for row in rows]
    items = [(row["path"], codes.numpy(), {"task": row["task"], "keyword": row["keyword"]})
             for row, codes in zip(rows, codes_of(loads_codec, waves), strict=True)]  # fmt: skip
    write_shards(tmp_path / "shards", loads_codec.card, items)
    settings, names = Settings(seeds=(0,)), [str(model_folder), "codes", "random"]
    from_audio = probe.run(names, corpus, [KS], tmp_path / "a", settings, on_progress=lambda text: None)
    from_codes = probe.run(names, tmp_path / "shards", [KS], tmp_path / "b", settings, on_progress=lambda text: None)
    assert [row["layers"] for row in from_audio] == [row["layers"] for row in from_codes]
    assert len(from_audio[0]["layers"]) == 3
    with pytest.raises(UserError, match="upstream fbank: reads audio"):
        probe.run(["fbank"], tmp_path / "shards", [KS], tmp_path / "b", settings)


def test_shards_of_another_codec_are_refused(codec: Any, model_folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from codecssl.tokenize.write_codes import write_shards

    card = replace(codec.card, weights_sha256="f" * 64)
    write_shards(tmp_path / "shards", card, [("a", np.zeros((8, 9), np.uint16), {"task": "ks", "keyword": "x"})])
    with pytest.raises(UserError, match=r"its codec is not the one of .* \(weights_sha256"):
        probe.run([str(model_folder)], tmp_path / "shards", [KS], tmp_path, Settings())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Probe(name="p", label="keyword", task="none"), "no row matches it"),
        (Probe(name="p", label="text", task="ks"), "has no column text"),
        (Probe(name="p", label="path"), "class 00.flac has 1 rows; give two classes and 4 rows"),
        (Probe(name="p", label="keyword", group="style", task="ks"), "2 values of style for 4 folds"),
    ],
)
def test_a_probe_that_does_not_fit_is_one_clear_line(wrong: Probe, message: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        probe.run(["fbank"], corpus, [wrong], tmp_path, Settings())


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folds 2: must be at least 3"):
        Settings(folds=2)
    with pytest.raises(UserError, match="neither a file nor a name"):
        load_probes("nothing")
    (tmp_path / "p.yaml").write_text("digits: {labell: x}")
    with pytest.raises(UserError, match="labell"):
        load_probes(str(tmp_path / "p.yaml"))
    with pytest.raises(UserError, match="no such file or folder"):
        open_rows(tmp_path / "nothing")
