"""Codebook heads and the cross-entropy in pieces, against float64 formulas written with loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codecssl.configs.load import load_config
from codecssl.pretrain.build import build
from codecssl.pretrain.config import ObjectiveConfig, RunConfig
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.objectives.cross_entropy import summed_cross_entropy
from codecssl.pretrain.objectives.heads import CodebookHeads, log_unigram, make_heads
from codecssl.pretrain.ranks import Ranks
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.registry import load_codec

SIZES, DIM, WIDTH, FRAMES = (5, 7, 5), 6, 4, 9


def heads(*, context: bool) -> tuple[CodebookHeads, list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(3)
    tables = [torch.randn(size, WIDTH) * scale for size, scale in zip(SIZES, (3.0, 1.0, 0.3), strict=True)]
    bias = log_unigram([torch.arange(size) for size in SIZES])
    made = make_heads(ObjectiveConfig(head="codebook", head_context=context), DIM, SIZES, WIDTH)
    assert isinstance(made, CodebookHeads)
    made.start(tables, bias)
    return made, tables, bias


def test_a_fresh_head_gives_the_unigram() -> None:
    made, _, bias = heads(context=True)
    labels = torch.stack([torch.randint(size, (FRAMES,)) for size in SIZES], dim=1)
    logits = made(torch.randn(FRAMES, DIM), labels)
    np.testing.assert_allclose(logits.detach(), bias.expand(FRAMES, -1), atol=1e-6)
    counts = np.arange(5) + 0.5
    np.testing.assert_allclose(bias[:5].exp(), counts / counts.sum(), rtol=1e-6)


@pytest.mark.parametrize("context", [False, True])
def test_logits_are_the_formula_of_the_docstring(context: bool) -> None:
    made, tables, _ = heads(context=context)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.3
    hidden = torch.randn(FRAMES, DIM)
    labels = torch.stack([torch.randint(size, (FRAMES,)) for size in SIZES], dim=1)
    found = made(hidden, labels).detach().numpy()
    state = {name: value.detach().double().numpy() for name, value in made.state_dict().items()}
    root = float(tables[0].double().square().mean().sqrt())
    for n in range(FRAMES):
        start, known = 0, np.zeros(WIDTH)
        for k, size in enumerate(SIZES):
            rows = slice(k * WIDTH, (k + 1) * WIDTH)
            query = state["projection.weight"][rows] @ hidden[n].double().numpy() + state["projection.bias"][rows]
            if context:
                query = query + known @ state["from_context"][k]
            own = slice(start, start + size)
            expected = np.exp(state["log_scale"][k]) * (state["classes"][own] @ query) / WIDTH**0.5 + state["bias"][own]
            np.testing.assert_allclose(found[n, own], expected, rtol=1e-4, atol=1e-5)
            known = known + tables[k][labels[n, k]].double().numpy() / root
            start += size


def test_no_head_sees_its_own_label_or_a_finer_one() -> None:
    made, _, _ = heads(context=True)
    torch.nn.init.normal_(made.from_context)
    hidden = torch.randn(1, DIM)
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 0]])
    a, b = (made(hidden, labels).split(SIZES, dim=1) for labels in (first, second))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.allclose(a[2], b[2])


def test_codebook_heads_need_codes() -> None:
    with pytest.raises(UserError, match="objective.head: codebook, but objective.target is labels"):
        ObjectiveConfig(head="codebook", target="labels")
    with pytest.raises(UserError, match="objective.head_context: true, but objective.head is linear"):
        ObjectiveConfig(head_context=True)


@pytest.mark.parametrize(("sizes", "frames"), [((5, 7, 5), 9), ((1024, 300_000), 3), ((1024,), 1000)])
def test_cross_entropy_in_pieces(sizes: tuple[int, ...], frames: int) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(frames, sum(sizes)) * 5.0).requires_grad_()
    labels = torch.stack([torch.randint(size, (frames,)) for size in sizes], dim=1)
    weights = torch.rand(len(sizes)).double()
    found = summed_cross_entropy(logits, labels, sizes)
    exact = logits.detach().double().requires_grad_()
    streams = zip(exact.split(sizes, dim=1), labels.unbind(1), strict=True)
    expected = torch.stack([F.cross_entropy(part, label, reduction="sum") for part, label in streams])
    (expected * weights).sum().backward()
    (found.double() * weights).sum().backward()
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(logits.grad, exact.grad, atol=1e-6)


def test_cross_entropy_of_bf16_logits_is_summed_in_fp32() -> None:
    torch.manual_seed(2)
    logits = torch.randn(400, 1024, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(1024, (400, 1))
    found = summed_cross_entropy(logits, labels, (1024,))
    expected = F.cross_entropy(logits.detach().double(), labels[:, 0], reduction="sum")
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.item(), expected, rtol=1e-5)


def test_a_run_starts_at_the_unigram_and_learns_from_mel_too(tmp_path) -> None:
    """build() starts the heads from the codec's tables and the corpus's histogram; mel_weight adds its own gradient."""
    card = load_codec("tiny_16khz").card
    spec = MelSpec.for_codec(8, card)
    random, utterances = np.random.default_rng(0), []
    for number in range(12):
        utterances.append(
            EncodedUtterance(
                id=f"u{number}", path=f"u{number}", source_sha256="0" * 64, source_rate=16_000,
                samples=60 * 320, source_samples=60 * 320,
                codes=[random.integers(0, 1 + 9 * k, 60).astype(np.uint16) for k in range(8)],
                mel=random.integers(0, 256, (60, 8)).astype(np.uint8),
            )
        )  # fmt: skip
    writer = ShardWriter(tmp_path, 0, card)
    writer.add_block(12, utterances, [])
    writer.finish("0" * 64)
    finish_dataset(tmp_path, {"codec": card.to_dict(), "sources": [], "mel": spec.to_dict()}, 1)
    changes = (
        f"--data.dirs={tmp_path} --model.dim=16 --model.layers=1 --model.heads=2 --model.ffn_dim=16"
        " --mask.span_frames=5 --data.batch_frames=600 --data.crop_frames=60 --data.valid_fraction=0"
    )
    config = load_config(RunConfig, "pretrain", "codecmae_laptop", changes.split())
    train, _, _ = open_data(config, Ranks(rank=0, world_size=1, local_rank=0))
    made = build(config, train.corpus, fresh=True)
    [batch] = train.step(0)
    made.eval()
    first = made(batch, detailed=True)
    counts = np.bincount(np.concatenate([u.codes[7] for u in utterances]), minlength=1024) + 0.5
    labels = batch.codes[7][batch.masked].numpy()
    expected = -np.log(counts / counts.sum())[labels].sum()
    assert first.masked.cross_entropy[7].item() == pytest.approx(expected, rel=1e-4)
    plain = first.total.item()
    made.train()
    torch.nn.init.zeros_(made.mel_head.weight)  # so that the bias alone is predicted
    predicted = made.mel_head.bias.detach().double().numpy()
    total = made(batch).total.item()
    mel = batch.mel.t()[batch.masked].double().numpy()
    error = np.abs(predicted - (mel - 80.0) / 48.0).mean()
    assert total - plain == pytest.approx(error, rel=1e-4)


def test_mel_weight_needs_a_model_that_reads_mel() -> None:
    with pytest.raises(UserError, match="objective.mel_weight: 1.0, needs objective.name encodecmae and model.input"):
        load_config(RunConfig, "pretrain", "encodecmae_laptop", ["--objective.mel_weight", "1.0"])
