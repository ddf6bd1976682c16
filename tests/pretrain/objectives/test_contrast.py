"""The contrastive loss against a float64 loop over single items."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from codecssl.pretrain.config import ModelConfig, ObjectiveConfig, RunConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.objectives.codec2vec import MaskedPrediction
from codecssl.pretrain.objectives.contrast import Contrast
from codecssl.pretrain.objectives.targets import make_target
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec

CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0", sample_rate=16_000, hop_length=320,
    codebook_sizes=(16,), codes_per_frame=(1,), latent_dim=10,
)  # fmt: skip
BANDS = 6


def batch(frames: list[int]) -> Batch:
    random, total = np.random.default_rng(0), sum(frames)
    codes, mel = random.integers(0, 16, (1, total)), random.integers(0, 256, (BANDS, total)).astype(np.uint8)
    mask = random.random(total) < 0.5
    made = Batch.of(
        torch.from_numpy(codes), frames, torch.from_numpy(mask), torch.ones(1, total, dtype=torch.bool),
        int(mask.sum()), total - int(mask.sum()),
    )  # fmt: skip
    return replace(made, mel=torch.from_numpy(mel))


@pytest.mark.parametrize("frames", [[9, 9], [12, 5, 8, 1]])
def test_loss_equals_a_float64_loop_over_items(frames: list[int]) -> None:
    torch.manual_seed(0)
    contrast, given = Contrast(16, BANDS, 4, 0.2).double(), batch(frames)
    hidden = torch.randn(sum(frames), 16, dtype=torch.float64)
    found = contrast(hidden, given).item()
    state = {name: value.numpy() for name, value in contrast.state_dict().items()}

    def unit(vector: np.ndarray) -> np.ndarray:
        return vector / math.sqrt(math.fsum(vector**2))

    expected, begin = 0.0, 0
    for length in frames:
        plane = (given.mel[:, begin : begin + length].numpy().astype(float) - 80.0) / 48.0
        rows = [(row - row.mean()) / max(row.std(), 0.05) for row in plane]
        keys = []
        for t in range(length):
            around = [row[min(max(t + offset, 0), length - 1)] for offset in (-2, 0, 2) for row in rows]
            keys.append(unit(state["key.weight"] @ np.array(around) + state["key.bias"]))
        for t in range(length):
            if given.mask[begin + t]:
                query = unit(state["query.weight"] @ hidden[begin + t].numpy() + state["query.bias"])
                logits = [float(query @ key) / 0.2 for key in keys]
                expected += math.log(math.fsum(map(math.exp, logits))) - logits[t]
        begin += length
    assert found == pytest.approx(expected, rel=1e-4)


def test_it_is_added_in_training_and_not_to_an_evaluation() -> None:
    shape = ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16, conv_kernel=4, conv_groups=2, layerdrop=0.0,
                        dropout=0.0, input_dropout=0.0, attention_dropout=0.0, input="both")  # fmt: skip
    given, made = batch([12, 5, 8]), {}
    for weight in (0.0, 0.5):
        config = ObjectiveConfig(contrast_weight=weight)
        model = untrained(shape, CARD, None, seed=0, mel=MelSpec.for_codec(BANDS, CARD))
        torch.manual_seed(1)
        made[weight] = MaskedPrediction(model, make_target(config, CARD), config)
    made[0.5].heads.load_state_dict(made[0.0].heads.state_dict())
    assert made[0.5].eval()(given).total.item() == pytest.approx(made[0.0].eval()(given).total.item(), rel=1e-6)
    hidden = made[0.5].model(given.codes, given.frames, given.mask, given.kept, given.mel)
    added = 0.5 * made[0.5].contrast(hidden, given).item() / given.masked_total
    trained = made[0.5].train()(given).total
    assert trained.item() == pytest.approx(made[0.0].train()(given).total.item() + added, rel=1e-5)
    trained.backward()
    assert made[0.5].contrast.key.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": ObjectiveConfig(contrast_weight=1.0)},
        {"objective": ObjectiveConfig(contrast_weight=1.0, target="online"), "model": ModelConfig(input="mel")},
    ],
)
def test_it_needs_a_plane_and_a_target_of_codes_or_labels(changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"objective.contrast_weight: 1.0, needs .*set it to 0"):
        RunConfig(**changes)
