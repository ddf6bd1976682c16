"""MTWV against its definition, threshold by threshold, in plain loops."""

import numpy as np
import pytest

from codecssl.superb.runner.mtwv import BETA, mtwv


def naive(scores: np.ndarray, truth: np.ndarray, beta: float) -> float:
    best = 0.0
    for threshold in sorted(set(scores.ravel().tolist())):
        values = []
        for row, held in zip(scores, truth, strict=True):
            if not held.any():
                continue
            found = [score >= threshold for score in row]
            missed = sum(h and not f for h, f in zip(held, found, strict=True)) / sum(held)
            others = len(held) - sum(held)
            false = sum(f and not h for h, f in zip(held, found, strict=True)) / others if others else 0.0
            values.append(1 - (missed + beta * false))
        if values:
            best = max(best, sum(values) / len(values))
    return best


def test_beta_is_that_of_quesst_2014() -> None:
    """Its scoring tool is called with an effective prior of 0.0741289."""
    assert pytest.approx(12.49) == BETA
    assert pytest.approx(0.0741289, abs=1e-7) == 1 / (1 + BETA)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_greatest_twv(seed: int) -> None:
    """Random scores with ties, queries that nothing or everything holds, several betas."""
    draw = np.random.default_rng(seed)
    truth = draw.random((6, 15)) < 0.3
    truth[0], truth[1] = False, seed % 2 == 0
    scores = (draw.normal(size=truth.shape) + 2 * truth).round(1)
    for beta in (0.0, 1.0, BETA):
        value, threshold = mtwv(scores, truth, beta)
        assert value == pytest.approx(naive(scores, truth, beta), abs=1e-12)
        assert threshold in set(scores.ravel().tolist()) | {float("inf")}


def test_edges() -> None:
    truth = np.array([[True, False], [False, True]])
    assert mtwv(truth.astype(float), truth) == (1.0, 1.0)
    assert mtwv(1.0 - truth, truth) == (0.0, float("inf"))
    assert mtwv(np.zeros((2, 2)), np.zeros((2, 2), bool)) == (0.0, float("inf"))
