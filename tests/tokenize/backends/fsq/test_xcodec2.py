"""X-codec2 and NeuCodec against their authors' packages, on random weights; finite scalar quantization by hand."""

import sys
import types

import helpers
import pytest
import random_weights
import references
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from codecssl.tokenize.backends.parts.fsq import FiniteScalarQuantizer
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

INSTALL = "pip install --no-deps {} vector-quantize-pytorch==1.17.8 einx"


class Rotary(nn.Module):
    """torchtune's interface: [b, s, h, d] are rotated by s. The packages pass [b, h, s, d]."""

    def __init__(self, dim):
        super().__init__()
        self.frequencies = 10_000.0 ** (-torch.arange(0, dim, 2) / dim)

    def forward(self, x):
        angles = torch.arange(x.shape[1])[:, None] * self.frequencies
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones(()), angles)[None, :, None]).flatten(-2)


@pytest.fixture
def torchtune(monkeypatch):
    """The one class of torchtune that the packages use; it needs another torch to be imported."""
    modules = types.ModuleType("torchtune.modules")
    modules.RotaryPositionalEmbeddings = Rotary
    monkeypatch.setitem(sys.modules, "torchtune", types.ModuleType("torchtune"))
    monkeypatch.setitem(sys.modules, "torchtune.modules", modules)


def parts(package, state, hop):
    """The package's own modules with these weights and widths, except for widths that the package fixes."""
    encoder = references.installed(
        f"{package}.codec_encoder", INSTALL.format(package.partition(".")[0]), "neucodec.model"
    )
    decoder = references.installed(f"{package}.codec_decoder_vocos", "the same")
    semantic = references.installed(f"{package}.module", "the same").SemanticEncoder(16, 16, 16)
    kind = getattr(encoder, "CodecEncoder_Transformer", None) or encoder.CodecEncoder
    acoustic = kind(ngf=2, hidden_dim=64)
    generator = decoder.CodecDecoderVocos(hidden_dim=64, depth=2, heads=1, hop_length=hop, vq_dim=80)
    modules = {"SemanticEncoder_module": semantic, "CodecEnc": acoustic, "generator": generator}
    for name, module in modules.items():
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        module.load_state_dict(own)
        module.eval()
    return semantic, acoustic, generator


@pytest.mark.parametrize(("name", "package"), [("xcodec2", "xcodec2.vq"), ("neucodec", "neucodec")])
def test_codes_and_wave_are_those_of_the_authors_packages(name, package, tmp_path, torchtune):
    """The packages' modules, joined as in their encode_code and decode_code, which load w2v-BERT from the hub."""
    folder = random_weights.WRITERS[name](tmp_path)
    codec = load_codec(f"{name}@{folder}")
    if name == "xcodec2":
        state, hop, margin = load_file(folder / "model.safetensors"), 320, 160
    else:
        state, hop, margin = torch.load(folder / "pytorch_model.bin"), 480, 0
    semantic, acoustic, generator = parts(package, state, hop)
    model = codec.network.semantic_model
    bank = transformers.SeamlessM4TFeatureExtractor(padding_value=1.0)
    for samples in (320, 3200, 8320):
        wave = helpers.wave(samples, rate=16_000, levels=(0.1, 0.9))
        padded = nn.functional.pad(wave, (0, 320))  # a multiple of the hop gets a whole frame
        with torch.no_grad():
            features = bank(nn.functional.pad(padded, (margin, margin)), sampling_rate=16_000, return_tensors="pt")
            hidden = model(features.input_features, output_hidden_states=True).hidden_states[16]
            one, two = semantic(hidden.transpose(1, 2)), acoustic(padded[None, None]).transpose(1, 2)
            length = min(one.shape[2], two.shape[2])
            both = torch.cat([one[..., :length], two[..., :length]], 1).transpose(1, 2)
            joined = nn.functional.linear(both, state["fc_prior.weight"], state["fc_prior.bias"])
            expected = generator(joined.transpose(1, 2), vq=True)[1][0, :, : samples // 320]
            levels = generator.quantizer.get_output_from_indices(expected.t()[None])
            hidden = nn.functional.linear(levels, state["fc_post_a.weight"], state["fc_post_a.bias"])
            decoded = generator(hidden, vq=False)[0][0, 0]
        assert torch.equal(codec.encode([wave])[0].codes, expected)
        if name == "xcodec2":
            torch.testing.assert_close(codec.decode(expected), decoded, rtol=0, atol=1e-5)
        else:
            assert codec.decode(expected).shape == (samples,)
            hidden = codec.network.fc_post_a(codec.network.generator.quantizer.project_out(codec.latents(expected).t()))
            ours = codec.network.generator.head(codec.network.generator.backbone(hidden[None]))[0]
            torch.testing.assert_close(ours, decoded, rtol=0, atol=1e-5)


def test_levels_and_codes_by_hand():
    """Two channels with 4 levels: -1, -0.5, 0 and 0.5. The first channel is the least significant digit."""
    quantizer = FiniteScalarQuantizer(2, 4)
    assert quantizer.size == 16
    assert quantizer.dequantize(torch.tensor([[0, 1, 4, 15]])).t().tolist() == [
        [-1, -1],
        [-0.5, -1],
        [-1, -0.5],
        [0.5, 0.5],
    ]
    assert quantizer.quantize(torch.tensor([[-9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])).tolist() == [[0, 3, 12]]
    [table] = quantizer.embeddings()
    assert torch.equal(table, quantizer.dequantize(torch.arange(16)[None]).t())


@pytest.mark.parametrize("name", ["xcodec2", "neucodec"])
def test_any_batch_and_any_cut_give_the_same_codes(name, tmp_path):
    """3 s whole, segments of 2 s."""
    codec = load_codec(f"{name}@{random_weights.WRITERS[name](tmp_path)}")
    codes = helpers.check_any_batch_and_any_cut(codec, (1, 320, 700, 48_500))
    [table] = codec.embeddings()
    assert table.shape == (65_536, 8)
    assert torch.equal(table[codes[0]].t(), codec.latents(codes))
    decoded = codec.decode(codes[:, :20])
    assert decoded.shape == (20 * 320,)
    assert decoded.std() > 0


def test_another_checkpoint_is_refused(tmp_path):
    state = random_weights.xcodec2_state()
    del state["generator.backbone.embed.weight"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="not the weights of neucodec .*lacks generator.backbone.embed.weight"):
        load_codec(f"neucodec@{tmp_path}")
