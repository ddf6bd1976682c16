"""probe.md: pairs of models and baselines, what the pretraining set held, rows of earlier commands."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb.paired import sign_flip_p
from codecssl.superb.probe import tables


def row(upstream: str, right: list[str], probe: str = "digits", **options: Any) -> dict[str, Any]:
    kind = upstream if upstream in ("fbank", "logmel", "mfcc", "codes", "random") else "model"
    accuracy = float(np.mean([answer == "1" for seed in right for answer in seed]))
    return {
        "upstream": {"name": upstream, "kind": kind, "argument": None, "sha256": None},
        "probe": {"name": probe, "label": "label"},
        "data": "/data/manifest.jsonl",
        "data_fingerprint": "f",
        "settings": {"folds": 4, "seeds": list(range(len(right))), "C": [0.1, 1.0], "pool": "meanstd"},
        "utterances": len(right[0]),
        "classes": 2,
        "chance": 0.5,
        "layers": [accuracy],
        "best_layer": accuracy,
        "best_layer_deviation": 0.0,
        "chosen_layers": [[0]],
        "optimistic_layer": accuracy,
        "right": right,
        **options,
    }


def text(tmp_path: Path, *rows: dict[str, Any]) -> str:
    for i, each in enumerate(rows):
        folder = tmp_path / "probes" / each["probe"]["name"] / str(i)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(each))
    return tables.write_markdown(tmp_path).read_text()


def test_the_paired_test_equals_mcnemars_for_one_seed() -> None:
    from scipy.stats import binomtest

    generator = np.random.default_rng(0)
    for better in (0.5, 0.7, 0.95):
        difference = np.where(generator.random(60) < better, 1, -1) * (generator.random(60) < 0.6)
        expected = binomtest(int((difference > 0).sum()), int((difference != 0).sum())).pvalue
        assert np.isclose(sign_flip_p(difference.tolist()), expected)


def test_the_paired_test_of_larger_differences() -> None:
    """The reference tries all 2^9 signs. The function must also be fast enough for a corpus."""
    difference = np.array([3, -1, 2, 2, 0, 5, -2, 1, 3])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 9)).reshape(9, -1)
    expected = (abs(difference @ signs) >= abs(difference.sum())).mean()
    assert np.isclose(sign_flip_p(difference.tolist()), expected)
    assert sign_flip_p([0, 0]) == sign_flip_p([]) == 1
    assert sign_flip_p([3] * 2000) < 1e-12
    assert sign_flip_p([1, -1] * 2000) == 1


def test_a_model_is_bold_only_where_it_beats_every_baseline(tmp_path: Path) -> None:
    good, fair, poor = ["1" * 40] * 2, ["1" * 38 + "00"] * 2, ["1" * 20 + "0" * 20] * 2
    written = text(
        tmp_path,
        *(row("model", good), row("codes", poor), row("mfcc", poor)),
        *(row("model", good, "intent"), row("codes", poor, "intent"), row("mfcc", fair, "intent")),
        *(row("model", poor, "emotion"), row("mfcc", good, "emotion")),
    )
    assert "| digits | model | **100.0** |" in written
    assert "| intent | model | 100.0 |" in written
    assert "| emotion | model | 50.0 |" in written
    assert "| digits | model | codes | +50.0 | < 0.001 | better |" in written
    assert "| intent | model | mfcc | +5.0 | 0.500 | no difference |" in written
    assert "| emotion | model | mfcc | -50.0 | < 0.001 | worse |" in written
    assert "model against mfcc: better on 1, worse on 1, no difference on 1 of 3 probes; mean +1.7 points." in written


def test_probed_clips_of_the_pretraining_set_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    right = ["1" * 30]
    written = text(
        tmp_path,
        row("seen", right, in_pretraining=[12, 30]),
        row("unseen", right, in_pretraining=[0, 30]),
        row("old", right, in_pretraining=None),
        row("codes", right),
        row("codes", right, "intent"),
    )
    first, second = written.split(tables.SEEN, 1)
    assert "none of 30 (unseen) |" in first
    assert "| seen |" not in first
    assert next(line for line in first.splitlines() if "| old |" in line).endswith("| unknown |")
    assert "12 of 30 |" in second
    assert "| digits | codes |" in second
    assert "| intent |" not in second.split("## ")[0]


def test_rows_of_other_settings_stand_in_another_table(tmp_path: Path) -> None:
    """A row of an older version (fixed C, mean alone, no answers) is kept but not compared with others."""
    older = row("model", ["1" * 30])
    older["settings"] = {"folds": 4, "seeds": [0], "C": 0.1, "max_iterations": 1000}
    older.pop("right")
    written = text(tmp_path, older, row("model", ["10" * 15]), row("codes", ["1" * 30]))
    assert "## manifest.jsonl: mean over time, C 0.1, 4 folds, seeds 0" in written
    assert "## manifest.jsonl: mean and deviation over time, C of 0.1 1, 4 folds, seeds 0" in written
    assert "| digits | model | 100.0 |" in written
    assert "| digits | model | 50.0 |" in written
    assert written.count("| model | codes |") == 1
