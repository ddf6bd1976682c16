"""Bits of codes, against loops and sources of known entropy."""

import math

import numpy as np
import pytest

from codecssl.superb.task_codec.rates.code_rates import contexts_and_codes, costs, cross_entropy_bits, stored_bits
from codecssl.superb.task_codec.rates.points import code_card
from codecssl.tokenize.measure.entropies import CountModel


def test_model_equals_a_loop():
    random = np.random.default_rng(0)
    train = [random.integers(0, 4, (2, n)) for n in (9, 5, 7)]
    test = [random.integers(0, 4, (2, 6))]
    for k, a in ((0, 1.0), (1, 3.0)):
        counts, whole = {}, [0.5] * 4
        for codes in train:
            for t, code in enumerate(codes[k].tolist()):
                context = codes[0, t] if k else (codes[0, t - 1] if t else None)
                counts[context, code] = counts.get((context, code), 0) + 1
                whole[code] += 1
        bits = 0.0
        for t, code in enumerate(test[0][k].tolist()):
            context = test[0][0, t] if k else (test[0][0, t - 1] if t else None)
            seen = sum(n for (c, _), n in counts.items() if c == context)
            p = (counts.get((context, code), 0) + a * whole[code] / sum(whole)) / (seen + a)
            bits -= math.log2(p)
        model = CountModel(*contexts_and_codes(train, k, (4, 4)), 4)
        found = model.bits(*contexts_and_codes(test, k, (4, 4)), a)
        assert found.sum() == pytest.approx(bits, rel=1e-12)


def test_probabilities_sum_to_one():
    train = [np.random.default_rng(1).integers(0, 5, (1, 50))]
    model = CountModel(*contexts_and_codes(train, 0, (5,)), 5)
    total = (2 ** -model.bits(np.full(5, 2), np.arange(5), 3.0)).sum()
    assert total == pytest.approx(1.0)


def markov(random, count, length, stay):
    """Chains that keep their code with probability `stay`, else draw one of 8."""
    found = []
    for _ in range(count):
        codes = [int(random.integers(8))]
        while len(codes) < length:
            codes.append(codes[-1] if random.random() < stay else int(random.integers(8)))
        found.append(np.array([codes], np.uint16))
    return found


def test_cross_entropy_nears_the_source_from_above():
    random, stay = np.random.default_rng(2), 0.75
    train, test = markov(random, 200, 60, stay), markov(random, 60, 60, stay)
    same, other = stay + (1 - stay) / 8, (1 - stay) / 8
    truth = -same * math.log2(same) - 7 * other * math.log2(other)
    found = cross_entropy_bits(train, test, (8,)) / (60 * 60)
    assert truth * 0.93 < found < truth * 1.1
    # of few, unrelated utterances it is not below what uniform codes cost
    noise = [random.integers(0, 1024, (1, 40)) for _ in range(12)]
    assert cross_entropy_bits(noise[:9], noise[9:], (1024,)) / 120 > 9.9


def test_costs_of_uneven_codes(codec):
    random = np.random.default_rng(3)
    card = code_card(codec.card, 4, (256, 256))
    uneven = [np.minimum(random.geometric(0.3, (2, 50)) - 1, 255) for _ in range(80)]
    found = costs(uneven[:60], uneven[60:], card)
    assert found["filled_bits"] == 20 * 50 * 16
    entropy = 20 * 50 * 2 * 2.94  # bits of geometric(0.3)
    assert entropy * 0.9 < found["cross_entropy_bits"] < entropy * 1.2
    assert entropy * 0.8 < found["streams_bits"] < entropy * 1.8
    assert found["stored_bits"] > found["streams_bits"]


def test_stored_bits_are_of_the_file(codec):
    card = code_card(codec.card, 4, (16,))
    codes = [np.zeros((1, 300), np.uint16)] * 3
    stored, streams = stored_bits(codes, card)
    assert streams % 32 == 0
    assert 0 < streams < 3 * 300 * 4 / 8 < stored
