"""EnCodecMAE: the masked autoencoder, ResiDual layers and exact masks, against loops in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codecssl.pretrain.config import ENCODECMAE_GAMMA, MaeConfig, MaskConfig, ModelConfig, ObjectiveConfig, RunConfig
from codecssl.pretrain.data.hashed_random import hashed, uniform
from codecssl.pretrain.data.loader import Batch, packed_mask
from codecssl.pretrain.data.masking import span_mask
from codecssl.pretrain.export.export import export, load_pretrained
from codecssl.pretrain.model.layers import make_encoder, sinusoids
from codecssl.pretrain.model.model import untrained
from codecssl.pretrain.model.packing import packed_layout
from codecssl.pretrain.monitor.telemetry import read_rows
from codecssl.pretrain.objectives.encodecmae import EncodecMae
from codecssl.pretrain.objectives.objective import parameters
from codecssl.pretrain.objectives.targets import Codes
from codecssl.pretrain.run import run
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

SIZES = (16, 12)
CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0", sample_rate=24_000, hop_length=320,
    codebook_sizes=SIZES, codes_per_frame=(1, 1), latent_dim=10,
)  # fmt: skip
MODEL = ModelConfig(
    dim=16, layers=3, heads=2, ffn_dim=24, norm="residual", positions="sinusoidal", activation="relu",
    dropout=0.0, input_dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
)  # fmt: skip


def objective(**changes: object) -> EncodecMae:
    torch.manual_seed(0)
    config = MaeConfig(**changes)  # type: ignore[arg-type]
    made = EncodecMae(untrained(MODEL, CARD, None, seed=0), Codes(CARD), ObjectiveConfig(gamma="encodecmae"), config)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def batch(frames: list[int], seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    codes = np.stack([random.integers(0, size, sum(frames)) for size in SIZES])
    keys = hashed(seed, np.arange(len(frames)))
    mask = packed_mask(MaskConfig(kind="exact", span_frames=4), keys, np.array(frames))
    masked = int(mask.sum())
    kept = torch.ones(codes.shape, dtype=torch.bool)
    return Batch.of(torch.from_numpy(codes), frames, torch.from_numpy(mask), kept, masked, sum(frames) - masked)


def test_residual_layers_equal_a_loop_over_torchs_own_attention() -> None:
    torch.manual_seed(0)
    encoder = make_encoder(MODEL).double().eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    x0 = x1 = x
    for layer in encoder.layers:
        weights = dict(layer.named_parameters())
        attention = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
        names = ("q_proj", "k_proj", "v_proj")
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat([weights[f"self_attn.{n}.weight"] for n in names]))
            attention.in_proj_bias.copy_(torch.cat([weights[f"self_attn.{n}.bias"] for n in names]))
            attention.out_proj.weight.copy_(weights["self_attn.output_proj.weight"])
            attention.out_proj.bias.copy_(weights["self_attn.output_proj.bias"])
        f = attention(x0, x0, x0)[0]
        x0, x1 = layer.self_attn_layer_norm(x0 + f), x1 + f
        inner = F.relu(x0 @ weights["own_ffn.inner_proj.weight"].t() + weights["own_ffn.inner_proj.bias"])
        f = inner @ weights["own_ffn.output_proj.weight"].t() + weights["own_ffn.output_proj.bias"]
        x0, x1 = layer.ffn_layer_norm(x0 + f), x1 + f
    expected = x0 + encoder.layer_norm(x1)
    assert torch.allclose(encoder(x[0], packed_layout([9], x.device)), expected[0], atol=1e-12)


@pytest.mark.parametrize(
    ("dim", "layers", "tied", "millions"),
    [(768, 5, True, 18), (768, 10, True, 30), (1024, 20, True, 92), (768, 5, False, 43), (768, 10, False, 87),
     (1024, 20, False, 252)],
)  # fmt: skip
def test_sizes_are_the_published_ones(dim: int, layers: int, tied: bool, millions: int) -> None:
    with torch.device("meta"):
        config = replace(MODEL, dim=dim, layers=layers, heads=16, ffn_dim=4096, tie_ffn=tied)
        assert parameters(make_encoder(config)) / 1e6 == pytest.approx(millions, rel=0.015)


def test_a_shared_feed_forward_block_is_one_and_is_saved_once() -> None:
    encoder = make_encoder(replace(MODEL, tie_ffn=True))
    assert len({id(layer.ffn) for layer in encoder.layers}) == 1
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}


def test_sinusoids_are_vaswanis() -> None:
    made = sinusoids(50, 16, torch.device("cpu"))
    for t in (0, 1, 49):
        for i in range(8):
            assert float(made[t, 2 * i]) == pytest.approx(math.sin(t / 10_000 ** (2 * i / 16)), abs=1e-5)
            assert float(made[t, 2 * i + 1]) == pytest.approx(math.cos(t / 10_000 ** (2 * i / 16)), abs=1e-5)


@pytest.mark.parametrize(("mask_token", "width"), [("learned", 16), ("zeros", 16), ("learned", 24), ("learned", 8)])
def test_loss_equals_a_naive_float64_loop_over_single_items(mask_token: str, width: int) -> None:
    made = objective(mask_token=mask_token, decoder_dim=None if width == 16 else width)
    given = batch([21, 12, 16])
    assert made.decoder.layers[0].self_attn.num_heads == width // 8
    assert (made.narrow is None) == (width == 16)
    loss = float(made(given).total)
    made = made.double()
    weight, bias = made.heads.weight.detach().numpy(), made.heads.bias.detach().numpy()
    gamma = np.array(ENCODECMAE_GAMMA[:2]) / sum(ENCODECMAE_GAMMA[:2])
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    with torch.no_grad():
        for codes, mask in zip(given.codes.split(given.frames, 1), given.mask.split(given.frames), strict=True):
            frames = len(mask)
            x = made.model.projection(made.model.input_norm(made.model.embedding(codes)))
            x = x + made.model.positions.scale * sinusoids(frames, 16, x.device)
            seen = x[~mask]
            encoded = made.model.encoder(seen, packed_layout([len(seen)], x.device))
            if made.narrow is not None:
                encoded = encoded @ made.narrow.weight.t() + made.narrow.bias
            full = torch.zeros(frames, width, dtype=torch.float64)
            full[mask] = made.mask_token
            full[~mask] = encoded
            full = full + made.positions.scale * sinusoids(frames, width, x.device)
            hidden = made.decoder(full, packed_layout([frames], x.device)).numpy()
            for t in range(frames):
                logits = weight @ hidden[t] + bias
                first, second = logits[:16], logits[16:]
                entropy = [
                    math.log(np.exp(part).sum()) - part[int(codes[k, t])] for k, part in enumerate((first, second))
                ]
                sums[bool(mask[t])] += float(gamma @ entropy)
                counts[bool(mask[t])] += 1
    assert (counts[True], counts[False]) == (given.masked_total, given.visible_total)
    assert loss == pytest.approx(0.9 * sums[True] / counts[True] + 0.1 * sums[False] / counts[False], rel=1e-5)
    if mask_token == "zeros":
        assert not made.mask_token.any()


def test_the_encoder_never_sees_masked_frames_nor_another_item() -> None:
    made, given = objective(), batch([21, 12])
    dirty = given.codes.clone()
    dirty[:, given.mask] = 3
    with torch.no_grad():
        assert torch.equal(made.encode(replace(given, codes=dirty)), made.encode(given))
        dirty[:, 21:] = 5
        own = made.encode(given)
        other = made.encode(replace(given, codes=dirty))
        first = given.visible_frames[0]
        assert torch.equal(other[:first], own[:first])
        assert not torch.isclose(other[first:], own[first:]).all()


def test_uniform_logits_give_the_logarithm_of_the_codebook() -> None:
    made, given = objective(), batch([40, 31])
    torch.nn.init.zeros_(made.heads.weight)
    torch.nn.init.zeros_(made.heads.bias)
    gamma = np.array(ENCODECMAE_GAMMA[:2]) / sum(ENCODECMAE_GAMMA[:2])
    assert float(made(given).total) == pytest.approx(float(gamma @ np.log(SIZES)), rel=1e-6)


@pytest.mark.parametrize("fraction", [0.5, 0.3])
def test_exact_masks_equal_the_procedure_written_as_a_loop(fraction: float) -> None:
    """Draw starts in their random order; mask a span each until enough is masked; unmask the last one's excess."""
    config = MaskConfig(kind="exact", fraction=fraction, span_frames=15)
    frames = np.array([300, 300, 77, 31, 15])
    keys = hashed(5, np.arange(len(frames)))
    masks = span_mask(config, keys, frames)
    for item, count in enumerate(frames.tolist()):
        wanted = max(1, math.floor(fraction * count + 1e-9))
        draws = uniform(keys[item], 1, np.arange(count - 14))
        expected = np.zeros(masks.shape[1], dtype=bool)
        for start in np.argsort(draws, kind="stable"):
            for frame in range(start, start + 15):
                if expected.sum() < wanted:
                    expected[frame] = True
        assert masks[item].sum() == wanted
        assert np.array_equal(masks[item], expected)
    assert not np.array_equal(masks[0], masks[1])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"positions": "conv"}}, "model.positions: conv, but encodecmae removes frames"),
        ({"objective": {"target": "online"}}, "objective.target: online, but encodecmae"),
        ({"model": {"norm": "post", "tie_ffn": True}}, "model.tie_ffn: true, but only model.norm residual"),
        ({"mask": {"kind": "exact", "fraction": 1.0}}, "mask.fraction: 1.0, must be above 0 and below 1"),
    ],
)
def test_impossible_settings_are_refused(
    small_config: Callable[..., RunConfig], tmp_path: Path, sections: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small_config(tmp_path, **merge(MAE, sections))


MAE: dict[str, dict[str, object]] = {
    "objective": {"name": "encodecmae", "gamma": "encodecmae", "quantizer_dropout": 0.0},
    "model": {"norm": "residual", "positions": "sinusoidal", "activation": "relu", "tie_ffn": True, "dropout": 0.0,
              "input_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0},
    "mask": {"kind": "exact", "span_frames": 5},
}  # fmt: skip


def merge(left: dict[str, dict[str, object]], right: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    return {key: {**left.get(key, {}), **right.get(key, {})} for key in {*left, *right}}


def test_a_short_run_learns_and_its_export_gives_hidden_states(
    make_shards: Callable[..., Path], small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small_config(
        make_shards(count=80), **merge(MAE, {"optim": {"steps": 60}, "log": {"log_every": 1, "checkpoint_every": 60}})
    )
    run(config, tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[0]["masked_percent"] == pytest.approx(50, abs=2)
    gamma = np.array(ENCODECMAE_GAMMA[:3]) / sum(ENCODECMAE_GAMMA[:3])
    for row in rows:
        both = 0.9 * gamma @ row["cross_entropy"] + 0.1 * gamma @ row["visible_cross_entropy"]
        assert row["loss"] == pytest.approx(both, rel=1e-5)
        assert len(row["visible_accuracy"]) == 3
    export(tmp_path / "run", tmp_path / "model")
    states = load_pretrained(tmp_path / "model").extract(torch.zeros(1, 3, 30, dtype=torch.int64), [30])
    assert len(states) == config.model.layers + 1
    assert all(state.isfinite().all() for state in states)


def test_a_decoder_of_half_a_head_is_refused() -> None:
    model = replace(MODEL, dim=64, heads=4)
    with pytest.raises(UserError, match=r"mae\.decoder_dim: 24, must be a multiple of the width of a head \(16\)"):
        RunConfig(model=model, objective=ObjectiveConfig(name="encodecmae"), mae=MaeConfig(decoder_dim=24))
