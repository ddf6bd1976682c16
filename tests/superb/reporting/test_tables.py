"""Reports: choice of runs, names, and a self-contained web page."""

import json
import math
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from codecssl.superb import results, tasks
from codecssl.superb.reporting import superb_score, svg_charts, tables
from codecssl.superb.reporting.comparison import Cell
from codecssl.superb.reporting.web_page import html
from codecssl.superb.reporting.write import write
from codecssl.tokenize.common.errors import UserError


def settings(budget: str) -> dict[str, Any]:
    return {key: value for key, value in asdict(tasks.BUDGETS[budget]).items() if key != "learning_rates"}


def row(name: str, task: str, value: float, **changes: Any) -> dict[str, Any]:
    kind = name if name in tables.BASELINES else "model"
    budget = settings("smoke")
    base = {
        "upstream": {"name": name, "kind": kind, "argument": None, "sha256": None},
        "manifest_sha256": "0",
        "not_official": [],
        "data": tables.SAMPLE,
        "task": task,
        "budget": budget,
        "seed": 0,
        "value": value,
        "valid": value,
        "best_step": 50,
        "layer_weights": [0.2, 0.8] if kind == "model" else None,
        "curves": {"valid-accuracy": [[50, 0.3], [100, value]], "train-loss": [[10, 2.0], [100, 1.0]]},
        "values": {"accuracy": value},
        "metric": "accuracy",
        "chance": 0.1,
        "utterances": {"train": 60, "valid": 20, "test": 40},
        "learning_rate": 1e-2,
        "steps": 100,
        "batch": 32,
        "official_steps": 200_000,
        "versions": {"s3prl": "0.4.18", "torch": "2.9.1"},
        "seconds": 3.0,
    }
    return {**base, **changes}


def rows() -> list[dict[str, Any]]:
    values = {"fbank": (0.2, 0.3), "codes": (0.4, 0.35), "random": (0.5, 0.4), "/runs/tiny": (0.6, 0.3)}
    return [row(name, task, v) for name, pair in values.items() for task, v in zip(("ks", "er"), pair, strict=True)]


def test_rows_are_chance_upstreams_and_differences() -> None:
    (comparison,) = tables.compare(rows())
    header, body = tables.table_rows(comparison)
    assert header == ["upstream", "ks acc % ↑", "er acc % ↑"]
    assert [line[0] for line in body[:5]] == [
        "chance (most frequent class)",
        "fbank",
        "codes",
        "random",
        "tiny",
    ]
    assert body[4][1].startswith("60.0 (")
    assert body[5:] == [
        ["tiny − fbank", "+40.0*", "+0.0"],
        ["tiny − codes", "+20.0", "-5.0"],
        ["tiny − random", "+10.0", "-10.0"],
    ]


def test_heads_that_saw_less_than_their_training_set_are_named() -> None:
    few = row("fbank", "asr", 0.9, steps=1, batch=32, metric="wer", values={"wer": 0.9},
              utterances={"train": 400, "valid": 8, "test": 8})  # fmt: skip
    (comparison,) = tables.compare([row("fbank", "ks", 0.2), few])
    [note] = [note for note in tables.notes(comparison) if "next to nothing" in note]
    assert "(asr 32 of 400)" in note
    (comparison,) = tables.compare([row("fbank", "ks", 0.2), {**few, "steps": 13}])
    assert not [note for note in tables.notes(comparison) if "next to nothing" in note]


def test_the_rates_that_won_stand_with_their_tasks() -> None:
    runs = [row("fbank", "ks", 0.5), row("fbank", "ks", 0.5, seed=1, learning_rate=1e-3), row("fbank", "er", 0.5)]
    (comparison,) = tables.compare([*runs, row("fbank", "sid", 0.5)])
    text = " ".join(tables.notes(comparison))
    assert "selected: fbank ks: 0.001/0.01; sid er: 0.01." in text
    assert "± is the deviation over seeds; a figure without it is of one seed; in brackets: the 95 % Wilson" in text
    (comparison,) = tables.compare([row("fbank", "ks", 0.5), row("fbank", "er", 0.5)])
    text = " ".join(tables.notes(comparison))
    assert "selected: fbank 0.01." in text
    assert "deviation over seeds" not in text


def test_the_validation_set_chooses_the_learning_rate() -> None:
    """Another rate is better on the test set."""
    sweep = [
        row("fbank", "ks", 0.9, valid=0.1, learning_rate=1e-1),
        row("fbank", "ks", 0.5, valid=0.2, learning_rate=1e-3),
    ]
    for order in (sweep, sweep[::-1]):
        cell = tables.compare(order)[0].cells["fbank", "ks"]
        assert cell.value("accuracy") == 0.5
        assert cell.lrs == (1e-3, 1e-1)


def test_seeds_are_averaged_each_with_its_own_choice() -> None:
    sweep = [row("fbank", "ks", v, valid=valid, seed=s, learning_rate=lr) for v, valid, s, lr in
             ((0.1, 0.5, 0, 1), (0.9, 0.4, 0, 2), (0.2, 0.1, 1, 1), (0.4, 0.3, 1, 2))]  # fmt: skip
    cell = tables.compare(sweep)[0].cells["fbank", "ks"]
    assert cell.value("accuracy") == pytest.approx((0.1 + 0.4) / 2)
    assert cell.deviation("accuracy") == pytest.approx(0.15 * math.sqrt(2))
    assert tables.cell_text(cell, "accuracy") == "25.0 ± 21.2"
    assert len(cell.runs) == 2


def of_share(value: float, utterances: int) -> Cell:
    found = row("fbank", "ks", value, utterances={"test": utterances})
    return Cell(task="ks", runs=(found,), lrs=(1.0,))


def test_the_interval_equals_wilsons() -> None:
    """The reference is Brown, Cai and DasGupta's formula for 60 of 100. Shares of 0 and 1 are included."""
    cell = of_share(0.6, 100)
    assert cell.interval == pytest.approx((0.5020, 0.6906), abs=2e-4)
    low, high = of_share(1.0, 10).interval
    assert high == pytest.approx(1.0)
    assert low == pytest.approx(1 / (1 + 1.96**2 / 10), abs=1e-9)
    assert not math.isnan(low)


@pytest.mark.parametrize(
    ("budget", "data", "start"),
    [
        (
            "smoke",
            tables.SAMPLE,
            "Not SUPERB: smoke budget, 1/2000 (at least 100) of the official steps, fewer for heavy heads; data: sam",
        ),
        ("quick", "corpora", "Not SUPERB: quick budget, 1/100"),
        (
            "full",
            tables.SAMPLE,
            "Not SUPERB: full budget, all of the official steps; data: sample corpus (synthetic",
        ),
        ("full", "mine", "Not SUPERB: full budget, all of the official steps; data: mine"),
        ("quick", "official", "Not SUPERB: quick budget, 1/100"),
        ("full", "official", "SUPERB's official corpora, heads, batch sizes and number of steps; data: official"),
    ],
)
def test_only_a_full_budget_on_its_own_corpora_is_called_superb(budget: str, data: str, start: str) -> None:
    digest = None if data == "official" else "0"
    (comparison,) = tables.compare(
        [row("fbank", "ks", 0.5, data=data, budget=settings(budget), manifest_sha256=digest)]
    )
    assert comparison.claim.startswith(start)
    for text in (tables.markdown([comparison]), html([comparison]).replace("&#x27;", "'")):
        assert comparison.claim in text


def test_a_full_run_on_part_of_the_official_data_is_not_called_superb() -> None:
    full = {"budget": settings("full"), "manifest_sha256": None, "data": "superb"}
    partial = ["train has 4 files, not 28,539", "train has 1 speakers, not 251"]
    (comparison,) = tables.compare(
        [row("fbank", "asr", 0.5, **full, not_official=partial), row("fbank", "ks", 0.5, **full)]
    )
    assert not comparison.is_superb
    claim = "Not SUPERB: not the official data: asr: train has 4 files, not 28,539; asr: train has 1 speakers, not 251"
    for text in (comparison.claim, tables.markdown([comparison]), html([comparison])):
        assert claim in text
    unchecked = row("fbank", "asr", 0.5, **full)
    del unchecked["not_official"]
    assert "asr: the counts were not checked" in tables.compare([unchecked])[0].claim


def test_a_difference_beyond_chance_is_marked() -> None:
    """The unpaired test of two proportions gives z = 2.00 and z = 1.91 here."""
    assert tables.difference(of_share(0.60, 100), of_share(0.46, 100), "accuracy") == "+14.0*"
    assert tables.difference(of_share(0.46, 100), of_share(0.594, 100), "accuracy") == "-13.4"


def test_incomparable_runs_are_in_separate_tables() -> None:
    """Other data, another version of the same data and another budget have separate tables."""
    others = [row("fbank", "ks", 0.1, data="x"), row("fbank", "ks", 0.1, manifest_sha256="1"),
              row("fbank", "ks", 0.1, budget={**rows()[0]["budget"], "divisor": 7})]  # fmt: skip
    assert len(tables.compare([*rows(), *others])) == 4


def test_models_of_one_name_are_distinguished() -> None:
    def model(path: str, digest: str) -> dict[str, Any]:
        return row(path, "ks", 0.5, upstream={"name": path, "kind": "model", "argument": path, "sha256": digest})

    (comparison,) = tables.compare(
        [model("/a/model", "1" * 64), model("/b/model", "2" * 64), model("/b/other", "3" * 64)]
    )
    assert comparison.upstreams == ("model [111111]", "model [222222]", "other")


class Page(HTMLParser):
    """Resources, unmatched tags and text of a page."""

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
    """The page fetches nothing. It has two curves a task, and one heat chart for the one upstream with layers."""
    page = Page(html(tables.compare(rows())))
    assert page.fetched == []
    assert page.open == []
    assert page.tags.count("svg") == 2 * 2 + 1
    assert page.tags.count("polyline") == 2 * 2 * 4
    assert "script" not in page.tags
    assert "link" not in page.tags


def test_names_are_escaped() -> None:
    text = html(tables.compare([row("<img src=x>", "ks", 0.5)]))
    assert "<img" not in text


def test_ticks_cover_the_range_in_round_steps() -> None:
    assert svg_charts.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert svg_charts.ticks(0, 0.37) == [0, 0.1, 0.2, 0.3, 0.4]
    assert svg_charts.ticks(3, 3)[0] <= 3 <= svg_charts.ticks(3, 3)[-1]
    for low, high in ((0, 1e-6), (0, 123456), (-2.5, 2.5)):
        marks = svg_charts.ticks(low, high)
        assert marks[0] <= low
        assert marks[-1] >= high
        assert 3 <= len(marks) <= 8


def test_write_and_load(tmp_path: Path) -> None:
    for number, each in enumerate(rows()):
        results.write_json(tmp_path / "runs" / "tiny" / "ks" / str(number) / "result.json", each)
    paths = write(tables.load([tmp_path]), tmp_path)
    assert [path.name for path in paths] == ["report.md", "report.html"]
    assert "| tiny − codes | +20.0 | -5.0 |" in paths[0].read_text()
    assert len(results.publish(tmp_path)) == 8
    assert [json.loads(line)["task"] for line in (tmp_path / "results.jsonl").read_text().splitlines()].count("ks") == 4


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run; give an --output"):
        tables.load([tmp_path])


TESTED: dict[str, dict[str, float]] = {
    "pr": {"per": 0.2}, "asr": {"wer": 0.1, "wer_lm": 0.08}, "ks": {"accuracy": 0.9}, "qbe": {"mtwv": 0.05},
    "sid": {"accuracy": 0.7}, "asv": {"eer": 0.06}, "sd": {"der": 0.07}, "ic": {"accuracy": 0.9},
    "sf": {"slot_type_f1": 0.8, "slot_value_cer": 0.3}, "er": {"accuracy": 0.6},
}  # fmt: skip


def all_ten(name: str = "/runs/tiny", better: float = 1.0, **changes: Any) -> list[dict[str, Any]]:
    """A row of each task; metrics times `better`."""
    found = []
    for task, values in TESTED.items():
        values = {key: better * value for key, value in values.items()}
        value = next(iter(values.values()))
        own: dict[str, Any] = {"values": values, "metric": next(iter(values)), "curves": {}, "chance": None}
        own |= {"valid": None} if task == "asv" else {}
        own |= {"learning_rate": None, "steps": 0, "best_step": None, "chosen": {"layer": 3}} if task == "qbe" else {}
        found.append(row(name, task, value, **own, **changes))
    return found


def official(name: str = "/runs/tiny") -> list[dict[str, Any]]:
    return all_ten(name, budget=settings("full"), manifest_sha256=None, data="superb")


def test_all_ten_tasks_in_one_table() -> None:
    (comparison,) = tables.compare([*all_ten("fbank"), *all_ten(better=0.5)])
    header, body = tables.table_rows(comparison)
    assert header[1:4] == ["pr PER % ↓", "asr WER % ↓", "asr WER with LM % ↓"]
    assert len(header) == 1 + 12
    lines = {line[0]: dict(zip(header, line, strict=True)) for line in body}
    assert lines["tiny"]["sf CER % ↓"] == "15.0"
    assert lines["tiny − fbank"]["pr PER % ↓"] == "-10.0"
    assert lines["tiny"]["qbe MTWV x100 ↑"] == "2.5"
    text = " ".join(tables.notes(comparison))
    assert "asv: SUPERB has no validation set" in text
    assert "the best validation MTWV (fbank 3, tiny 3)" in text
    turned = tables.markdown([comparison]).splitlines()
    assert turned[4].startswith("| upstream | chance (most frequent class) | fbank | tiny | tiny − fbank |")
    assert turned[6].startswith("| pr PER % ↓ |")
    assert "(published)" not in tables.markdown([comparison])
    assert "score" not in header
    table = tables.console_table(comparison)
    assert len(table.columns) == 1 + len(body)
    assert Page(html([comparison])).open == []


def test_a_full_row_has_a_score_next_to_published_ones() -> None:
    (comparison,) = tables.compare(official())
    header, body = tables.table_rows(comparison)
    values = {(task, key): 100 * value for task, found in TESTED.items() for key, value in found.items()}
    lines = {line[0]: dict(zip(header, line, strict=True)) for line in body}
    assert lines["tiny"]["score"] == f"{superb_score.score(values):.0f}"
    assert lines["HuBERT Base (published)"]["score"] == "941"
    assert lines["HuBERT Base (published)"]["asr WER with LM % ↓"] == "4.79"
    assert lines["Codec2Vec online (reported, via a secondary digest)"]["score"] == ""


def test_a_missing_task_is_named_and_leaves_no_score() -> None:
    (comparison,) = tables.compare([found for found in official() if found["task"] not in ("sd", "sf")])
    header, body = tables.table_rows(comparison)
    assert dict(zip(header, body[1], strict=True))["score"] == ""
    assert "tiny has no score: sd, sf missing." in tables.notes(comparison)


def test_official_tasks_share_one_table() -> None:
    rows = [{**found, "rows_sha256": str(i)} for i, found in enumerate(official())]
    assert len(tables.compare(rows)) == 1


def test_a_run_that_ran_away_neither_wins_nor_spoils_the_page() -> None:
    """A loss, or a validation figure, that is NaN."""
    nan = math.nan
    sweep = [row("fbank", "pr", value, values={"per": value}, metric="per", valid=valid, learning_rate=rate)
             for value, valid, rate in ((0.9, nan, 1.0), (0.5, 0.4, 2.0), (0.8, nan, 3.0))]  # fmt: skip
    assert tables.compare(sweep)[0].cells["fbank", "pr"].value("per") == 0.5
    curves = {"train-loss": [[10, 2.0], [20, nan], [30, math.inf]], "valid-accuracy": [[10, nan]]}
    text = html(tables.compare([row("fbank", "ks", 0.5, curves=curves)]))
    assert text.count("<circle") == 1
    assert "nan" not in text


def test_the_lowest_validation_error_is_selected() -> None:
    sweep = [
        row("fbank", "pr", value, values={"per": value}, metric="per", valid=valid, learning_rate=rate)
        for value, valid, rate in ((0.1, 0.9, 1.0), (0.5, 0.2, 2.0))
    ]
    assert tables.compare(sweep)[0].cells["fbank", "pr"].value("per") == 0.5


def test_verification_without_validation_takes_the_best_test_figure() -> None:
    sweep = [
        row("fbank", "asv", value, values={"eer": value}, metric="eer", valid=None, learning_rate=rate)
        for value, rate in ((0.3, 1.0), (0.2, 2.0))
    ]
    assert tables.compare(sweep)[0].cells["fbank", "asv"].value("eer") == 0.2


def test_folds_are_averaged_within_a_seed() -> None:
    folds = [row("fbank", "er", value, fold=fold, seed=seed) for fold, value, seed in
             ((1, 0.2, 0), (2, 0.4, 0), (1, 0.6, 1), (2, 0.8, 1))]  # fmt: skip
    cell = tables.compare(folds)[0].cells["fbank", "er"]
    assert cell.by_seed("accuracy") == pytest.approx([0.3, 0.7])
    assert cell.utterances == 80
    notes = tables.notes(tables.compare(folds)[0])
    assert "er: the mean over folds, each tested in turn." in notes
    assert any(note.startswith("Tested utterances: er 80;") for note in notes)  # of both folds


def test_emotion_without_all_folds_has_no_score() -> None:
    """One seed without one of the five folds is sufficient."""
    others = [found for found in official() if found["task"] != "er"]
    (er,) = [found for found in official() if found["task"] == "er"]
    folds = [{**er, "fold": fold, "seed": seed} for fold in range(1, 6) for seed in (0, 1)]
    (comparison,) = tables.compare(others + folds)
    assert not [note for note in tables.notes(comparison) if "no score" in note or "without fold" in note]
    (comparison,) = tables.compare(others + folds[:7] + folds[8:9])
    assert {"tiny has no score: er missing.", "er of tiny: without fold 4, 5."} <= set(tables.notes(comparison))


def test_skipped_utterances_are_reported() -> None:
    skipped = {"longer than 300 s": 2}
    (comparison,) = tables.compare([row("fbank", "ks", 0.5, skipped=skipped)])
    assert "Utterances left out or emptied: longer than 300 s: ks 2." in tables.notes(comparison)
