"""Checkpoints of transformers as upstreams: random weights in the hub's format, against s3prl's own upstreams."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from codecssl.superb.patches import import_patches
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import parse
from codecssl.tokenize.common.errors import UserError

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.5,
}
LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
KINDS = {
    "hubert": ("Hubert", {}, {"do_normalize": False}),
    "hubert-large": ("Hubert", LARGE, {"do_normalize": True, "return_attention_mask": True}),
    "wav2vec2": ("Wav2Vec2", {}, {"do_normalize": True}),
    "wav2vec2-large": ("Wav2Vec2", LARGE, {"do_normalize": True}),
    "wavlm": ("WavLM", {}, {"do_normalize": False}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import transformers

    root, made = tmp_path_factory.mktemp("checkpoints"), {}
    for name, (kind, config, preprocessor) in KINDS.items():
        torch.manual_seed(0)
        settings = getattr(transformers, f"{kind}Config")(**SMALL, **config)
        getattr(transformers, f"{kind}Model")(settings).eval().save_pretrained(root / name)
        transformers.Wav2Vec2FeatureExtractor(**preprocessor).save_pretrained(root / name)
        made[name] = root / name
    return made


@pytest.fixture(scope="module")
def waves() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (16_000, 1_600, 5_001, 240_000, 400, 16_000, 790)  # 15 s at most
    return [0.3 * torch.randn(n, generator=generator) + 0.05 for n in lengths]


@pytest.mark.parametrize("name", KINDS)
def test_batch_equals_one_by_one(name: str, folders: dict[str, Path], waves: list[torch.Tensor]) -> None:
    expert = UpstreamBuilder().build(parse(f"hf:{folders[name]}"))
    together = expert(waves)["hidden_states"]
    assert len(together) == 3
    for i, wave in enumerate(waves):
        for layer, alone in zip(together, expert([wave])["hidden_states"], strict=True):
            frames = -(-len(wave) // 320)
            assert alone.shape[1] == frames
            torch.testing.assert_close(layer[i, :frames], alone[0], rtol=1e-4, atol=1e-4)
            assert not layer[i, frames:].any()


@pytest.mark.parametrize(("name", "theirs"), [("hubert", "hf_hubert_custom"), ("hubert-large", "hf_hubert_custom"),
                                              ("wav2vec2", "hf_wav2vec2_custom"),
                                              ("wav2vec2-large", "hf_wav2vec2_custom")])  # fmt: skip
def test_equals_s3prls_own_upstream(
    name: str, theirs: str, folders: dict[str, Path], waves: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wave's features, through s3prl's wrapper, are equal to 1e-4, with the same number of frames."""
    import_patches.install()
    import s3prl.hub
    from s3prl.nn import S3PRLUpstream

    ours = UpstreamBuilder().build(parse(f"hf:{folders[name]}"))
    monkeypatch.setattr(s3prl.hub, "codecssl_test", lambda **options: ours, raising=False)
    upstreams = [S3PRLUpstream("codecssl_test"), S3PRLUpstream(theirs, str(folders[name]))]
    for wave in (w for w in waves if len(w) >= 800):  # s3prl itself fails where one frame must become two
        with torch.no_grad():
            mine, other = (u.eval()(wave[None], torch.tensor([len(wave)])) for u in upstreams)
        for a, b in zip(mine[0], other[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(a, b) for a, b in zip(mine[1], other[1], strict=True))


def test_hidden_states_match_the_docstring(folders: dict[str, Path], waves: list[torch.Tensor]) -> None:
    """Post-norm: 0 is normalised; pre-norm: 0 is not and the last one is. Each state leads to the next by its layer."""
    from transformers import AutoModel

    for name, first_is_normal, last_is_normal in [("hubert", True, True), ("hubert-large", False, True)]:
        model: Any = AutoModel.from_pretrained(folders[name]).eval()
        states = UpstreamBuilder().build(parse(f"hf:{folders[name]}"))(waves[:1])["hidden_states"]
        normal = [torch.allclose(s.mean(-1), torch.zeros(1), atol=1e-4) for s in states]
        assert (normal[0], normal[-1]) == (first_is_normal, last_is_normal)
        with torch.no_grad():
            frames = (len(waves[0]) - 400) // 320 + 1
            following = model.encoder.layers[0](states[0][:, :frames])[0]
        torch.testing.assert_close(following, states[1][:, :frames], rtol=1e-4, atol=1e-4)


def test_frozen_whatever_s3prl_calls(folders: dict[str, Path], waves: list[torch.Tensor]) -> None:
    expert = UpstreamBuilder().build(parse(f"hf:{folders['hubert']}"))
    first = expert(waves[:2])["hidden_states"][-1]
    expert.train()
    assert torch.equal(expert(waves[:2])["hidden_states"][-1], first)
    assert not list(expert.parameters())
    assert expert.to(torch.float64).frozen.dtype == torch.float64


def test_identity_follows_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folders["hubert"], tmp_path / "copy"))
    first = parse(f"hf:{copy}").identity()["sha256"]
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert first != parse(f"hf:{copy}").identity()["sha256"]


def test_without_a_preprocessor_waves_are_normalised(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folders["hubert"], tmp_path / "copy"))
    (copy / "preprocessor_config.json").unlink()
    loud = UpstreamBuilder().build(parse(f"hf:{copy}"))([torch.linspace(-1, 1, 4000)])["hidden_states"][-1]
    quiet = UpstreamBuilder().build(parse(f"hf:{copy}"))([torch.linspace(-0.1, 0.1, 4000)])["hidden_states"][-1]
    torch.testing.assert_close(loud, quiet, rtol=1e-3, atol=1e-3)


def test_other_checkpoints_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"a checkpoint of transformers; give hf:{folders['hubert']}"):
        parse(str(folders["hubert"]))
    with pytest.raises(UserError, match="upstream hf:/nowhere/at/all: cannot be loaded"):
        UpstreamBuilder().build(parse("hf:/nowhere/at/all"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="a bert, give one of hubert, wav2vec2, wavlm"):
        UpstreamBuilder().build(parse(f"hf:{tmp_path}"))


def test_why_s3prls_own_batches_are_not_taken(folders: dict[str, Path], waves: list[torch.Tensor]) -> None:
    """With group normalisation, s3prl's features depend on the longest wave of the batch. Ours do not."""
    import_patches.install()
    import s3prl.hub

    short, long = waves[0], waves[3]
    theirs: Any = s3prl.hub.hf_hubert_custom(str(folders["hubert"])).eval()
    frames = (len(short) - 400) // 320 + 1
    with torch.no_grad():
        alone, beside = (theirs(batch)["hidden_states"][-1][0, :frames] for batch in ([short], [short, long]))
    assert (alone - beside).abs().max() > 1e-2
