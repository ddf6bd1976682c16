import copy
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

import codecssl.pretrain.objectives.objective as objective_module
from codecssl.pretrain.config import ENCODECMAE_GAMMA, ModelConfig, ObjectiveConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.objectives.codec2vec import MaskedPrediction
from codecssl.pretrain.objectives.heads import CosineHeads, make_heads
from codecssl.pretrain.objectives.objective import (
    codebook_weights,
    histogram_perplexity,
    merged,
    summary,
)
from codecssl.pretrain.objectives.targets import TARGETS, Codes, make_target
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

SIZES = (16, 12, 8)
CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0", sample_rate=16_000, hop_length=320,
    codebook_sizes=SIZES, codes_per_frame=(1, 1, 1), latent_dim=10,
)  # fmt: skip
MODEL = ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16, conv_kernel=4, conv_groups=2, layerdrop=0.0)


def test_every_target_has_an_entry() -> None:
    assert set(TARGETS) == set(get_args(get_type_hints(ObjectiveConfig)["target"]))


def objective(**changes: object) -> MaskedPrediction:
    config = ObjectiveConfig(**changes)
    torch.manual_seed(0)
    made = MaskedPrediction(untrained(MODEL, CARD, None, seed=0), make_target(config, CARD), config)
    torch.nn.init.normal_(made.heads.weight)  # not the small start: every logit counts
    return made.eval()


def batch(frames: list[int], seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    codes = np.stack([random.integers(0, size, sum(frames)) for size in SIZES])
    mask = random.random(sum(frames)) < 0.5
    masked = int(mask.sum())
    kept = torch.ones(codes.shape, dtype=torch.bool)
    return Batch.of(torch.from_numpy(codes), frames, torch.from_numpy(mask), kept, masked, sum(frames) - masked)


@pytest.mark.parametrize("gamma", ["uniform", "encodecmae"])
@pytest.mark.parametrize("visible_weight", [0.0, 0.4])
def test_loss_equals_a_naive_float64_loop(gamma: str, visible_weight: float) -> None:
    made, given = objective(gamma=gamma, visible_weight=visible_weight), batch([30, 17, 22])
    loss = made(given).total
    hidden = made.model(given.codes, given.frames, given.mask, given.kept).detach().double().numpy()
    weight, bias = made.heads.weight.detach().double().numpy(), made.heads.bias.detach().double().numpy()
    weights = [1 / 3] * 3 if gamma == "uniform" else [g / sum(ENCODECMAE_GAMMA[:3]) for g in ENCODECMAE_GAMMA[:3]]
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for frame in range(sum(given.frames)):
        masked, first = bool(given.mask[frame]), 0
        counts[masked] += 1
        for book, size in enumerate(SIZES):
            logits = [float(weight[first + v] @ hidden[frame] + bias[first + v]) for v in range(size)]
            top = max(logits)
            normaliser = top + math.log(math.fsum(math.exp(x - top) for x in logits))
            sums[masked] += weights[book] * (normaliser - logits[int(given.codes[book, frame])])
            first += size
    expected = sums[True] / counts[True] + visible_weight * sums[False] / counts[False]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_cosine_heads_equal_a_naive_float64_loop() -> None:
    """HuBERT's logits, for each stream with its own projection: cos(A h, e) / 0.1."""
    torch.manual_seed(0)
    heads = make_heads(ObjectiveConfig(head="cosine", head_dim=4), 16, SIZES).double()
    assert isinstance(heads, CosineHeads)
    hidden = torch.randn(5, 16, dtype=torch.float64)
    weight, bias = heads.projection.weight.detach().numpy(), heads.projection.bias.detach().numpy()
    classes, found = heads.classes.detach().numpy(), heads(hidden).detach().numpy()
    assert found.shape == (5, sum(SIZES))
    for frame in range(5):
        projected, first = weight @ hidden[frame].numpy() + bias, 0
        for stream, size in enumerate(SIZES):
            own = projected[4 * stream : 4 * stream + 4]
            for entry in classes[first : first + size]:
                cosine = own @ entry / math.sqrt(own @ own) / math.sqrt(entry @ entry)
                assert found[frame, first] == pytest.approx(cosine / 0.1, rel=1e-5)
                first += 1


def test_uniform_logits_give_the_logarithm_of_the_codebook() -> None:
    made, given = objective(), batch([40, 31])
    torch.nn.init.zeros_(made.heads.weight)
    torch.nn.init.zeros_(made.heads.bias)
    assert made(given).total.item() == pytest.approx(np.log(SIZES).mean(), rel=1e-6)


def test_items_do_not_see_one_another() -> None:
    made, given = objective(visible_weight=0.5), batch([30, 17])
    other = Batch.of(given.codes.clone(), given.frames, given.mask, given.kept, given.masked_total, given.visible_total)
    other.codes[:, 30:] = 5
    first, second = (made.model(each.codes, each.frames, each.mask) for each in (given, other))
    assert torch.equal(first[:30], second[:30])
    assert not torch.isclose(first[30:], second[30:]).all()


def test_parts_of_micro_batches_add_up_to_the_loss_of_the_whole() -> None:
    made, whole = objective(visible_weight=0.5), batch([30, 30, 30])
    parts = [
        Batch.of(
            whole.codes[:, rows],
            [30] * (len(rows) // 30),
            whole.mask[rows],
            whole.kept[:, rows],
            whole.masked_total,
            whole.visible_total,
        )
        for rows in (range(30), range(30, 90))
    ]
    split = [made(part, detailed=True) for part in parts]
    together = made(whole, detailed=True)
    assert sum(loss.total.item() for loss in split) == pytest.approx(together.total.item(), rel=1e-5)
    left, right = summary(merged([loss.masked for loss in split])), summary(together.masked)
    for key in right:
        assert left[key] == pytest.approx(right[key], rel=1e-5), key


@pytest.mark.parametrize("zero_3", [False, True])
@pytest.mark.parametrize("heads", ["linear", "cosine", "codebook"])
def test_scores_in_pieces_are_those_of_all_logits_at_once(
    heads: str, zero_3: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, given = objective(visible_weight=0.5), batch([40, 25])
    made.heads = make_heads(ObjectiveConfig(head=heads), MODEL.dim, SIZES, 10)
    for parameter in made.heads.parameters():
        torch.nn.init.normal_(parameter)
        if zero_3:
            parameter.ds_id = 0  # DeepSpeed's mark of a divided parameter
    found = []
    for piece in (1 << 26, 7 * sum(SIZES)):
        monkeypatch.setitem(objective_module.PIECES, "cpu", piece)
        made.zero_grad()
        loss = made(given, detailed=True)
        (3 * loss.total).backward()
        gradient = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
        found.append((loss.total.item(), gradient, summary(loss.masked)))
        with torch.no_grad():
            assert made(given).total.item() == pytest.approx(loss.total.item(), rel=1e-6)
    (total, gradient, means), (in_pieces, other, same) = found
    assert in_pieces == pytest.approx(total, rel=1e-6)
    assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-5)
    for key, value in means.items():
        assert same[key] == pytest.approx(value, rel=1e-5), key


def test_bf16_in_pieces_is_as_near_to_fp32_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and hidden states in bf16, as in a bf16 engine; the weights' gradients are summed over 100 pieces."""
    torch.manual_seed(0)
    heads = make_heads(ObjectiveConfig(), 16, SIZES, 10).bfloat16()
    hidden = torch.randn(700, 16).bfloat16()
    labels = torch.stack([torch.randint(0, size, (700,)) for size in SIZES], dim=1)
    gamma = torch.tensor([0.5, 0.3, 0.2])

    def gradient(dtype: torch.dtype, piece: int) -> torch.Tensor:
        monkeypatch.setitem(objective_module.PIECES, "cpu", piece)
        own = copy.deepcopy(heads).to(dtype)
        objective_module.score_heads(own, hidden.to(dtype), labels, SIZES, False, gamma, 700)[0].backward()
        return torch.cat([parameter.grad.float().flatten() for parameter in own.parameters()])

    exact = gradient(torch.float32, 1 << 26)
    errors = [(gradient(torch.bfloat16, piece) - exact).norm() for piece in (1 << 26, 7 * sum(SIZES))]
    assert errors[1] < 2 * errors[0], "6 times, if the sums were bf16"


def test_no_more_logits_exist_than_a_piece_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    made, given = objective(), batch([40, 25])
    rows: list[int] = []
    monkeypatch.setitem(objective_module.PIECES, "cpu", 7 * sum(SIZES))
    made.heads.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    made(given).total.backward()
    assert max(rows) == 7
    assert sum(rows) == given.masked_total, "each piece is computed once"


def test_metrics_against_their_definitions() -> None:
    made, given = objective(), batch([40, 25])
    scores = summary(made(given, detailed=True).masked)
    hidden = made.model(given.codes, given.frames, given.mask, given.kept)[given.mask]
    guesses = made.heads(hidden)[:, 16:28].argmax(1)
    truth = given.codes[1][given.mask]
    assert scores["accuracy"][1] == pytest.approx((guesses == truth).double().mean().item())
    share = np.bincount(guesses.numpy(), minlength=12) / len(guesses)
    assert scores["predicted_perplexity"][1] == pytest.approx(math.exp(-sum(p * math.log(p) for p in share if p)))
    assert scores["perplexity"][1] == pytest.approx(math.exp(scores["cross_entropy"][1]))


def test_histogram_perplexity_ends() -> None:
    assert histogram_perplexity([torch.tensor([7, 0, 0]), torch.tensor([5, 5, 5, 5])]) == pytest.approx([1.0, 4.0])


def test_targets_keep_the_codebooks_that_the_input_lacks() -> None:
    given = batch([20])
    dropped = Batch.of(
        given.codes, [20], given.mask, torch.tensor([[True], [False], [False]]).expand(3, 20), given.masked_total, 1
    )
    assert torch.equal(Codes(CARD).labels(dropped), given.codes)


def test_gamma_needs_as_many_weights_as_streams() -> None:
    assert codebook_weights("encodecmae", 8).sum().item() == pytest.approx(1.0)
    assert codebook_weights("encodecmae", 8)[0].item() == pytest.approx(0.22407463, rel=1e-4)
    with pytest.raises(UserError, match="use uniform"):
        codebook_weights("encodecmae", 9)
