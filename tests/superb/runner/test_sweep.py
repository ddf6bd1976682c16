"""The list of runs: what is swept, what needs no sweep, and how it is shared."""

from pathlib import Path
from typing import Any

import pytest

from codecssl.superb import tasks
from codecssl.superb.runner.sweep import Sweep, part
from codecssl.superb.upstreams.names import parse
from codecssl.tokenize.common.errors import UserError


@pytest.fixture
def sweep(corpus: Path, tmp_path: Path) -> Any:
    def sweep(names: str = "all", **options: Any) -> Sweep:
        settings = {"upstreams": [parse("fbank")], "budget": tasks.BUDGETS["smoke"], "data": "tones", **options}
        return Sweep(tasks=tasks.choose(names), root=corpus, output=tmp_path, **settings)

    return sweep


def keys(runs: Any) -> list[tuple[Any, ...]]:
    return [(run.upstream.name, run.task, run.learning_rate, run.seed, run.fold) for run in runs]


def test_rates_and_seeds_multiply_except_where_nothing_is_trained(sweep: Any) -> None:
    runs = keys(sweep("ks,qbe", lrs=(0.1, 0.2), seeds=(0, 1)).runs())
    assert runs == [("fbank", "ks", rate, seed, None) for seed in (0, 1) for rate in (0.1, 0.2)] + [
        ("fbank", "qbe", None, 0, None)
    ]
    random = keys(sweep("qbe", upstreams=[parse("random")], seeds=(0, 1)).runs())
    assert random == [("random", "qbe", None, seed, None) for seed in (0, 1)]


def test_a_stopped_sweep_leaves_whole_comparisons_and_lists_each_run_once(sweep: Any) -> None:
    upstreams = [parse("fbank"), parse("random"), parse("fbank")]
    runs = keys(sweep("er,ks", upstreams=upstreams, lrs=(0.1, 0.1), seeds=(0, 0)).runs())
    assert [run[:2] for run in runs] == [("fbank", "er"), ("random", "er"), ("fbank", "ks"), ("random", "ks")]


def test_default_rates_are_those_of_the_task(sweep: Any) -> None:
    assert [run[1:3] for run in keys(sweep("ks,asr").runs())] == [("ks", 1e-2), ("ks", 1e-3), ("asr", 1e-3)]
    assert [run[1:3] for run in keys(sweep("ks", budget=tasks.BUDGETS["full"]).runs())] == [("ks", None)]


def test_emotion_recognition_takes_folds_in_full_or_when_asked(sweep: Any) -> None:
    assert [run[4] for run in keys(sweep("er", lrs=(0.1,)).runs())] == [None]
    assert [run[4] for run in keys(sweep("er", lrs=(0.1,), folds=True).runs())] == [1, 2, 3, 4, 5]
    assert [run[4] for run in keys(sweep("er", budget=tasks.BUDGETS["full"]).runs())] == [1, 2, 3, 4, 5]


def test_folders_differ(sweep: Any) -> None:
    runs = sweep("ks,er,qbe", lrs=(0.1, 0.2), seeds=(0, 1), folds=True).runs()
    assert len({run.folder for run in runs}) == len(runs) == 4 + 20 + 1


def test_parts_cover_each_run_once(sweep: Any) -> None:
    runs = sweep("all", seeds=(0, 1)).runs()
    shares = [part(runs, 3, index) for index in range(3)]
    assert sorted(keys(run for share in shares for run in share), key=str) == sorted(keys(runs), key=str)
    with pytest.raises(UserError, match="must be 0 to 2, for 3 parts"):
        part(runs, 3, 3)


def test_a_missing_language_model_is_an_error_at_once(sweep: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; give a 4-gram model"):
        sweep("asr", language_model=tmp_path / "none.arpa")
