"""DinoSR and SpidR against loops in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codecssl.pretrain.config import ModelConfig, OnlineConfig, RunConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.pretrain.objectives.dinosr import OnlineClusters
from codecssl.pretrain.run import run
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

SIZES = (16, 12)
CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0", sample_rate=16_000, hop_length=320,
    codebook_sizes=SIZES, codes_per_frame=(1, 1), latent_dim=10,
)  # fmt: skip
MODEL = ModelConfig(
    dim=16, layers=3, heads=2, ffn_dim=24, conv_kernel=4, conv_groups=2, layerdrop=0.0, dropout=0.2, input_dropout=0.3
)


def objective(steps: int = 1000, **changes: object) -> OnlineClusters:
    torch.manual_seed(0)
    config = OnlineConfig(top_layers=2, clusters=6, **changes)  # type: ignore[arg-type]
    made = OnlineClusters(untrained(MODEL, CARD, None, seed=0), config, steps)
    for head in made.heads:
        torch.nn.init.normal_(head.weight)
    return made


def batch(frames: list[int], seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    codes = np.stack([random.integers(0, size, sum(frames)) for size in SIZES])
    mask = random.random(sum(frames)) < 0.5
    masked = int(mask.sum())
    kept = torch.ones(codes.shape, dtype=torch.bool)
    return Batch.of(torch.from_numpy(codes), frames, torch.from_numpy(mask), kept, masked, sum(frames) - masked)


def codewords(made: OnlineClusters) -> np.ndarray:
    state = {key: value.double().numpy() for key, value in made.extra_state().items()}
    return state["sums"] / state["counts"][:, :, None]


def test_features_are_the_teachers_feed_forward_outputs_normed_over_time() -> None:
    made, given = objective().eval(), batch([20, 13])
    outputs: list[torch.Tensor] = []
    for layer in list(made.model.encoder.layers)[-2:]:  # before any update the teacher is the student
        layer.ffn.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        made.model(given.codes, given.frames)
    for feature, output in zip(made.teacher_features(given), outputs, strict=True):
        for own, raw in zip(feature.split(given.frames), output.split(given.frames), strict=True):
            assert torch.allclose(own, F.instance_norm(raw.t()[None], eps=1e-5)[0].t(), atol=1e-5)


@pytest.mark.parametrize("variant", ["dinosr", "spidr"])
def test_loss_equals_a_naive_float64_loop(variant: str) -> None:
    made, given = objective(variant=variant).eval(), batch([20, 13, 17])
    loss = made(given, detailed=True, score_visible=True)
    features = [feature.double().numpy() for feature in made.teacher_features(given)]
    words, states = codewords(made), []

    def keep(index: int, output: torch.Tensor, layout: object, layers: int) -> bool:
        states.append(output.detach().double().numpy())
        return True

    made.model.encoder.register_layer_hook(keep)
    last = made.model(given.codes, given.frames, given.mask, given.kept).detach().double().numpy()
    seen = [last, last] if variant == "dinosr" else states[-2:]
    total, count = 0.0, 0
    for frame in range(sum(given.frames)):
        if not given.mask[frame]:
            continue
        count += 1
        for stream in range(2):
            label = min(range(6), key=lambda v: ((features[stream][frame] - words[stream, v]) ** 2).sum())
            weight = made.heads[stream].weight.detach().double().numpy()
            logits = weight @ seen[stream][frame] + made.heads[stream].bias.detach().double().numpy()
            total += (math.log(np.exp(logits).sum()) - logits[label]) / 2
    assert count == loss.masked.frames
    assert float(loss.total) == pytest.approx(total / count, rel=1e-5)


def test_codewords_move_as_published_and_unused_ones_stay() -> None:
    made = objective(codebook_decay=0.9)
    given = [batch([20, 13], seed) for seed in (0, 1)]
    before = {key: value.double().numpy().copy() for key, value in made.extra_state().items()}
    words = codewords(made)
    sums, counts = np.zeros_like(before["sums"]), np.zeros_like(before["counts"])
    made.train()
    for part in given:  # two micro-batches of one update
        for stream, feature in enumerate(made.teacher_features(part)):
            for z in feature[part.mask].double().numpy():
                label = ((z - words[stream]) ** 2).sum(1).argmin()
                sums[stream, label] += z
                counts[stream, label] += 1
        made(part)
    assert (counts == 0).any(), "some codewords must be unused"
    made.after_update(1)
    after = {key: value.double().numpy() for key, value in made.extra_state().items()}
    used = counts > 0
    assert np.allclose(after["counts"][used], 0.9 * before["counts"][used] + 0.1 * counts[used])
    assert np.allclose(after["sums"][used], 0.9 * before["sums"][used] + 0.1 * sums[used], atol=1e-5)
    assert np.array_equal(after["sums"][~used], before["sums"][~used])
    assert np.array_equal(after["counts"][~used], before["counts"][~used])
    made.eval()(given[0])
    made.after_update(2)
    final = {key: value.double().numpy() for key, value in made.extra_state().items()}
    assert np.array_equal(final["sums"], after["sums"]), "validation must not move codewords"


def test_the_teacher_is_an_average_of_the_student() -> None:
    made = objective(ema_start=0.9, ema_end=0.9)
    name, parameter = next(iter(made.model.encoder.named_parameters()))
    start = parameter.detach().double().clone()
    with torch.no_grad():
        parameter.add_(1.0)
    made.after_update(1)
    expected = 0.9 * start + 0.1 * (start + 1.0)
    assert torch.allclose(made.extra_state()[f"teacher.{name}"].double(), expected, atol=1e-6)
    assert torch.equal(dict(made._made_teacher().named_parameters())[name], made.extra_state()[f"teacher.{name}"])


@pytest.mark.parametrize(
    ("variant", "step", "decay"),
    [("dinosr", 0, 0.999), ("dinosr", 15_000, 0.99945), ("dinosr", 30_000, 0.9999), ("dinosr", 199_999, 0.9999),
     ("dinosr", 200_001, 1.0), ("spidr", 0, 0.999), ("spidr", 20_000, 1 - 0.001 / math.e),
     ("spidr", 400_000, 1 - 0.001 * math.exp(-20))],
)  # fmt: skip
def test_the_teachers_schedule_of_400_000_steps(variant: str, step: int, decay: float) -> None:
    assert objective(steps=400_000, variant=variant).teacher_decay(step) == pytest.approx(decay, abs=1e-12)


def test_features_of_an_item_do_not_depend_on_the_others() -> None:
    made, given = objective().eval(), batch([20, 13])
    dirty = given.codes.clone()
    dirty[:, 20:] = 7
    for own, other in zip(
        made.teacher_features(given), made.teacher_features(replace(given, codes=dirty)), strict=True
    ):
        assert torch.allclose(own[:20], other[:20], atol=1e-6)
        assert not torch.allclose(own[20:], other[20:], atol=1e-2)


def test_extra_state_comes_back() -> None:
    made = objective().train()
    made(batch([20, 13]))
    made.after_update(1)
    state = {key: value.clone() for key, value in made.extra_state().items()}
    fresh = objective()
    fresh.load_extra_state(state)
    assert all(torch.equal(fresh.extra_state()[key], value) for key, value in state.items())
    given = batch([15, 16], seed=3)
    for left, right in zip(made.teacher_features(given), fresh.teacher_features(given), strict=True):
        assert not torch.equal(left, torch.zeros_like(left))
        assert left.shape == right.shape


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"online": {"top_layers": 3}}, "online.top_layers: 3, the model has 2 layers"),
        ({"online": {"top_layers": 2, "variant": "spidr"}}, "model.layerdrop: 0.05, spidr"),
        ({"online": {"top_layers": 2, "ema_start": 1.0}}, "online.ema_start: 1.0, must be at least 0 and below 1"),
        ({"online": {"top_layers": 2, "clusters": 1}}, "online.clusters: 1, must be at least 2"),
        (
            {"online": {"top_layers": 2}, "objective": {"gamma": "encodecmae"}},
            "objective.gamma: encodecmae, but all online clusters",
        ),
        ({"online": {"top_layers": 2}, "objective": {"head": "cosine"}}, "objective.head: cosine, but online"),
        (
            {"online": {"top_layers": 2}, "objective": {"visible_weight": 0.5}},
            "objective.visible_weight: 0.5, applies to codec2vec",
        ),
    ],
)
def test_impossible_settings_are_refused(
    small_config: Callable[..., RunConfig], tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    objective = {"target": "online", **sections.get("objective", {})}
    with pytest.raises(UserError, match=message):
        small_config(tmp_path, **{**sections, "objective": objective})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_short_run_learns_without_collapse(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path, precision: str
) -> None:
    config = small_config(
        make_shards(count=80), objective={"target": "online"}, online={"top_layers": 2, "clusters": 12},
        optim={"steps": 60}, log={"log_every": 10, "valid_every": 60, "checkpoint_every": 60},
        engine={"precision": precision},
    )  # fmt: skip
    run(config, tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert min(rows[-1]["target_perplexity"]) > 3, "the targets must not fall into one cluster"
