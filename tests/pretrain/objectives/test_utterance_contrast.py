"""The contrast between utterances against a loop in float64, and its part in the loss of a micro-batch."""

import math

import pytest
import torch

from codecssl.pretrain.config import ModelConfig, ObjectiveConfig, RunConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.objectives.codec2vec import MaskedPrediction
from codecssl.pretrain.objectives.targets import make_target
from codecssl.pretrain.objectives.utterance_contrast import UtteranceContrast
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0", sample_rate=16_000, hop_length=320,
    codebook_sizes=(16,), codes_per_frame=(1,), latent_dim=10,
)  # fmt: skip


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


def test_an_item_of_one_frame_has_a_finite_loss_and_gradient() -> None:
    hidden = torch.randn(6, 16, requires_grad=True)
    loss = UtteranceContrast(16, 8, 0.1)(hidden, [1, 5])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


def test_it_is_added_in_training_with_the_share_of_the_micro_batch_and_not_to_an_evaluation() -> None:
    shape = ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16, conv_kernel=4, conv_groups=2, layerdrop=0.0,
                        dropout=0.0, input_dropout=0.0, attention_dropout=0.0)  # fmt: skip
    frames, mask = [12, 5, 8], torch.arange(25) % 3 == 0
    codes = torch.randint(0, 16, (1, 25), generator=torch.Generator().manual_seed(0))
    elsewhere = 4 * int(mask.sum())  # masked frames of the whole batch: this micro-batch has a quarter
    batch = Batch.of(codes, frames, mask, torch.ones(1, 25, dtype=torch.bool), elsewhere, 64)
    made = {}
    for weight in (0.0, 0.5):
        config = ObjectiveConfig(utterance_weight=weight)
        torch.manual_seed(1)
        made[weight] = MaskedPrediction(untrained(shape, CARD, None, seed=0), make_target(config, CARD), config)
    made[0.5].heads.load_state_dict(made[0.0].heads.state_dict())
    assert made[0.5].eval()(batch).total.item() == pytest.approx(made[0.0].eval()(batch).total.item(), rel=1e-6)
    hidden = made[0.5].model(batch.codes, frames, batch.mask, batch.kept)
    added = 0.5 * 0.25 * made[0.5].utterances(hidden, frames).item()
    trained = made[0.5].train()(batch).total
    assert trained.item() == pytest.approx(made[0.0].train()(batch).total.item() + added, rel=1e-5)
    trained.backward()
    assert made[0.5].utterances.projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(utterance_weight=1.0, name="encodecmae"),
        ObjectiveConfig(utterance_weight=1.0, target="online"),
    ],
)
def test_it_needs_codec2vec_with_codes_or_labels(objective: ObjectiveConfig) -> None:
    with pytest.raises(UserError, match=r"objective.utterance_weight: 1.0, needs .*set it to 0"):
        RunConfig(objective=objective)
