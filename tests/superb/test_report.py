"""Reports: what is chosen, how it is called, and a page that stands alone."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from codecssl.superb import charts, report, results, tasks
from codecssl.superb.page import html
from codecssl.tokenize.errors import UserError


def row(name: str, task: str, value: float, **changes: Any) -> dict[str, Any]:
    kind = name if name in report.BASELINES else "model"
    budget = {key: getattr(tasks.BUDGETS["smoke"], key) for key in ("name", "divisor", "least", "evaluations")}
    base = {
        "upstream": {"name": name, "kind": kind, "argument": None, "sha256": None},
        "manifest_sha256": "0",
        "data": report.SAMPLE,
        "task": task,
        "budget": budget,
        "seed": 0,
        "value": value,
        "valid": value,
        "best_step": 50,
        "layer_weights": [0.2, 0.8] if kind == "model" else None,
        "curves": {"valid-accuracy": [[50, 0.3], [100, value]], "train-loss": [[10, 2.0], [100, 1.0]]},
        "metric": "accuracy",
        "chance": 0.1,
        "utterances": {"train": 60, "valid": 20, "test": 40},
        "learning_rate": 1e-2,
        "steps": 100,
        "official_steps": 200_000,
        "versions": {"s3prl": "0.4.18", "torch": "2.9.1"},
        "seconds": 3.0,
    }
    return {**base, **changes}


def rows() -> list[dict[str, Any]]:
    values = {"fbank": (0.2, 0.3), "codes": (0.4, 0.35), "random": (0.5, 0.4), "/runs/tiny": (0.6, 0.3)}
    return [row(name, task, v) for name, pair in values.items() for task, v in zip(("ks", "er"), pair, strict=True)]


def test_the_table() -> None:
    (comparison,) = report.compare(rows())
    header, body = report.lines(comparison)
    assert header == ["upstream", "ks acc %", "er acc %", "learning rate"]
    assert [line[0] for line in body[:5]] == [
        "chance (most frequent class)",
        "fbank",
        "codes",
        "random",
        "tiny",
    ]
    assert body[4][1].startswith("60.0 (")
    assert body[5:] == [
        ["tiny − fbank", "+40.0*", "+0.0", ""],
        ["tiny − codes", "+20.0", "-5.0", ""],
        ["tiny − random", "+10.0", "-10.0", ""],
    ]


def test_the_validation_set_chooses_the_learning_rate() -> None:
    """Though another rate is better on the test set."""
    sweep = [
        row("fbank", "ks", 0.9, valid=0.1, learning_rate=1e-1),
        row("fbank", "ks", 0.5, valid=0.2, learning_rate=1e-3),
    ]
    for order in (sweep, sweep[::-1]):
        cell = report.compare(order)[0].cells["fbank", "ks"]
        assert cell.value == 0.5
        assert cell.rates == (1e-3, 1e-1)


def test_seeds_are_averaged_each_with_its_own_choice() -> None:
    sweep = [row("fbank", "ks", v, valid=valid, seed=s, learning_rate=lr) for v, valid, s, lr in
             ((0.1, 0.5, 0, 1), (0.9, 0.4, 0, 2), (0.2, 0.1, 1, 1), (0.4, 0.3, 1, 2))]  # fmt: skip
    cell = report.compare(sweep)[0].cells["fbank", "ks"]
    assert cell.value == pytest.approx((0.1 + 0.4) / 2)
    assert len(cell.runs) == 2


def test_the_interval_is_wilsons() -> None:
    """Against the value for 60 of 100 in Brown, Cai and DasGupta's formula, and at the edges."""
    cell = report.Cell(value=0.6, utterances=100, runs=(), rates=())
    assert cell.interval == pytest.approx((0.5020, 0.6906), abs=2e-4)
    low, high = report.Cell(value=1.0, utterances=10, runs=(), rates=()).interval
    assert high == pytest.approx(1.0)
    assert low == pytest.approx(1 / (1 + 1.96**2 / 10), abs=1e-9)
    assert not math.isnan(low)


@pytest.mark.parametrize(
    ("budget", "data", "start"),
    [
        (
            "smoke",
            report.SAMPLE,
            "Not SUPERB: smoke budget, 1/2000 (at least 100) of the official steps; data: sample corpus",
        ),
        ("quick", "corpora", "Not SUPERB: quick budget, 1/100"),
        (
            "full",
            report.SAMPLE,
            "Not SUPERB: full budget, all of the official steps; data: sample corpus (synthetic",
        ),
        ("full", "corpora", "SUPERB's official heads, batch sizes and number of steps, on corpora"),
    ],
)
def test_only_a_full_budget_on_other_data_is_called_superb(budget: str, data: str, start: str) -> None:
    settings = {key: getattr(tasks.BUDGETS[budget], key) for key in ("name", "divisor", "least", "evaluations")}
    (comparison,) = report.compare([row("fbank", "ks", 0.5, data=data, budget=settings)])
    assert comparison.claim.startswith(start)
    for text in (report.markdown([comparison]), html([comparison]).replace("&#x27;", "'")):
        assert comparison.claim in text


def test_a_difference_beyond_chance_is_marked() -> None:
    """As the unpaired test of two proportions does it: here z = 2.00 and z = 1.91."""

    def cell(value: float) -> report.Cell:
        return report.Cell(value=value, utterances=100, runs=(), rates=())

    assert report.difference(cell(0.60), cell(0.46)) == "+14.0*"
    assert report.difference(cell(0.46), cell(0.594)) == "-13.4"


def test_what_can_not_be_compared_is_kept_apart() -> None:
    """Other data, another version of the same data, another budget: a table each."""
    others = [row("fbank", "ks", 0.1, data="x"), row("fbank", "ks", 0.1, manifest_sha256="1"),
              row("fbank", "ks", 0.1, budget={**rows()[0]["budget"], "divisor": 7})]  # fmt: skip
    assert len(report.compare([*rows(), *others])) == 4


def test_models_of_one_name_are_told_apart() -> None:
    def model(path: str, digest: str) -> dict[str, Any]:
        return row(path, "ks", 0.5, upstream={"name": path, "kind": "model", "argument": path, "sha256": digest})

    (comparison,) = report.compare(
        [model("/a/model", "1" * 64), model("/b/model", "2" * 64), model("/b/other", "3" * 64)]
    )
    assert comparison.upstreams == ("model [111111]", "model [222222]", "other")


class Page(HTMLParser):
    """What a page would fetch, whether its tags match, and its text."""

    void = ("meta", "br", "line", "rect", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_has_everything() -> None:
    """Nothing is fetched, tags match; two curves a task, one heat chart for the one upstream with layers."""
    page = Page(html(report.compare(rows())))
    assert page.fetched == []
    assert page.open == []
    assert page.tags.count("svg") == 2 * 2 + 1
    assert page.tags.count("polyline") == 2 * 2 * 4
    assert "script" not in page.tags
    assert "link" not in page.tags


def test_names_are_escaped() -> None:
    text = html(report.compare([row("<img src=x>", "ks", 0.5)]))
    assert "<img" not in text


def test_ticks_cover_the_range_in_round_steps() -> None:
    assert charts.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert charts.ticks(0, 0.37) == [0, 0.1, 0.2, 0.3, 0.4]
    assert charts.ticks(3, 3)[0] <= 3 <= charts.ticks(3, 3)[-1]
    for low, high in ((0, 1e-6), (0, 123456), (-2.5, 2.5)):
        marks = charts.ticks(low, high)
        assert marks[0] <= low
        assert marks[-1] >= high
        assert 3 <= len(marks) <= 8


def test_write_and_load(tmp_path: Path) -> None:
    for number, each in enumerate(rows()):
        results.write_json(tmp_path / "runs" / str(number) / "result.json", each)
    paths = report.write(report.load([tmp_path]), tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.html"]
    assert "| tiny − codes | +20.0 | -5.0 |  |" in paths[0].read_text()
    assert len(results.publish(tmp_path)) == 8
    assert [json.loads(line)["task"] for line in (tmp_path / "results.jsonl").read_text().splitlines()].count("ks") == 4


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run; give an --output"):
        report.load([tmp_path])
