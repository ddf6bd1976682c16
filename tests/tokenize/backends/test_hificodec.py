"""Ours against the authors' code, and the groups, on random weights."""

import helpers
import pytest
import random_weights
import references
import torch

from codecssl.tokenize.backends.parts.residual_vq import ResidualQuantizer
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec


def test_codes_and_wave_are_those_of_the_authors_code(tmp_path, monkeypatch):
    """The width is that of the authors, with fewer residual blocks. Their encoder needs whole frames."""
    references.cloned("yangdongchao/AcademiCodec", monkeypatch)
    own = references.installed("academicodec.models.hificodec.models", "the clone")
    settings = {
        "resblock": "1", "upsample_rates": [8, 5, 4, 2], "upsample_kernel_sizes": [16, 11, 8, 4],
        "upsample_initial_channel": 32, "resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 3, 5]] * 2,
        "n_code_groups": 2, "n_codes": 64, "codebook_loss_lambda": 1.0, "commitment_loss_lambda": 0.25,
    }  # fmt: skip
    h = type("Settings", (), settings)
    state = random_weights.hificodec_state(channels=32)
    torch.save(state, tmp_path / "HiFi-Codec-24k-320d")
    codec = load_codec(str(tmp_path))
    assert (codec.card.name, codec.card.sample_rate) == ("hificodec_24khz", 24_000)
    encoder, quantizer, generator = own.Encoder(h), own.Quantizer(h), own.Generator(h)
    for part, module in (("encoder", encoder), ("quantizer", quantizer), ("generator", generator)):
        module.load_state_dict(state[part])
    for samples in (320, 3200, 16_000):
        wave = helpers.wave(samples, rate=16_000, levels=(0.1, 0.9))
        with torch.no_grad():
            _, _, indices = quantizer(encoder(wave[None, None]))
            expected = torch.stack(indices)
            decoded = generator(quantizer.embed(expected.t()[None]))[0, 0]
        assert torch.equal(codec.encode([wave])[0].codes, expected)
        torch.testing.assert_close(codec.decode(expected), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
def test_the_latent_is_the_groups_one_after_the_other(tmp_path, kept):
    """The reference sums each group's own entries. Rows are ordered by layer."""
    state = random_weights.hificodec_state()
    path = random_weights.write_hificodec(tmp_path)
    codec, quantizer = load_codec(str(path), num_codebooks=kept), state["quantizer"]
    codes = codec.encode([helpers.wave(9_000, rate=16_000)])[0].codes
    expected = torch.zeros(2, codes.shape[1], 64)
    for row, (module, group) in enumerate([(m, g) for m in ("", "2") for g in (0, 1)][:kept]):
        expected[group] += quantizer[f"quantizer_modules{module}.{group}.embedding.weight"][codes[row]]
    torch.testing.assert_close(codec.latents(codes), torch.cat([expected[0], expected[1]], 1).t(), rtol=0, atol=1e-6)
    assert [tuple(table.shape) for table in codec.entries()] == [(64, 64)] * kept
    whole = load_codec(str(path)).encode([helpers.wave(9_000, rate=16_000)])[0].codes
    assert torch.equal(codes, whole[:kept])


@pytest.mark.parametrize("groups", [1, 2])
def test_each_code_is_the_nearest_entry_to_the_residual(groups):
    """The reference is a float64 loop."""
    torch.manual_seed(0)
    tables, latents = torch.randn(4, 10, 6), torch.randn(6 * groups, 30)
    codes = ResidualQuantizer(tables, groups).quantize(latents)
    residual = latents.double().view(groups, 6, 30)
    for row, table in enumerate(tables.double()):
        for t in range(30):
            index = min(range(10), key=lambda v: float((residual[row % groups, :, t] - table[v]).norm()))
            assert codes[row, t] == index
            residual[row % groups, :, t] -= table[index]


def test_codebooks_that_do_not_fill_the_latent_are_refused(tmp_path):
    state = random_weights.hificodec_state()
    del state["quantizer"]["quantizer_modules2.1.embedding.weight"]
    torch.save(state, tmp_path / "HiFi-Codec-16k-320d")
    with pytest.raises(UserError, match="not 2 layers of groups"):
        load_codec(str(tmp_path))
