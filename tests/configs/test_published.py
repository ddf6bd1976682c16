"""The constants of the papers in the configs that bear their names, written down a second time."""

from typing import Any

import pytest

from codecssl.configs.load import load_config
from codecssl.pretrain.config import ENCODECMAE_GAMMA, RunConfig
from codecssl.pretrain.frame_rate import at_frame_rate

HUBERT: dict[str, Any] = {
    "mask.kind": "spans", "mask.start_probability": 0.08, "mask.span_frames": 10, "optim.steps": 400_000,
    "optim.betas": (0.9, 0.98), "optim.eps": 1e-6, "optim.weight_decay": 0.01, "data.batch_frames": 50 * 2800,
}  # fmt: skip
CODEC2VEC_BASE = HUBERT | {
    "model.dim": 768, "model.layers": 12, "model.heads": 12, "model.ffn_dim": 3072, "model.norm": "post",
    "model.activation": "gelu", "model.positions": "conv", "model.conv_kernel": 128, "model.conv_groups": 16,
    "model.embedding_init": "codec", "model.dropout": 0.1, "model.layerdrop": 0.05, "optim.lr": 5e-4,
    "optim.clip_norm": 10.0, "objective.quantizer_dropout": 0.5, "objective.quantizer_dropout_kind": "prefix",
}  # fmt: skip
POLYNOMIAL = {"optim.schedule": "polynomial", "optim.warmup_fraction": 32_000 / 400_000}
DINOSR: dict[str, Any] = {
    "objective.target": "online", "online.variant": "dinosr", "online.top_layers": 8, "online.clusters": 256,
    "online.codebook_decay": 0.9, "online.ema_start": 0.999, "online.ema_end": 0.9999,
    "online.ema_fraction": 30_000 / 400_000, "online.freeze_fraction": 0.5, "online.spidr_timescale": 20_000.0,
    "optim.schedule": "tri_stage", "optim.warmup_fraction": 0.03, "optim.hold_fraction": 0.47,
}  # fmt: skip
LABELS = {"objective.target": "labels", "objective.head": "cosine", "objective.temperature": 0.1}
LARGE = {"model.dim": 1024, "model.layers": 24, "model.heads": 16, "model.ffn_dim": 4096, "optim.clip_norm": 1.0}
ENCODECMAE: dict[str, Any] = {
    "objective.name": "encodecmae", "model.ffn_dim": 4096, "model.activation": "relu", "model.norm": "residual",
    "model.positions": "sinusoidal", "model.dropout": 0.0, "mae.decoder_layers": 2, "mae.masked_weight": 0.9,
    "mask.kind": "exact", "mask.fraction": 0.5, "mask.span_frames": 15, "data.num_codebooks": 8,
    "data.crop_frames": 300, "data.batch_frames": 128 * 300, "optim.lr": 1e-4, "optim.betas": (0.9, 0.95),
    "optim.weight_decay": 0.05, "optim.schedule": "constant", "optim.warmup_fraction": 0.0,
}  # fmt: skip
CODES = {"objective.target": "codes", "objective.gamma": "encodecmae", "optim.steps": 500_000}
SELF_TRAINING = {"objective.target": "labels", "objective.head": "linear", "optim.steps": 150_000}
SIZES = {"small": (768, 5), "base": (768, 10), "large": (1024, 20)}
PUBLISHED: dict[str, dict[str, Any]] = {
    "codec2vec_base_codes": CODEC2VEC_BASE | POLYNOMIAL | {"objective.target": "codes"},
    "codec2vec_base_labels": CODEC2VEC_BASE | POLYNOMIAL | LABELS,
    "codec2vec_base_online": CODEC2VEC_BASE | DINOSR,
    "codec2vec_large_codes": HUBERT | POLYNOMIAL | LARGE,
    "codec2vec_large_labels": HUBERT | POLYNOMIAL | LARGE | LABELS,
    "codec2vec_large_online": HUBERT | DINOSR | LARGE,
} | {
    f"encodecmae_{size}{suffix}": ENCODECMAE | {"model.dim": dim, "model.layers": layers} | kind
    for size, (dim, layers) in SIZES.items()
    for suffix, kind in (("", CODES), ("_st", SELF_TRAINING))
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_holds_its_papers_constants(name: str) -> None:
    rate = 75 if name.startswith("encodecmae") else 50  # of EnCodec, and of the codecs behind Codec2Vec and HuBERT
    config = at_frame_rate(load_config(RunConfig, "pretrain", name), rate)
    for key, value in PUBLISHED[name].items():
        section, _, field = key.partition(".")
        assert getattr(getattr(config, section), field) == value, key


def test_encodecmaes_weights_of_the_codebooks_sum_to_1() -> None:
    assert len(ENCODECMAE_GAMMA) == 8
    assert sum(ENCODECMAE_GAMMA) == pytest.approx(1.0, abs=1e-6)
    assert ENCODECMAE_GAMMA[0] == 0.22407463
    assert ENCODECMAE_GAMMA[-1] == 0.06589669
