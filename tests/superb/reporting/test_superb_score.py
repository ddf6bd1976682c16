"""The score gives the published rows their published scores."""

import pytest

from codecssl.superb.reporting.superb_score import ANCHORS, PUBLISHED, missing, score

WANTED = {"FBANK": 0, "wav2vec 2.0 Base": 818, "HuBERT Base": 941, "WavLM Base+": 1106, "WavLM Large": 1145,
          "DistilHuBERT": 717}  # fmt: skip


@pytest.mark.parametrize(("name", "wanted"), WANTED.items())
def test_published_rows_have_their_published_score(name: str, wanted: int) -> None:
    found = score(PUBLISHED[f"{name} (published)"])
    assert found is not None
    assert abs(found - wanted) < 0.51


def test_the_best_is_1000_and_fbank_0() -> None:
    assert score({key: best for key, (_, best) in ANCHORS.items()}) == pytest.approx(1000)
    assert score({key: low for key, (low, _) in ANCHORS.items()}) == pytest.approx(0)


def test_a_task_of_two_metrics_counts_once() -> None:
    values = {key: best if key[0] == "sf" else low for key, (low, best) in ANCHORS.items()}
    assert score(values) == pytest.approx(100)


def test_a_missing_task_means_no_score() -> None:
    values = {key: low for key, (low, _) in ANCHORS.items() if key != ("sf", "slot_value_cer") and key[0] != "er"}
    assert score(values) is None
    assert missing(values) == ["er", "sf"]
