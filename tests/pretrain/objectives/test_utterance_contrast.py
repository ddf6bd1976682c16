"""The contrast between utterances against a loop in float64, and what it teaches."""

import math

import torch

from codecssl.pretrain.objectives.utterance_contrast import UtteranceContrast


def test_the_loss_is_that_of_a_loop_in_float64() -> None:
    torch.manual_seed(0)
    frames = [7, 2, 12]
    hidden, module = torch.randn(sum(frames), 16), UtteranceContrast(16, 8, 0.1)
    weight, bias = module.projection.weight.double(), module.projection.bias.double()
    halves, begin = [], 0
    for total in frames:
        for first, last in ((0, total - total // 2), (total - total // 2, total)):
            mean = hidden[begin + first : begin + last].double().mean(0)
            point = weight @ mean + bias
            halves.append(point / point.norm())
        begin += total
    losses = []
    for query, half in enumerate(halves):
        scores = [math.exp(float(half @ key) / 0.1) if at != query else 0.0 for at, key in enumerate(halves)]
        losses.append(-math.log(scores[query ^ 1] / sum(scores)))
    assert math.isclose(float(module(hidden, frames)), sum(losses) / len(losses), rel_tol=1e-5)
