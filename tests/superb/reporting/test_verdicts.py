"""Best upstreams, and their paired significance."""

from typing import Any

import numpy as np
from scipy.stats import binomtest

from codecssl.superb import tasks
from codecssl.superb.reporting import tables, verdicts
from codecssl.superb.reporting.web_page import html


def row(name: str, task: str, errors: list[int] | None, seed: int = 0, value: float | None = None) -> dict[str, Any]:
    kind = name if name in tables.BASELINES else "s3prl"
    metric = tasks.TASKS[task].metric
    mean = float(np.mean(errors)) if errors else 0.0
    value = value if value is not None else (1 - mean if metric == "accuracy" else mean)
    budget = {"name": "demo", "divisor": 2000, "least": 1000, "evaluations": 10, "lighten": True, "pairs": 2000}
    return {
        **{"upstream": {"name": name, "kind": kind, "argument": None, "sha256": None}},
        **{"manifest_sha256": "0", "data": "x", "task": task, "budget": budget, "seed": seed, "value": value},
        **{"valid": value, "best_step": 50, "layer_weights": None, "curves": {}, "values": {metric: value}},
        **{"metric": metric, "chance": 0.1 if metric == "accuracy" else None, "learning_rate": 1e-2, "steps": 1000},
        **{"utterances": {"train": 60, "valid": 20, "test": 40}, "batch": 32, "official_steps": 200_000},
        **{"versions": {"s3prl": "0.4.18", "torch": "2.9.1"}, "seconds": 3.0, "errors": errors},
    } | {
        "upstream": {
            "name": name,
            "kind": name if name in tables.BASELINES else "s3prl",
            "argument": None,
            "sha256": None,
        }
    }


def test_one_seed_gives_mcnemars_test_and_seeds_are_summed() -> None:
    one, other = [0] * 30 + [1] * 10, [0] * 25 + [1] * 14 + [0]
    (c,) = tables.compare([row("a", "ks", one), row("b", "ks", other)])
    expected = binomtest(1, 6).pvalue
    assert np.isclose(verdicts.paired_p(c.cells["a", "ks"], c.cells["b", "ks"]), expected)
    (c,) = tables.compare([row(n, "ks", e, seed) for n, e in (("a", one), ("b", other)) for seed in (0, 1)])
    assert np.isclose(verdicts.paired_p(c.cells["a", "ks"], c.cells["b", "ks"]), expected)  # the same again is no more
    (c,) = tables.compare([row("a", "ks", one), row("b", "ks", None)])
    assert verdicts.paired_p(c.cells["a", "ks"], c.cells["b", "ks"]) is None
    (c,) = tables.compare([row("a", "ks", one, 0), row("b", "ks", other, 1)])
    assert verdicts.paired_p(c.cells["a", "ks"], c.cells["b", "ks"]) is None


def test_the_sentence_and_the_bold_cells() -> None:
    good, fair, poor = [0] * 40, [1, 1] + [0] * 38, [1] * 20 + [0] * 20
    rows = [row("good", "ks", good), row("fbank", "ks", poor), row("codes", "ks", poor)]  # beyond noise
    rows += [row("good", "er", good), row("fbank", "er", fair), row("codes", "er", poor)]  # within noise of fbank
    rows += [row("good", "pr", poor), row("fbank", "pr", fair), row("codes", "pr", poor)]  # lost
    (c,) = tables.compare(rows)
    printed = verdicts.sentence(c)
    assert printed.startswith("good is best on 2 of 3 tasks; significantly better than every other upstream on 1 (ks);")
    assert "not significantly better on er; others are best on pr (fbank)" in printed
    header, body = tables.table_rows(c)
    ours = dict(zip(header, next(line for line in body if line[0] == "good"), strict=True))
    assert [key.split()[0] for key, text in ours.items() if text.startswith("**")] == ["ks"]
    against = dict(zip(header, next(line for line in body if line[0] == "good − fbank"), strict=True))
    assert [text.endswith("*") for text in list(against.values())[1:]] == [True, True, False]
    page = html([c])
    assert printed.split(";")[0] in page
    assert page.count("<b>") == 2  # ks of good, and fbank's lead on pr
    assert '<td class="down">+45.0*</td>' in page  # more phone errors are worse
    (c,) = tables.compare([row("good", "ks", good), row("fbank", "ks", good)])
    assert verdicts.sentence(c) == "No upstream wins: none is best on any of 1 tasks."
