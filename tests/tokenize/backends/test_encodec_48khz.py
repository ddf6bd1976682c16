"""Our segments in blocks and groups against the encodec package's `encode` and `decode`."""

import functools

import numpy as np
import pytest
import random_models
import soundfile
import torch
import transformers
from encodec.model import EncodecModel
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.quantization import ResidualVectorQuantizer

from codecssl.tokenize.backends import encodec_48khz
from codecssl.tokenize.cli import main
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

SEGMENT, STRIDE, HOP = 48_000, 47_520, 320
LENGTHS = [1, 2, HOP - 1, HOP, HOP + 1, 641, STRIDE - 1, STRIDE, STRIDE + 1, SEGMENT - 1, SEGMENT, SEGMENT + 1]
LONG = 8 * STRIDE + 20_000  # 9 segments: more than a group


wave = random_models.stereo_wave


@functools.cache
def small_model():
    """The package's 48 kHz model, narrow: the same layers, segments and normalisation."""
    torch.manual_seed(0)
    shape = {"channels": 2, "dimension": 12, "n_filters": 4, "causal": False, "norm": "time_group_norm"}
    quantizer = ResidualVectorQuantizer(dimension=12, n_q=16, bins=64)
    encoder, decoder = SEANetEncoder(**shape), SEANetDecoder(**shape)
    model = EncodecModel(encoder, decoder, quantizer, [3.0], 48_000, 2, normalize=True, segment=1.0)
    model.eval().requires_grad_(False)
    for layer in quantizer.vq.layers:
        layer._codebook.inited.fill_(1)
    random_models.randomise_48khz(model, encoder, [layer._codebook.embed for layer in quantizer.vq.layers])
    return model


def as_codec(model, count=8, **pooled):
    net = encodec_48khz.from_encodec(model)
    return encodec_48khz.Encodec48Codec(
        net, encodec_48khz.make_card("encodec_48khz", "test", "0" * 64, net, count, "cpu"), **pooled
    )


@torch.inference_mode()
def package_codes(model, audio, count=8):
    """`EncodecModel.encode` of the whole wave: its segments' codes and scales one after another."""
    model.bandwidth = count * model.quantizer.get_bandwidth_per_quantizer(model.frame_rate)
    frames = model.encode(audio[None])
    return torch.cat([codes[0] for codes, _ in frames], dim=1), torch.cat([scale[0] for _, scale in frames]), frames


def streamed(codec, audio, seed=0):
    rng = np.random.default_rng(seed)
    stream, pieces, at = codec.stream(), [], 0
    while at < audio.shape[1]:
        size = int(rng.integers(0, 200_000))
        pieces.append(stream.push(audio[:, at : at + size]))
        at += size
    return torch.cat([*pieces, stream.finish()], dim=1), stream.scales


@pytest.mark.parametrize("samples", [*range(1, 12), 300, 641, 20_000, SEGMENT])
def test_latents_equal_the_packages_in_float64(samples):
    """In float64 rounding cannot hide a wrong row. The package pads the shortest waves in a special way."""
    model = small_model().double()
    try:
        audio = wave(samples, seed=samples).double()
        ours = as_codec(model).latents_of([audio])[0].t()
        torch.testing.assert_close(ours, model.encoder(audio[None])[0], rtol=0, atol=1e-10)
    finally:
        model.float()


@pytest.mark.parametrize("samples", [*LENGTHS, STRIDE + 161, 3 * STRIDE + 480, LONG])
def test_codes_and_scales_are_the_packages(samples):
    model = small_model()
    codec, audio = as_codec(model), wave(samples, seed=samples)
    own, scales, _ = package_codes(model, audio)
    [encoded] = codec.encode([audio])
    codes, found = encoded.codes, encoded.scales
    assert codes.dtype == torch.int64
    assert codes.shape == own.shape == (8, codec.card.frames_of(samples))
    assert (codes != own).float().mean() <= 0.001
    assert found.shape == (codec.card.segments_of(samples),)
    torch.testing.assert_close(found, scales, rtol=1e-6, atol=0)
    assert torch.equal(codec.encode_reference(audio), own)


@pytest.mark.parametrize("audio", [torch.zeros(2, 5000), torch.stack([wave(5000)[0], -wave(5000)[0]]), 30 * wave(400)])
def test_silence_opposite_sides_and_overdrive_give_the_packages_codes(audio):
    model = small_model()
    own, scales, _ = package_codes(model, audio)
    [encoded] = as_codec(model).encode([audio])
    codes, found = encoded.codes, encoded.scales
    assert (codes != own).float().mean() <= 0.01
    torch.testing.assert_close(found, scales, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pooled", [False, True])
def test_any_cut_and_any_batch_give_the_same_codes(pooled, monkeypatch):
    monkeypatch.setattr(encodec_48khz, "GROUP", 3)
    monkeypatch.setattr(encodec_48khz, "CUDA_GROUP", 4)
    codec = as_codec(small_model(), pooled=pooled)
    waves = [wave(n, seed=n) for n in [1, SEGMENT, 2 * STRIDE + 7, 6 * STRIDE + 480, HOP]]
    for audio, encoded in zip(waves, codec.encode(waves), strict=True):
        [alone] = codec.encode([audio])
        for codes, scales in ((encoded.codes, encoded.scales), streamed(codec, audio, seed=audio.shape[1])):
            assert torch.equal(codes, alone.codes)
            assert torch.equal(scales, alone.scales)


def test_pooled_segments_have_one_shape_for_any_number(monkeypatch):
    """Otherwise rounding depends on the number of segments."""
    monkeypatch.setattr(encodec_48khz, "CUDA_GROUP", 3)
    codec, shapes = as_codec(small_model(), pooled=True), []
    before, recur = codec.before, codec.lstm.forward
    monkeypatch.setattr(codec, "before", lambda x: shapes.append(x.shape) or before(x))
    monkeypatch.setattr(codec.lstm, "forward", lambda x: shapes.append(x.shape) or recur(x))
    codec.encode([wave(SEGMENT), wave(SEGMENT), wave(SEGMENT + STRIDE)])
    whole, cut, lstm = (3, SEGMENT, 2), (1, 480, 2), (150, 3, 64)
    assert shapes == [whole, cut, lstm, whole, cut, lstm, cut, lstm]


def test_pooling_changes_no_code():
    waves = [wave(n, seed=n) for n in (2 * STRIDE + 7, SEGMENT)]
    for alone, pooled in zip(as_codec(small_model()).encode(waves), as_codec(small_model(), pooled=True).encode(waves)):
        assert (alone.codes != pooled.codes).float().mean() <= 0.001


@pytest.mark.parametrize("samples", [1, 641, STRIDE, STRIDE + 1, SEGMENT, 3 * STRIDE + 20_000])
@pytest.mark.parametrize("scaled", [True, False])
def test_decode_is_the_packages_own(samples, scaled):
    model = small_model()
    own, scales, frames = package_codes(model, wave(samples))
    with torch.inference_mode():  # as ours: with gradients the LSTM is another one
        expected = model.decode([(codes, scale if scaled else None) for codes, scale in frames])[0]
    assert torch.equal(as_codec(model).decode(own, scales if scaled else None), expected)


def test_decode_gives_the_whole_segment_where_the_package_fails():
    """The last segment, of 1 frame, ends within the one before it."""
    model, codec = small_model(), as_codec(small_model())
    own, scales, frames = package_codes(model, wave(STRIDE + 200))
    with pytest.raises(RuntimeError, match="must match the size"):
        model.decode(frames)
    ours = codec.decode(own, scales)
    assert ours.shape == (2, SEGMENT)
    torch.testing.assert_close(ours[:, :STRIDE], model._decode_frame(frames[0])[0, :, :STRIDE])


def test_the_number_of_frames_determines_the_segments():
    codec = as_codec(small_model())
    for samples in [*range(1, 2 * SEGMENT, 53), *range(STRIDE - 5, SEGMENT + 5), *range(2 * STRIDE - 5, 2 * SEGMENT)]:
        lengths = [-(-min(SEGMENT, samples - at) // HOP) for at in range(0, samples, STRIDE)]
        assert codec._segment_frames_of(sum(lengths)) == lengths


def test_invalid_codes_are_refused():
    codec, codes = as_codec(small_model()), torch.zeros(8, 151, dtype=torch.int64)
    with pytest.raises(UserError, match="3 scales for 151 frames, which are 2 segments"):
        codec.decode(codes, torch.ones(3))
    with pytest.raises(UserError, match="0 frames: no wave has that many"):
        codec.decode(codes[:, :0])


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_codebooks_are_the_first_ones(count):
    audio = wave(60_000)
    fewer, more = as_codec(small_model(), count), as_codec(small_model(), 16)
    assert torch.equal(fewer.encode([audio])[0].codes, more.encode([audio])[0].codes[:count])
    assert torch.equal(fewer.encode_reference(audio), more.encode_reference(audio)[:count])


@pytest.mark.parametrize("count", [1, 8])
def test_embeddings_sum_to_the_codecs_own_latent(count):
    model, codes = small_model(), torch.randint(0, 64, (count, 50))
    codec = as_codec(model, count)
    own = model.quantizer.decode(codes[:, None])[0]
    torch.testing.assert_close(sum(t[c] for t, c in zip(codec.embeddings(), codes)).t(), own, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec.latents(codes), own, rtol=0, atol=1e-5)


def test_a_stereo_file_through_run_and_decode(tmp_path, monkeypatch):
    """Two segments with their scales in the shards; decode gives two channels, as long as the file."""
    codec, audio = as_codec(small_model(), 4), wave(STRIDE + 5000)
    soundfile.write(tmp_path / "a.wav", audio.numpy().T, 48_000, subtype="FLOAT")
    monkeypatch.setattr("codecssl.tokenize.encode.load_codec", lambda *args, **options: codec)
    monkeypatch.setattr("codecssl.tokenize.registry.load_codec_for", lambda *args, **options: codec)
    output, decoded = str(tmp_path / "out"), str(tmp_path / "b.wav")
    assert main(["run", str(tmp_path / "a.wav"), "--output", output, "--codec", "x", "--workers", "0"]) == 0
    assert main(["decode", output, "--id", "a.wav", "-o", decoded]) == 0
    [encoded] = codec.encode([audio])
    codes, scales = encoded.codes, encoded.scales
    heard, rate = soundfile.read(decoded, dtype="float32")
    assert rate == 48_000
    assert heard.shape == (audio.shape[1], 2)
    expected = codec.decode(codes, scales)[:, : audio.shape[1]].clamp(-1, 1 - 2**-15).numpy().T
    np.testing.assert_allclose(heard, expected, rtol=0, atol=2**-15)


def test_weights_in_the_hubs_format_load_and_agree_with_transformers(tmp_path):
    model, audio = random_models.encodec_48khz_model(), wave(3 * STRIDE + SEGMENT)
    model.save_pretrained(tmp_path)
    codec = load_codec(str(tmp_path), num_codebooks=4)
    card = codec.card
    assert (card.name, card.channels, card.hop_length, card.codebook_sizes) == ("encodec_48khz", 2, HOP, (1024,) * 4)
    assert (card.segment_samples, card.segment_stride) == (SEGMENT, STRIDE)
    assert CodecCard.from_dict(card.to_dict()) == card
    found = model.encode(audio[None], bandwidth=6.0)  # pads the codes of the last segment: 2 frames
    own = torch.cat([found.audio_codes[i, 0] for i in range(5)], dim=1)[:, : card.frames_of(audio.shape[1])]
    [encoded] = codec.encode([audio])
    codes, scales = encoded.codes, encoded.scales
    assert (codes != own).float().mean() <= 0.002
    torch.testing.assert_close(scales, torch.cat(found.audio_scales)[:, 0], rtol=1e-6, atol=0)
    assert torch.equal(codec.encode_reference(audio), own)
    ours = codec.decode(own, scales)
    theirs = model.decode(found.audio_codes, found.audio_scales, last_frame_pad_length=148).audio_values[0]
    torch.testing.assert_close(ours, theirs)


def test_the_packages_own_file_loads(tmp_path):
    torch.manual_seed(0)
    model = EncodecModel.encodec_model_48khz(pretrained=False).requires_grad_(False)
    for layer in model.quantizer.vq.layers:
        layer._codebook.inited.fill_(1)
    random_models.randomise_48khz(model, model.encoder, [layer._codebook.embed for layer in model.quantizer.vq.layers])
    torch.save(model.state_dict(), tmp_path / "encodec_48khz-test.th")
    codec, audio = load_codec(str(tmp_path / "encodec_48khz-test.th")), wave(10_000)
    assert codec.card.codebook_sizes == (1024,) * 8
    assert (codec.encode([audio])[0].codes != package_codes(model, audio)[0]).float().mean() <= 0.005
    with pytest.raises(UserError, match="num_codebooks 17: encodec_48khz has 1 to 16"):
        load_codec(str(tmp_path / "encodec_48khz-test.th"), num_codebooks=17)
    torch.save({"other": torch.zeros(1)}, tmp_path / "encodec_48khz-other.th")
    with pytest.raises(UserError, match="not the weights of encodec_48khz"):
        load_codec(str(tmp_path / "encodec_48khz-other.th"))


@pytest.mark.parametrize("changes", [{"audio_channels": 1}, {"norm_type": "weight_norm"}, {"sampling_rate": 24_000}])
def test_another_encodec_is_refused(tmp_path, changes):
    config = random_models.encodec_48khz_model().config
    config.update(changes)
    transformers.EncodecModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="encodec_48khz is stereo at 48000 Hz with group norm"):
        load_codec(f"encodec_48khz@{tmp_path}")


def test_missing_weights_say_how_to_get_them(monkeypatch, tmp_path):
    def offline(cls, source, **options):
        raise OSError("no net")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(transformers.EncodecModel, "from_pretrained", classmethod(offline))
    with pytest.raises(UserError, match="huggingface-cli download facebook/encodec_48khz"):
        load_codec("encodec_48khz")
