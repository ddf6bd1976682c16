"""DualCodec against its authors' package, on random weights, and its parts by hand."""

import sys
import types

import helpers
import pytest
import random_dualcodec
import references
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from codecssl.tokenize.backends import dualcodec
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

NAMES = list(random_dualcodec.RATES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Weights of each codec."""
    return {name: random_dualcodec.write(tmp_path_factory.mktemp(name), name=name) for name in NAMES}


def authors_inference(name, folder, monkeypatch):
    """The package's `Inference`, with its network in our narrow sizes and without autocast."""
    modules = types.ModuleType("audiotools.ml")
    modules.BaseModel = nn.Module
    monkeypatch.setitem(sys.modules, "audiotools", references._Stub("audiotools"))
    monkeypatch.setitem(sys.modules, "audiotools.ml", modules)
    package = references.installed("dualcodec", "pip install --no-deps dualcodec easydict einops", "cached_path")
    layers = references.installed("dualcodec.model_codec.cnn", "the same")
    convolution = references.installed("dualcodec.model_codec.dac_layers", "the same").WNConv1d
    rates = random_dualcodec.RATES[name]
    width, channels, latent_dim = random_dualcodec.WIDTH, random_dualcodec.CHANNELS, 2 * 2 ** len(rates)
    model = package.DualCodec(
        encoder_dim=2, encoder_rates=rates, decoder_dim=2 ** (len(rates) + 1), decoder_rates=rates[::-1], n_codebooks=3,
        codebook_size=64, semantic_codebook_size=100, sample_rate=24_000, convnext_dim=channels, is_causal=True,
        semantic_downsample_factor={"dualcodec_12hz": 4, "dualcodec_25hz": 2}[name],
    )  # fmt: skip
    blocks = [[layers.ConvNeXtBlock(channels, random_dualcodec.HIDDEN, is_causal=True) for _ in "12"] for _ in "12"]
    model.convnext_encoder = nn.Sequential(convolution(width, channels, 1), *blocks[0])
    model.convnext_decoder = nn.Sequential(*blocks[1], convolution(channels, latent_dim, 1))
    model.load_state_dict(load_file(folder / dualcodec.FILES[name]))
    statistics = torch.load(folder / dualcodec.STATISTICS)
    found = package.Inference.__new__(package.Inference)  # its constructor asks the hub
    found.model, found.device, found.autocast = model.eval(), "cpu", False
    found.semantic_cfg = references.installed("easydict", "the same").EasyDict(
        semantic_model=transformers.Wav2Vec2BertModel.from_pretrained(folder / dualcodec.SEMANTIC_FOLDER).eval(),
        feature_extractor=transformers.SeamlessM4TFeatureExtractor(padding_value=1.0),
        output_idx=17, mean=statistics["mean"], std=statistics["var"].sqrt(),
    )  # fmt: skip
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *kind, **options: autocast(*kind, **options | {"enabled": False}))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_wave_are_those_of_the_authors_package(name, folders, monkeypatch):
    """The reference runs in float32 on the padded wave, for 1 and for all codebooks."""
    theirs, codec = authors_inference(name, folders[name], monkeypatch), load_codec(str(folders[name]))
    hop = codec.card.hop_length
    for samples in (1, hop, 5 * hop + 7, 100_000):
        wave = helpers.wave(samples, samples, rate=24_000, levels=(0.1, 0.9))
        semantic, acoustic = theirs.encode(F.pad(wave, (0, -samples % hop + 360))[None, None], n_quantizers=4)
        codes = codec.encode([wave])[0].codes
        assert torch.equal(codes, torch.cat([semantic, acoustic], 1)[0])
        decoded, ours = theirs.decode(semantic, acoustic)[0, 0], codec.decode(codes)
        torch.testing.assert_close(ours[: len(decoded)], decoded, rtol=0, atol=1e-5)
        assert ours.shape == (codes.shape[1] * hop,)
        assert not ours[len(decoded) :].any()
    one = load_codec(str(folders[name]), num_codebooks=1)
    assert torch.equal(one.encode([wave])[0].codes, semantic[0])
    decoded = theirs.decode(semantic, None)[0, 0]
    torch.testing.assert_close(one.decode(codes[:1])[: len(decoded)], decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_any_batch_and_any_cut_give_the_same_codes(name, folders):
    """3 s whole, segments of 2 s."""
    codec = load_codec(f"{name}@{folders[name]}", num_codebooks=2)
    hop = codec.card.hop_length
    codes = helpers.check_any_batch_and_any_cut(codec, (1, hop, hop + 1, 90_000), rate=24_000)
    first = codec.encode([helpers.wave(90_000, 90_000, rate=24_000, levels=(0.1, 0.9))[:48_000]])[0].codes
    assert torch.equal(codes[:, : 48_000 // hop], first)


def test_the_acoustic_encoder_in_pieces_is_that_of_transformers_on_the_whole_wave(folders):
    codec = load_codec(str(folders["dualcodec_25hz"]))
    wave = helpers.wave(24_000, rate=24_000)
    found = codec.encode_latents(wave)[random_dualcodec.CHANNELS :]
    with torch.no_grad():
        expected = codec.network.dac.encoder(F.pad(wave, (0, 960))[None, None])[0, :, :25]
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_the_latent_is_the_semantic_vector_and_the_sum_of_the_acoustic_ones(folders, kept):
    """The reference multiplies the checkpoint's tensors in float64."""
    state = load_file(folders["dualcodec_12hz"] / dualcodec.FILES["dualcodec_12hz"])
    codec = load_codec(str(folders["dualcodec_12hz"]), num_codebooks=kept)
    codes = codec.encode([helpers.wave(40_000, rate=24_000, levels=(0.1, 0.9))])[0].codes
    stems = ["semantic_vq.quantizers.0", *(f"dac.quantizer.quantizers.{k}" for k in range(kept - 1))]
    vectors = []
    for stem, row in zip(stems, codes, strict=True):
        weight = state[f"{stem}.out_proj.weight_v"][..., 0].double()
        weight *= state[f"{stem}.out_proj.weight_g"][..., 0].double() / weight.norm(dim=1, keepdim=True)
        entries = state[f"{stem}.codebook.weight"].double()[row]
        vectors.append(entries @ weight.t() + state[f"{stem}.out_proj.bias"].double())
    parts = [vectors[0], sum(vectors[1:])] if kept > 1 else vectors
    expected = torch.cat(parts, 1).t()
    assert codec.card.latent_dim == len(expected)
    torch.testing.assert_close(codec.latents(codes).double(), expected, rtol=0, atol=1e-5)
    tables = codec.embeddings()
    summed = sum(table[row] for table, row in zip(tables, codes, strict=True))
    torch.testing.assert_close(summed.t(), codec.latents(codes), rtol=0, atol=1e-6)
    assert [tuple(table.shape) for table in codec.entries()] == [(100, 8), *[(64, 8)] * (kept - 1)]


def test_the_card_depends_on_all_three_files(folders, tmp_path):
    """Weights, statistics and w2v-BERT."""
    name = "dualcodec_12hz"
    before = {load_codec(str(folders[name])).card.fingerprint}
    for seed, changed in enumerate(("checkpoint", "statistics", "w2v-BERT"), start=1):
        folder = random_dualcodec.copied(folders[name], tmp_path / changed)
        if changed == "checkpoint":
            state = load_file(folder / dualcodec.FILES[name])
            state["convnext_encoder.1.norm.bias"] += 0.01
            save_file(state, folder / dualcodec.FILES[name])
        elif changed == "statistics":
            values = torch.load(folder / dualcodec.STATISTICS)
            torch.save(values | {"var": values["var"] * 1.01}, folder / dualcodec.STATISTICS)
        else:
            random_dualcodec.w2v_bert(seed).save_pretrained(folder / dualcodec.SEMANTIC_FOLDER)
        before.add(load_codec(str(folder)).card.fingerprint)
        assert len(before) == seed + 1


def test_other_files_are_refused(folders, tmp_path):
    name = "dualcodec_12hz"
    with pytest.raises(UserError, match="huggingface-cli download amphion/dualcodec"):
        load_codec(f"{name}@{tmp_path}")
    folder = random_dualcodec.copied(folders[name], tmp_path / "copy")
    path, statistics = folder / dualcodec.FILES[name], folder / dualcodec.STATISTICS
    state, values = load_file(path), torch.load(statistics)
    for missing, says in (
        ("convnext_encoder.2.norm.bias", "lacks convnext_encoder.2.norm.bias"),
        ("dac.decoder.model.2.block.1.weight_g", "KeyError"),
        ("dac.quantizer.quantizers.1.codebook.weight", "not the weights of dualcodec_12hz"),
    ):
        save_file({key: value for key, value in state.items() if key != missing}, path)
        with pytest.raises(UserError, match=says):
            load_codec(f"{name}@{folder}")
    save_file(state, path)
    torch.save({key: value[:4] for key, value in values.items()}, statistics)
    with pytest.raises(UserError, match="reads 16 channels of w2v-BERT, which has 16, with statistics of 4"):
        load_codec(f"{name}@{folder}")
    torch.save(values, statistics)
    path.rename(other := folder / dualcodec.FILES["dualcodec_25hz"])
    with pytest.raises(UserError, match="1920 samples per frame, dualcodec_25hz has 960"):
        load_codec(str(other))
    statistics.unlink()
    with pytest.raises(UserError, match=f"no weights at .*{dualcodec.STATISTICS}"):
        load_codec(str(other))
