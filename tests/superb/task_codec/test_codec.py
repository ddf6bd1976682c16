"""A quantised model as a codec: pieces, prefixes, cards; on untrained weights."""

import dataclasses
import json
from importlib.metadata import entry_points

import pytest
import torch

from codecssl.superb.task_codec import codec as machine
from codecssl.superb.task_codec.bottleneck import Bottleneck, choose_bit_rate
from codecssl.superb.task_codec.codec_folder import QuantisedModel, save
from codecssl.superb.task_codec.rvq import RvqConfig
from codecssl.tokenize import registry
from codecssl.tokenize.backends import table
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec, load_codec_for


@pytest.fixture(scope="module")
def folder(shipped, shipped_model, tmp_path_factory):
    """Two codebooks of 64 at 12.5 Hz, after layer 1 of 2."""
    random = torch.Generator().manual_seed(0)
    bottleneck = Bottleneck(32, 4, RvqConfig(num_codebooks=2, codebook_size=64, codebook_dim=8))
    codes = shipped.encode([waves()[3]])[0].codes[None]
    bottleneck.fit(shipped_model.extract(codes, [codes.shape[2]])[1], [codes.shape[2]], random)
    path = tmp_path_factory.mktemp("machine") / "codec"
    save(
        QuantisedModel(shipped_model, 1, bottleneck, None, ()),
        path,
        choose_bit_rate(150, shipped.card, 12.5),
        {"training": {}},
    )
    return path


def waves():
    random = torch.Generator().manual_seed(1)
    lengths = (1, 1280, 5000, 16_000 * 7 + 123)
    return [0.3 * torch.randn(n, generator=random) * torch.linspace(0, 1, n) for n in lengths]


@pytest.fixture
def short_segments(monkeypatch):
    monkeypatch.setattr(machine, "WHOLE_SECONDS", 3)
    monkeypatch.setattr(machine, "SEGMENT_SECONDS", 2)


def test_loads_by_path_and_by_card(folder):
    codec = load_codec(str(folder))
    card = codec.card
    assert (card.name, card.codebook_sizes, float(card.frame_rate)) == ("machine", (64, 64), 12.5)
    assert card.bits_per_second == 150
    assert card.hop_length == 1280
    again = load_codec_for(card)
    assert again.card == card
    assert load_codec(f"machine@{folder}", num_codebooks=1).card.bits_per_second == 75


def test_batches_streams_and_single_waves_give_equal_codes(folder, short_segments):
    codec = load_codec(str(folder))
    together = codec.encode(waves())
    for wave, encoded in zip(waves(), together, strict=True):
        codes = encoded.codes
        assert codes.shape == (2, codec.card.frames_of(len(wave)))
        assert torch.equal(codec.encode([wave])[0].codes, codes)
        stream = codec.stream()
        pieces = [stream.push(piece) for piece in wave.split(7001)]
        assert torch.equal(torch.cat([*pieces, stream.finish()], dim=1), codes)


def test_long_waves_are_cut_into_segments(folder, short_segments):
    """7 s, 351 frames of the base codec: while more than 148 are left, 100 are taken, each as if it were alone."""
    codec, wave = load_codec(str(folder)), waves()[3]
    base = codec.base.encode([wave])[0].codes
    assert (base.shape[1], codec.whole, codec.segment) == (351, 148, 100)
    cuts = ((0, 100), (100, 200), (200, 300), (300, 351))
    parts = [codec.quantised.codes(base[:, a:b]) for a, b in cuts]
    assert torch.equal(codec.encode([wave])[0].codes, torch.cat(parts, dim=1))
    assert not torch.equal(codec.quantised.codes(base), torch.cat(parts, dim=1))


def test_latents_are_sums_of_embeddings(folder):
    codec = load_codec(str(folder))
    codes = codec.encode([waves()[2]])[0].codes
    tables = codec.embeddings()
    summed = torch.stack([table[row] for table, row in zip(tables, codes)]).sum(dim=0).T
    torch.testing.assert_close(codec.latents(codes), summed)
    assert summed.shape == (32, codes.shape[1])
    one = load_codec(str(folder), num_codebooks=1)
    assert torch.equal(one.encode([waves()[2]])[0].codes, codes[:1])
    torch.testing.assert_close(one.latents(codes[:1]), tables[0][codes[0]].T)


def test_decoding_a_task_codec_is_an_error(folder):
    codec = load_codec(str(folder))
    with pytest.raises(UserError, match="cannot be decoded to audio"):
        codec.decode(torch.zeros(2, 3, dtype=torch.int64))


def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="has no weights of its own; give the folder"):
        load_codec("machine")
    description = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="cannot be read .* make it again"):
        load_codec(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(description | {"version": 2}))
    with pytest.raises(UserError, match="version 2, this version reads 1"):
        load_codec(str(tmp_path))
    with pytest.raises(UserError, match="1 to 2"):
        load_codec(str(folder), num_codebooks=3)


def test_other_weights_are_another_codec(folder):
    card = dataclasses.replace(load_codec(str(folder)).card, weights_sha256="0" * 64)
    with pytest.raises(UserError, match="give the original weights"):
        load_codec_for(card)


def test_registers_through_its_entry_point(folder):
    [entry] = [entry for entry in entry_points(group=registry.GROUP) if entry.name == "machine"]
    assert entry.load().module == machine.__name__
    assert registry.identify(folder) == "machine"
    assert "machine" not in table.BACKENDS
