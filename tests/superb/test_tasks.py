"""Tasks: s3prl's own settings are SUPERB's, budgets scale steps only, columns are what s3prl's CSVs hold."""

from typing import Any

import pytest

from codecssl.superb.patches import import_patches
from codecssl.superb.tasks import BUDGETS, TASKS, choose, lrs_of, official_config
from codecssl.tokenize.common.errors import UserError


def test_official_settings_match_superb() -> None:
    """Steps, batch (with accumulation) and learning rate as the SUPERB paper's table gives them."""
    import_patches.install()
    table = {}
    for name, task in TASKS.items():
        if task.problem is not None and task.superb:
            config = official_config(task)
            train, batch = config["train"], config["build_batch_sampler"]["train"]["batch_size"]
            rate = config["build_optimizer"]["conf"]["lr"]
            table[name] = (train["total_steps"], batch, train["gradient_accumulate"], rate)
    assert table == {
        "pr": (100_000, 16, 2, 1e-2),
        "asr": (200_000, 32, 1, 1e-4),
        "ks": (200_000, 32, 1, 1e-4),
        "sid": (200_000, 8, 4, 1e-4),
        "asv": (200_000, 10, 5, 1e-4),
        "sd": (30_000, 8, 4, 1e-4),
        "ic": (200_000, 32, 1, 1e-4),
        "sf": (200_000, 32, 1, 1e-4),
        "er": (30_000, 4, 8, 1e-4),
    }


def test_official_heads_match_superb() -> None:
    import_patches.install()
    recurrent = {"proj_size": 1024, "hidden_size": [1024, 1024], "bidirectional": True, "module": "LSTM"}
    for name in ("asr", "sf"):
        head = official_config(TASKS[name])["build_downstream"]["model_conf"]
        assert {key: head[key] for key in recurrent} == recurrent
    assert official_config(TASKS["pr"])["build_downstream"] == {"hidden_size": 256}
    assert official_config(TASKS["sd"])["build_downstream"] == {"hidden_size": 512, "rnn_layers": 1}
    loss = official_config(TASKS["asv"])["build_task"]
    assert loss == {"loss_type": "amsoftmax", "loss_conf": {"margin": 0.4, "scale": 30}}


def test_there_are_ten_tasks_and_three_more() -> None:
    ten = ["pr", "asr", "ks", "qbe", "sid", "asv", "sd", "ic", "sf", "er"]
    assert [task.name for task in choose("all")] == ten
    assert list(TASKS) == [*ten, "env", "inst", "pitch"]


def test_budgets_scale_steps() -> None:
    steps = {name: [budget.steps(official) for official in (200_000, 30_000, 50)] for name, budget in BUDGETS.items()}
    assert steps == {"full": [200_000, 30_000, 50], "quick": [2000, 300, 50], "demo": [500, 500, 50],
                     "smoke": [100, 100, 50]}  # fmt: skip
    work = {name: [budget.steps(200_000, work) for work in (20, 100)] for name, budget in BUDGETS.items()}
    assert work == {"full": [200_000, 200_000], "quick": [2000, 2000], "demo": [25, 5], "smoke": [5, 1]}
    assert [budget.tested(100) for budget in BUDGETS.values()] == [None, None, 8, 8]
    assert BUDGETS["smoke"].tested(20) is None


def test_default_learning_rates() -> None:
    assert lrs_of(TASKS["ks"], BUDGETS["full"]) == (None,)
    assert lrs_of(TASKS["ks"], BUDGETS["smoke"]) == (1e-2, 1e-3)
    assert lrs_of(TASKS["asr"], BUDGETS["smoke"]) == (1e-3,)
    assert lrs_of(TASKS["asr"], BUDGETS["full"]) == (None,)
    assert lrs_of(TASKS["qbe"], BUDGETS["smoke"]) == (None,)


@pytest.mark.parametrize(
    ("name", "row", "columns"),
    [
        ("pr", {"phones": ["AH", "B"]}, {"transcription": "AH B"}),
        ("pr", {"phones": "AH B"}, {"transcription": "AH B"}),
        ("asr", {"text": "a b"}, {"transcription": "a b"}),
        ("ks", {"keyword": "yes", "label": "x"}, {"label": "yes"}),
        ("ks", {"label": "x", "start": 1.0, "end": 2.0}, {"label": "x", "start_sec": 1.0, "end_sec": 2.0}),
        ("asv", {"speaker": "a"}, {"spk": "a"}),
        ("ic", {"slots": {"action": "a", "object": "b", "location": "c"}}, {"labels": "a ; b ; c"}),
        ("sf", {"text": "go to 5:30", "iob": "O O B-time"}, {"transcription": "go to 530", "iob": "O O time"}),
        ("er", {"style": "sad"}, {"label": "sad"}),
        ("qbe", {"role": "query", "query": "q"}, {"role": "query", "query": "q"}),
        ("qbe", {"role": "document", "queries": ["q"]}, {"role": "document", "queries": ["q"]}),
    ],
)
def test_columns(name: str, row: dict[str, Any], columns: dict[str, Any]) -> None:
    assert TASKS[name].columns(row) == columns


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sf", {"text": "a b", "iob": "O"}, "1 tags for 2 words"),
        ("sd", {"segments": [{"speaker": s, "start": 0, "end": 1} for s in "abc"]}, "more than two speakers"),
    ],
)
def test_rows_that_a_task_can_not_use(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS[name].columns(row)


def test_choose() -> None:
    assert [task.name for task in choose("er, ks,er")] == ["er", "ks"]
    assert choose("all") == list(TASKS.values())[:10]
    for wrong in ("ks,xx", ""):
        with pytest.raises(UserError, match="give some of pr,asr,ks,qbe,sid,asv,sd,ic,sf,er,env,inst,pitch, all"):
            choose(wrong)
