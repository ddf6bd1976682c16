"""The grid's layout, and the backend on a stand-in with the package's signatures: the real package is not needed."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from helpers import card, codes_of
from torch import nn

from codecssl.tokenize.backends import semanticodec
from codecssl.tokenize.backends.semanticodec import GRIDS, WINDOW, SemanticStream, to_rows, to_tokens, windows
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

ACOUSTIC = 64
JOINED = {100: (1, 1), 50: (1, 2), 25: (2, 2)}
"""By token rate: columns and bands of AudioMAE's 64 x 8 patches in a cell."""


def wave(samples, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / 16_000
    level = np.interp(t, np.linspace(0, samples / 16_000, 20), rng.uniform(0.1, 0.9, 20))
    tone = np.sin(2 * np.pi * np.cumsum(300 + 200 * np.sin(3 * t)) / 16_000)
    return torch.from_numpy((0.1 + level * (tone + 0.5 * rng.standard_normal(len(t)))).astype(np.float32))


# ---------------------------------------------------------------- the stand-in


def extract_kaldi_fbank_feature(waveform, sampling_rate, target_length=1024):
    """Frames of 400 samples every 160, each without its mean, 128 bins, zero rows at the end."""
    assert sampling_rate == 16_000
    frames = (waveform[0].double() - waveform.double().mean()).unfold(0, 400, 160)
    power = torch.fft.rfft(frames - frames.mean(1, keepdim=True), 512)[:, :256].abs().square()
    mel = (power.unflatten(1, (128, 2)).sum(2) + 1e-7).log()[:target_length]
    return {"ta_kaldi_fbank": torch.cat([mel, torch.zeros(target_length - len(mel), 128)]) / 9}


class FakeEncoder(nn.Module):
    def __init__(self, token_rate, centroids, state):
        super().__init__()
        self.columns, self.bands = JOINED[token_rate]
        self.centroid_npy, self.codebook_size, self.device = centroids.double(), ACOUSTIC, None
        self.acoustic = nn.Parameter(state["acoustic"].double())

    def forward(self, batch):
        assert batch.shape[-1] == 128
        assert batch.shape[-2] % 1024 == 0
        print("Traceback", file=sys.stderr)
        return torch.stack([torch.cat([self.tokens(w) for w in mel.split(1024)]) for mel in batch])

    def tokens(self, mel):
        context = mel.std()  # all tokens hang on the whole window
        patches = {(t, f): mel[16 * t : 16 * t + 16, 16 * f : 16 * f + 16] for t in range(64) for f in range(8)}
        found = []
        for column in range(64 // self.columns):
            for band in range(8 // self.bands):
                cell = [
                    patches[column * self.columns + i, band * self.bands + j].flatten().repeat(3)
                    for i in range(self.columns)
                    for j in range(self.bands)
                ]
                found.append(torch.cat(cell) + context)
        cells = torch.stack(found)
        semantic = torch.cdist(cells, self.centroid_npy.to(cells)).argmin(1)
        acoustic = (cells.abs().sum(1) * 997 + context * 9973).long() % ACOUSTIC
        return torch.stack([semantic, acoustic], dim=1)

    def unquant(self, tokens):
        return self.centroid_npy[tokens]

    def token_to_quantized_feature(self, tokens):
        assert len(tokens) == 1
        return torch.cat([self.acoustic[tokens[..., 1]], self.centroid_npy[tokens[..., 0]]], dim=-1)


class SemantiCodec(nn.Module):
    def __init__(
        self,
        token_rate,
        semantic_vocab_size,
        ddim_sample_step=50,
        cfg_scale=2.0,
        checkpoint_path=None,
        cache_path="pretrained",
    ):
        super().__init__()
        assert semantic_vocab_size in (4096, 8192, 16384, 32768), "must be a vocabulary of the package"
        print("Loading")
        self.token_rate, self.device = token_rate, torch.device("meta")
        folder = f"combine_{ {25: 128, 50: 256, 100: 512}[token_rate] }_audioset_dominate"
        codebook = f"{checkpoint_path}/codebook_idx/{folder}/codebook_{semantic_vocab_size // 2}_0.npy"
        state = torch.load(f"{checkpoint_path}/encoder.ckpt", map_location="cpu")
        self.encoder = FakeEncoder(token_rate, torch.from_numpy(np.load(codebook)), state)
        self.decoder = nn.Linear(1, 1)
        self.decoder.load_state_dict(torch.load(f"{checkpoint_path}/decoder.ckpt", map_location="cpu"))
        self.decoded = []

    def decode(self, tokens):
        self.decoded.append(tokens)
        samples = tokens.shape[1] * 2 * 16_000 // self.token_rate - 1  # one lost to rounding, as may happen
        return (torch.randn(1, 1, samples) + tokens.float().mean()).numpy()


@pytest.fixture(autouse=True)
def package(monkeypatch):
    main, utils = types.ModuleType("semanticodec"), types.ModuleType("semanticodec.utils")
    main.SemantiCodec, utils.extract_kaldi_fbank_feature = SemantiCodec, extract_kaldi_fbank_feature
    monkeypatch.setitem(sys.modules, "semanticodec", main)
    monkeypatch.setitem(sys.modules, "semanticodec.utils", utils)


def save(folder, width=768, entries=4096, seed=0):
    """Write a checkpoint with the hub's files. The semantic codebook is drawn from its own inputs."""
    torch.manual_seed(seed)
    grid = GRIDS[width]
    network = folder / f"semanticodec_tokenrate_{grid.token_rate}"
    codebook = folder / "codebook_idx" / grid.folder / f"codebook_{entries // 2}_0.npy"
    network.mkdir(parents=True, exist_ok=True)
    codebook.parent.mkdir(parents=True, exist_ok=True)
    patches = torch.randn(entries, width // 768, 1, 256).repeat(1, 1, 3, 1).flatten(1) * 0.3
    np.save(codebook, (patches + torch.rand(entries, 1) * 2 - 1).float().numpy())
    torch.save({"acoustic": torch.randn(ACOUSTIC, width)}, network / "encoder.ckpt")
    torch.save(nn.Linear(1, 1).state_dict(), network / "decoder.ckpt")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {width: save(tmp_path_factory.mktemp("semanticodec"), width) for width in GRIDS}


def load(folder, **options):
    return load_codec(f"semanticodec@{folder}", **options)


# ---------------------------------------------------------------- the grid


@pytest.mark.parametrize("bands", [1, 4, 8])
@pytest.mark.parametrize("codebooks", [1, 2])
@pytest.mark.parametrize("columns", [0, 1, 7])
def test_a_row_is_a_band_and_a_frame_a_column(bands, codebooks, columns):
    tokens = torch.randint(0, 9999, (columns * bands, codebooks))
    rows = to_rows(tokens, bands)
    assert rows.shape == (codebooks * bands, columns)
    for column in range(columns):
        for band in range(bands):
            for codebook in range(codebooks):
                assert rows[codebook * bands + band, column] == tokens[column * bands + band, codebook]
    assert torch.equal(to_tokens(rows, bands), tokens)


@pytest.mark.parametrize("width", GRIDS)
def test_the_grids_agree_with_the_rates(width):
    """token_rate counts both codes of a cell; a cell joins as many patches as its width."""
    grid, (columns, bands) = GRIDS[width], JOINED[GRIDS[width].token_rate]
    assert grid.token_rate * grid.hop_length == 2 * grid.bands * 16_000
    assert (grid.hop_length, grid.bands) == (2560 * columns, 8 // bands)
    assert width == 768 * columns * bands
    assert WINDOW % grid.hop_length == 0


@pytest.mark.parametrize(
    "samples", [1, 240, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 240, 2 * WINDOW, 2 * WINDOW + 241]
)
def test_windows_cover_the_wave_however_it_is_cut(samples):
    audio = torch.arange(1, samples + 1, dtype=torch.float32)
    whole = windows(audio)
    assert sum(window.samples for window in whole) == samples
    for at, window in zip(range(0, samples, WINDOW), whole, strict=True):
        assert window.samples == min(WINDOW, samples - at)
        # the package's spectrogram of a file reads on where a window is full
        seen = audio[at : at + WINDOW + (240 if window.samples == WINDOW else 0)]
        assert len(window.audio) == WINDOW + (240 if window.samples == WINDOW else 0)
        assert torch.equal(window.audio[: len(seen)], seen)
        assert not window.audio[len(seen) :].any()
    rng, found, at = np.random.default_rng(samples), [], 0
    no_codes = torch.zeros(1, 0, dtype=torch.int64)
    codec = types.SimpleNamespace(card=card([2]), device="cpu")
    codec.encode_windows = lambda given: found.extend(given) or [no_codes]
    stream = SemanticStream(codec)
    while at < samples:
        size = int(rng.integers(1, WINDOW))
        stream.push(audio[at : at + size])
        at += size
    stream.finish()
    assert [window.samples for window in found] == [window.samples for window in whole]
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(found, whole))


# ---------------------------------------------------------------- the codec


@pytest.mark.parametrize(
    ("width", "samples"),
    [
        *((768, n) for n in [1, 2559, 2560, 2561, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 240, 2 * WINDOW + 7]),
        *((1536, n) for n in [1, 40_000, WINDOW + 100]),
        *((3072, n) for n in [1, 5120, 5121, WINDOW + 100]),
    ],
)
def test_codes_are_those_of_the_whole_files_spectrogram(folders, width, samples):
    codec, audio = load(folders[width]), wave(samples)
    codes = codec.encode([audio])[0].codes
    assert codes.shape == (2 * GRIDS[width].bands, -(-samples // GRIDS[width].hop_length))
    assert codes.shape == (codec.card.num_rows, codec.card.frames_of(samples))
    assert torch.equal(codes, codec.encode_reference(audio))


def test_without_lookahead_a_windows_last_frames_would_be_wrong(folders, monkeypatch):
    codec, audio = load(folders[768]), wave(WINDOW + 100)
    monkeypatch.setattr(semanticodec, "LOOKAHEAD", 0)
    assert not torch.equal(codec.encode([audio])[0].codes, codec.encode_reference(audio))


@pytest.mark.parametrize("lanes", [1, 3])
def test_any_cut_of_the_stream_and_any_batch_give_the_same_codes(folders, lanes):
    """More lanes are how a GPU encodes."""
    alone, codec = load(folders[768]), load(folders[768])
    codec.lanes = lanes
    waves = [wave(n, seed) for seed, n in enumerate([1, 2561, WINDOW, WINDOW + 30_000])]
    for audio, codes in zip(waves, codes_of(codec, waves)):
        assert torch.equal(alone.encode([audio])[0].codes, codes)
        stream = codec.stream()
        pieces = [stream.push(part) for part in audio.split(70_001)]
        assert torch.equal(torch.cat([*pieces, stream.finish()], 1), codes)
        assert stream.finish().shape == (16, 0)
    assert len(codes[0].unique()) > 10  # the stand-in does tell things apart
    assert len(codes[8].unique()) > 10


def test_rows_and_latents_and_decoding_follow_the_packages_tokens(folders):
    codec, audio = load(folders[768]), wave(WINDOW)
    encoder, codes = codec.package.encoder, codec.encode([audio])[0].codes
    mel = extract_kaldi_fbank_feature(torch.cat([audio, torch.zeros(WINDOW)])[None], 16_000, 2048)["ta_kaldi_fbank"]
    tokens = encoder(mel[None])[:, :512]
    assert codes[3, 5] == tokens[0, 5 * 8 + 3, 0]
    assert codes[8 + 3, 5] == tokens[0, 5 * 8 + 3, 1]
    own = encoder.token_to_quantized_feature(tokens)[0].detach()  # [512, 2 D]
    latents = codec.latents(codes)
    assert latents.shape == (codec.card.latent_dim, 64)
    for column in (0, 17, 63):
        assert torch.equal(latents[:, column], own[8 * column : 8 * column + 8].flatten())
    state = torch.get_rng_state()
    decoded = codec.decode(codes)
    assert torch.equal(codec.package.decoded[-1], tokens)
    assert decoded.shape == (WINDOW,)
    assert decoded[-1] == 0  # the sample that the package leaves out
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(codec.decode(codes), decoded)
    assert codec.decode(codes[:, :0]).shape == (0,)


def test_one_codebook_is_the_semantic_one(folders):
    one, both, audio = load(folders[1536], num_codebooks=1), load(folders[1536]), wave(30_000)
    codes = one.encode([audio])[0].codes
    assert torch.equal(codes, both.encode([audio])[0].codes[:4])
    assert torch.equal(one.encode_reference(audio), codes)
    assert one.card.codebook_sizes == (4096,)
    latents = one.latents(codes)
    assert latents.shape == (one.card.latent_dim, codes.shape[1]) == (4 * 1536, 12)
    centroids = one.package.encoder.centroid_npy
    assert torch.equal(latents[:, 2], torch.cat([centroids[code] for code in codes[:, 2]]))
    with pytest.raises(UserError, match="decodes from 2 codebooks, 1 is kept"):
        one.decode(codes)


def test_there_are_no_tables_that_sum_to_the_latent(folders):
    with pytest.raises(UserError, match=r"16 codes side by side, 12288 numbers; .* would take 1\.6 GB"):
        load(folders[768]).embeddings()


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("width", GRIDS)
def test_the_codebook_determines_the_network(folders, width, capsys):
    codec, grid = load(folders[width]), GRIDS[width]
    card = codec.card
    assert codec.package.token_rate == grid.token_rate
    assert (card.sample_rate, card.hop_length) == (16_000, grid.hop_length)
    assert (card.codebook_sizes, card.codes_per_frame) == ((4096, ACOUSTIC), (grid.bands, grid.bands))
    assert math.isclose(card.bits_per_second, grid.token_rate / 2 * (12 + 6))
    assert card.weights == str(folders[width])
    assert CodecCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    assert codec.package.device == codec.package.encoder.device == torch.device("cpu")
    codec.encode([wave(100)])
    assert capsys.readouterr() == ("", "")


def test_the_sha256_covers_the_files_that_determine_codes(folders, tmp_path):
    before = load(folders[768]).card.weights_sha256
    save(tmp_path / "same")
    (tmp_path / "same" / "semanticodec_tokenrate_100" / "decoder.ckpt").unlink()
    torch.save(nn.Linear(1, 1).state_dict(), tmp_path / "same" / "semanticodec_tokenrate_100" / "decoder.ckpt")
    assert load(tmp_path / "same").card.weights_sha256 == before
    assert load(save(tmp_path / "other", seed=1)).card.weights_sha256 != before


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: next(root.rglob("encoder.ckpt")).unlink(), "holds 0 of encoder.ckpt, must be 1"),
        (lambda root: save(root, entries=8192), r"holds 2 of codebook_\*.npy, must be 1; give a folder with one"),
        (lambda root: np.save(next(root.rglob("*.npy")), np.zeros((4096, 512), "f4")), "entries of 512 numbers"),
        (lambda root: np.save(next(root.rglob("*.npy")), np.zeros((2048, 768), "f4")), r"\(no such vocabulary"),
        (lambda root: next(root.rglob("encoder.ckpt")).write_bytes(b"x" * 99), "not a checkpoint of semanticodec"),
        (lambda root: next(root.rglob("*.npy")).write_bytes(b"x" * 99), "not a semantic codebook"),
    ],
)
def test_another_checkpoint_is_refused(tmp_path, spoil, says):
    spoil(save(tmp_path))
    with pytest.raises(UserError, match=says):
        load(tmp_path)


def test_missing_weights_and_package_say_how_to_get_them(folders, monkeypatch):
    with pytest.raises(UserError, match="not shipped; install the semanticodec package"):
        load_codec("semanticodec")
    monkeypatch.setitem(sys.modules, "semanticodec", None)
    with pytest.raises(UserError, match="needs the semanticodec package .* install the semanticodec package"):
        load(folders[768])


@pytest.mark.parametrize("count", [0, 3])
def test_a_count_out_of_range_is_refused(folders, count):
    with pytest.raises(UserError, match=f"num_codebooks {count}: semanticodec has 1 to 2"):
        load(folders[768], num_codebooks=count)
