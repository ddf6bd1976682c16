import math

import pytest
import torch

from codecssl.pretrain.config import ModelConfig, ObjectiveConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.monitor.sanity_checks import collapse, targets_report, training_flops
from codecssl.pretrain.objectives.codec2vec import MaskedPrediction
from codecssl.pretrain.objectives.targets import make_target
from codecssl.tokenize.codec import CodecCard


def test_collapse_is_reported_only_after_the_start() -> None:
    many = [90.0, 80.0]
    assert "one code for every frame" in str(collapse(5000, 10_000, [1.0, 1.1], many))
    assert collapse(5000, 10_000, [1.0, 40.0], many) is None
    assert collapse(200, 400, [1.0, 1.0], many) is None, "every model must start with the most frequent code"
    assert collapse(2400, 10_000, [1.0, 1.0], many) is None
    assert "stream 1 are (nearly) one class (perplexity 1.20)" in str(collapse(5000, 10_000, [30.0, 9.0], [90.0, 1.2]))


def test_the_histogram_of_the_targets_in_one_line() -> None:
    printed = targets_report([torch.tensor([5, 5, 5, 5]), torch.tensor([9, 0, 0, 1])])
    assert (
        printed
        == "targets: entropy in bits 2.00, 0.47; perplexity 4 of 4, 1 of 4; % in the most frequent class 25.0, 90.0"
    )
    assert targets_report([]) == "targets: made while training"


def test_operations_agree_with_torchs_own_count() -> None:
    """The reference is torch.utils.flop_counter, which counts executed products, convolutions and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    card = CodecCard(
        name="synthetic", weights="none", weights_sha256="0", sample_rate=16_000, hop_length=320,
        codebook_sizes=(64, 64), codes_per_frame=(1, 1), latent_dim=16,
    )  # fmt: skip
    config = ModelConfig(dim=64, layers=3, heads=4, ffn_dim=256, positions="rotary", embedding_init="random")
    objective = MaskedPrediction(
        untrained(config, card, None, 0), make_target(ObjectiveConfig(), card), ObjectiveConfig()
    ).eval()
    mask = torch.zeros(200, dtype=torch.bool)
    mask[50:150] = True
    batch = Batch.of(
        torch.zeros(2, 200, dtype=torch.int64), [100, 100], mask, torch.ones(2, 200, dtype=torch.bool), 100, 100
    )
    with FlopCounterMode(display=False) as counted, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        objective(batch).total.backward()
    assert math.isfinite(counted.get_total_flops())
    assert training_flops(objective, [batch]) == pytest.approx(counted.get_total_flops(), rel=0.05)
