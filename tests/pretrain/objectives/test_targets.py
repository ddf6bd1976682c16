"""Targets of codecs with finite scalar quantization: the digits of a code, against loops and the quantizer itself."""

from types import SimpleNamespace
from typing import Any

import helpers
import pytest
import torch

from codecssl.pretrain.config import ObjectiveConfig
from codecssl.pretrain.objectives.heads import CodebookHeads, make_heads
from codecssl.pretrain.objectives.objective import score
from codecssl.pretrain.objectives.targets import Codes, Digits, make_target
from codecssl.tokenize.backends.parts.fsq import FiniteScalarQuantizer
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError


def card(size: int, latent_dim: int, rows: int = 1) -> CodecCard:
    made: CodecCard = helpers.card([size] * rows)
    return CodecCard(**made.to_dict() | {"latent_dim": latent_dim})


@pytest.mark.parametrize(
    ("size", "latent_dim", "rows", "levels"),
    [(65_536, 8, 1, 4), (6_561, 8, 1, 3), (4_096, 512, 1, None), (1_024, 8, 1, None), (6_561, 8, 2, None),
     (64, 6, 1, 2), (16, 1, 1, 16)],
)  # fmt: skip
def test_the_card_tells_finite_scalar_quantizers(size: int, latent_dim: int, rows: int, levels: int | None) -> None:
    assert card(size, latent_dim, rows).fsq_levels == levels


def batch(codes: torch.Tensor) -> Any:
    return SimpleNamespace(codes=codes)


def test_digits_are_the_levels_of_the_quantizers_channels() -> None:
    quantizer = FiniteScalarQuantizer(8, 4)
    codes = torch.randint(65_536, (3, 1, 11))
    digits = Digits(card(65_536, 8)).labels(batch(codes))
    assert digits.shape == (3, 8, 11)
    for item, own in zip(codes, digits):
        assert torch.equal(quantizer.dequantize(item), own / 2 - 1.0)
    assert int(digits[1, 2, 5]) == int(codes[1, 0, 5]) // 16 % 4


def test_tables_and_counts_of_digits_are_those_of_the_codes() -> None:
    quantizer, target = FiniteScalarQuantizer(3, 4), Digits(card(64, 3))
    tables = target.tables(quantizer.embeddings())
    counts = torch.randint(9, (64,))
    found = target.counts([counts])
    expected = torch.zeros(3, 4, dtype=torch.int64)
    for code in range(64):
        digits = [code % 4, code // 4 % 4, code // 16]
        summed = sum(table[digit] for table, digit in zip(tables, digits, strict=True))
        torch.testing.assert_close(summed, quantizer.embeddings()[0][code])
        for channel, digit in enumerate(digits):
            expected[channel, digit] += counts[code]
    assert torch.equal(torch.stack(found), expected)
    assert tables[0][:, 1:].abs().max() < tables[0][:, 0].abs().max()  # a digit's own channel, and the same for others


@pytest.mark.parametrize("context", [False, True])
def test_the_streams_are_a_distribution_over_all_codes(context: bool) -> None:
    """The likelihoods of all 64 codes sum to 1, and the summed cross-entropy is the joint one."""
    torch.manual_seed(0)
    target = Digits(card(64, 3))
    heads = make_heads(ObjectiveConfig(head="codebook", head_context=context), 6, target.sizes, target.width)
    assert isinstance(heads, CodebookHeads)
    for parameter in heads.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter)
    labels = target.labels(batch(torch.arange(64)[None, None]))[0].t()  # [64, 3], every code once
    hidden = torch.randn(1, 6).expand(64, 6)
    logits = heads(hidden, labels).double()
    logs = sum(
        part.log_softmax(1).gather(1, label[:, None])[:, 0]
        for part, label in zip(logits.split(target.sizes, 1), labels.unbind(1), strict=True)
    )
    assert isinstance(logs, torch.Tensor)
    torch.testing.assert_close(logs.exp().sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)
    joint = score(logits, labels, target.sizes, detailed=False).cross_entropy.sum()
    torch.testing.assert_close(joint.double(), -logs.sum(), rtol=1e-5, atol=0)


def test_the_config_chooses_the_targets() -> None:
    fsq, other = card(65_536, 8), card(1_024, 128)
    assert isinstance(make_target(ObjectiveConfig(), fsq), Digits)
    assert isinstance(make_target(ObjectiveConfig(fsq="whole"), fsq), Codes)
    assert isinstance(make_target(ObjectiveConfig(), other), Codes)
    with pytest.raises(UserError, match="objective.fsq: digits, but the codes of made are not"):
        make_target(ObjectiveConfig(fsq="digits"), other)
