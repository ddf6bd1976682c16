"""Mel distance, SI-SDR and alignment against plain formulas."""

import numpy as np

from codecssl.tokenize.measure.fidelity import align, mel_distance, si_sdr


def test_si_sdr_is_the_ratio_of_signal_to_orthogonal_noise_at_any_gain():
    rng = np.random.default_rng(0)
    x, n = rng.standard_normal(16_000), rng.standard_normal(16_000)
    n -= x * (x @ n) / (x @ x)
    n *= np.sqrt((x @ x) / (n @ n)) * 10 ** (-7 / 20)
    assert abs(si_sdr(x.astype("f4"), (3 * (x + n)).astype("f4")) - 7) < 1e-3


def test_mel_distance_of_a_gain_is_the_log_of_the_gain():
    x = np.random.default_rng(0).standard_normal(16_000).astype("f4")
    assert mel_distance(x, x) == 0
    assert abs(mel_distance(x, x * 0.5) - np.log(2)) < 1e-4


def test_align_undoes_a_delay():
    x = np.random.default_rng(0).standard_normal(8_000).astype("f4")
    late = np.concatenate([np.zeros(321, "f4"), x])[:8_000]
    a, b = align(x, late)
    assert np.array_equal(a, b)
    assert len(a) == 8_000 - 321
