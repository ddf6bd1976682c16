"""Training steps on torch's meta device, which has shapes but no values.

Operations that make a step wait for a GPU (`x[mask]`, `.item()`) and most mixing of devices are errors there. The
tests need no GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from codecssl.configs.load import load_config
from codecssl.pretrain.bench import SYNTHETIC, make_batch
from codecssl.pretrain.build import build_objective
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.model import untrained

META = torch.device("meta")
CARD = replace(SYNTHETIC, codebook_sizes=(1024,) * 8, codes_per_frame=(1,) * 8)


@pytest.fixture(autouse=True)
def meta_kernels() -> Any:
    """torch lacks the meta kernel of one gradient, that of the convolutional positions' weights.

    That of memory-efficient attention is wrong (torch 2.9.1: two values for one argument).
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl(
        "_efficient_attention_backward",
        lambda grad, q, k, v, *rest, **named: tuple(map(torch.empty_like, (q, k, v, grad))),
        "Meta",
        allow_override=True,
    )
    library.impl(
        "_weight_norm_interface_backward",
        lambda grad, direction, size, norms, dim: (torch.empty_like(direction), torch.empty_like(size)),
        "Meta",
    )
    yield
    library._destroy()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("codec2vec_tiny_codes", ["--objective.visible_weight=0.5", "--objective.quantizer_dropout=0.5"]),
        ("codec2vec_tiny_labels", []),
        ("codec2vec_tiny_online", []),
        ("codec2vec_tiny_online", ["--online.variant=spidr"]),
        ("codec2vec_tiny_codes", ["--model.positions=rotary", "--model.norm=pre"]),
        ("encodecmae_tiny", []),
        ("encodecmae_small_st", ["--mae.mask_token=zeros"]),
    ],
)
def test_a_step_never_waits_for_the_device(name: str, changes: list[str]) -> None:
    config = load_config(RunConfig, "pretrain", name, changes)
    whole = make_batch(config, CARD, seconds=4.0, clip_seconds=2.0)
    parts = (None if x is None else x[..., :170] for x in (whole.codes, whole.mask, whole.kept, whole.labels))
    codes, mask, kept, labels = parts
    masked = int(mask.sum())
    batch = Batch.of(codes, [100, 70], mask, kept, masked, 170 - masked, labels)
    objective = build_objective(config, untrained(config.model, CARD, None, 0), (500,)).train().to(META)
    objective.place(META)
    loss = objective(batch.to(META), score_visible=True)
    loss.total.backward()
    with torch.no_grad():
        objective.after_update(1)
    assert (loss.masked.frames, loss.visible.frames) == (masked, 170 - masked)


def test_moving_a_batch_moves_every_tensor_of_it() -> None:
    batch = make_batch(RunConfig(), SYNTHETIC, seconds=4.0, clip_seconds=2.0).to(META)
    assert {value.device for value in vars(batch).values() if isinstance(value, torch.Tensor)} == {META}
