"""SemantiCodec's grid, and its encoder on random weights: against the authors' code and against one written here.

The reference of this file takes the network from transformers' ViT and Kaldi's spectrogram of the whole file from
torchaudio; the LSTM and the nearest entries are float64 loops.
"""

import json
import math
import sys
import types

import helpers
import numpy as np
import pytest
import random_weights
import references
import torch
import torchaudio
import transformers
from torch.nn import functional as F

from codecssl.tokenize.backends.semanticodec import codec as backend
from codecssl.tokenize.backends.semanticodec import grid as layout
from codecssl.tokenize.backends.semanticodec.audiomae import log_mel
from codecssl.tokenize.backends.semanticodec.codec import SemanticStream
from codecssl.tokenize.backends.semanticodec.encoder import SemanticEncoder
from codecssl.tokenize.backends.semanticodec.grid import GRIDS, WINDOW, to_rows, to_tokens, windows
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec

wave = random_weights.semantic_wave


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of random weights for each number of patches in a cell."""
    return {
        joined: random_weights.write_semanticodec(tmp_path_factory.mktemp("semanticodec"), joined=joined)
        for joined in GRIDS
    }


def load(folder, **options):
    return load_codec(str(folder), **options)


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


@pytest.mark.parametrize("joined", GRIDS)
def test_a_cell_joins_neighbouring_patches(joined):
    """Columns, then bands, then the patches of a cell in the same order; token_rate counts both codes of a cell."""
    grid = GRIDS[joined]
    patches = torch.arange(64 * 8).view(1, 64, 8, 1)
    columns, bands = grid.columns, grid.bands
    expected = [
        [(column * columns + i) * 8 + band * bands + j for i in range(columns) for j in range(bands)]
        for column in range(64 // columns)
        for band in range(8 // bands)
    ]
    assert grid.join(patches)[0].tolist() == expected
    assert grid.token_rate * grid.hop_length == 2 * grid.cells * 16_000
    assert joined == columns * bands
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
        # the spectrogram of the whole file reads on where a window is full
        seen = audio[at : at + WINDOW + (240 if window.samples == WINDOW else 0)]
        assert len(window.audio) == WINDOW + (240 if window.samples == WINDOW else 0)
        assert torch.equal(window.audio[: len(seen)], seen)
        assert not window.audio[len(seen) :].any()
    rng, found, at = np.random.default_rng(samples), [], 0
    no_codes = torch.zeros(1, 0, dtype=torch.int64)
    codec = types.SimpleNamespace(card=helpers.card([2]), device="cpu")
    codec.encode_windows = lambda given: found.extend(given) or [no_codes]
    stream = SemanticStream(codec)
    while at < samples:
        size = int(rng.integers(1, WINDOW))
        stream.push(audio[at : at + size])
        at += size
    stream.finish()
    assert [window.samples for window in found] == [window.samples for window in whole]
    assert all(torch.equal(a.audio, b.audio) for a, b in zip(found, whole))


# ---------------------------------------------------------------- the spectrogram


def kaldi_frame(samples):
    """Log-mel energies of 400 samples in float64, as Kaldi's manual has them for these options."""
    samples = samples.astype(np.float64) - samples.astype(np.float64).mean()
    emphasized = samples - 0.97 * np.concatenate([samples[:1], samples[:-1]])
    power = np.abs(np.fft.rfft(emphasized * np.hanning(400), 512)) ** 2
    mel = lambda hz: 1127.0 * np.log(1.0 + hz / 700.0)  # noqa: E731
    edges, energies = np.linspace(mel(20.0), mel(8000.0), 130), []
    bins = mel(np.arange(256) * 16_000 / 512)
    for low, centre, high in zip(edges, edges[1:], edges[2:]):
        weights = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
        energies.append((weights * power[:256]).sum())
    return np.log(np.maximum(energies, np.finfo(np.float32).eps))


def test_mel_frames_are_kaldis():
    audio = wave(40_000, 3)
    mel = log_mel(audio)
    assert mel.shape == (1024, 128)
    for frame in (0, 1, 100, 247):
        expected = (kaldi_frame(audio[160 * frame : 160 * frame + 400].numpy()) + 4.2677393) / (4.5689974 * 2)
        np.testing.assert_allclose(mel[frame], expected, atol=2e-4)
    assert (mel[(40_000 - 400) // 160 + 1 :] == 4.2677393 / (4.5689974 * 2)).all()


# ---------------------------------------------------------------- the encoder


class Reference:
    """The published encoder on a checkpoint's tensors, in other words."""

    def __init__(self, state, centroids, joined):
        self.state, self.grid = {key: value.double() for key, value in state.items()}, GRIDS[joined]
        self.tables = centroids.double().numpy(), self.state["quantizer._codebook.embed"][0].numpy()
        self.mae = self.vit(state)

    @staticmethod
    def vit(state):
        state = {key.removeprefix("audiomae.model."): value for key, value in state.items() if "audiomae" in key}
        width = len(state["norm.weight"])
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        config = transformers.ViTConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, intermediate_size=4 * width,
            layer_norm_eps=1e-6, image_size=(1024, 128), patch_size=16, num_channels=1, qkv_bias=True,
        )  # fmt: skip
        model = transformers.ViTModel(config, add_pooling_layer=False).double().eval()
        renamed = {
            "embeddings.cls_token": state["cls_token"],
            "embeddings.position_embeddings": state["pos_embed"],
            "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
            "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
            "layernorm.weight": state["norm.weight"],
            "layernorm.bias": state["norm.bias"],
        }
        parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
        parts |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
        for block in range(depth):
            ours, theirs = f"blocks.{block}.", f"encoder.layer.{block}."
            for kind in ("weight", "bias"):
                for part, name in zip(("query", "key", "value"), state[f"{ours}attn.qkv.{kind}"].chunk(3)):
                    renamed[f"{theirs}attention.attention.{part}.{kind}"] = name
                renamed |= {f"{theirs}{b}.{kind}": state[f"{ours}{a}.{kind}"] for a, b in parts.items()}
        model.load_state_dict(renamed)
        return model

    def features(self, mels):
        """Mean of the last layers at each patch, [columns, bands, W]."""
        with torch.no_grad():
            outputs = self.mae(mels[None, None].double(), output_hidden_states=True)
            averaged = [self.mae.layernorm(hidden) for hidden in outputs.hidden_states[10:]]
        return torch.stack(averaged).mean(0)[0, 1:].view(64, 8, -1)

    def lstm(self, inputs):
        layer = 0
        while f"encoder.bias_ih_l{layer}" in self.state:
            ways = []
            for way, order in (("", slice(None)), ("_reverse", slice(None, None, -1))):
                w, r, b, c = (
                    self.state[f"encoder.{name}_l{layer}{way}"].numpy()
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                hidden, cell, found = np.zeros(r.shape[1]), np.zeros(r.shape[1]), []
                for x in inputs[order] @ w.T:
                    i, f, g, o = np.split(x + b + r @ hidden + c, 4)
                    cell = cell / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i))
                    hidden = np.tanh(cell) / (1 + np.exp(-o))
                    found.append(hidden)
                ways.append(np.stack(found)[order])
            inputs, layer = np.concatenate(ways, axis=1), layer + 1
        return inputs

    def tokens(self, mels):
        """Codes of a spectrogram [1024, 128]."""
        patches, (centroids, acoustic), grid = self.features(mels), self.tables, self.grid
        cells = [
            torch.cat(
                [
                    patches[column + i, band + j]
                    for i in range(grid.columns)
                    for j in range(grid.bands)
                ]
            )
            for column in range(0, 64, grid.columns)
            for band in range(0, 8, grid.bands)
        ]  # fmt: skip
        features = torch.stack(cells).numpy()
        semantic = [int(((centroids - x) ** 2).sum(1).argmin()) for x in features]
        inputs = np.concatenate([features, centroids[semantic]], axis=1)
        audible = [frame for frame in range(1024) if float(mels[frame].max() - mels[frame].min()) > 1e-6]
        end = audible[-1] + 1 if len(audible) > 1 else 0
        inputs[math.ceil(len(inputs) * end / 1024) :] = -1
        residual = self.lstm(inputs) @ self.state["encoder_output_linear.weight"].numpy().T
        return torch.tensor([semantic, [int(((acoustic - x) ** 2).sum(1).argmin()) for x in residual]]).t()

    def encode(self, audio):
        """Tokens [columns * bands, 2] of a whole file: one spectrogram, then cut into windows."""
        samples, count = len(audio), len(audio) // WINDOW + 1  # an empty window if the file fills its windows
        audio = F.pad(audio, (0, count * WINDOW - len(audio)))
        mels = torchaudio.compliance.kaldi.fbank(
            (audio - audio.mean())[None], htk_compat=True, sample_frequency=16_000, use_energy=False,
            window_type="hanning", num_mel_bins=128, dither=0.0, frame_shift=10,
        )  # fmt: skip
        mels = (F.pad(mels, (0, 0, 0, 1024 * count - len(mels))) + 4.2677393) / (4.5689974 * 2)
        return torch.cat([self.tokens(window) for window in mels.split(1024)[: -(-samples // WINDOW)]])


@pytest.mark.parametrize(
    ("joined", "samples"),
    [
        *((1, n) for n in (1, 399, 561, 2561, 100_000, WINDOW + 30_000)),
        *((2, n) for n in (40_000, WINDOW)),
        (4, 5121),
    ],
)
def test_codes_are_those_of_the_whole_files_spectrogram(folders, joined, samples):
    codec, audio, grid = load(folders[joined]), wave(samples, samples), GRIDS[joined]
    codes = codec.encode([audio])[0].codes
    assert codes.shape == (2 * grid.cells, -(-samples // grid.hop_length))
    assert codes.shape == (codec.card.num_rows, codec.card.frames_of(samples))
    state, centroids = random_weights.semanticodec_state(joined=joined)
    expected = Reference(state, centroids, joined).encode(audio)
    different = (codes != to_rows(expected, grid.cells)[:, : codes.shape[1]]).double().mean()
    assert different <= 0.01, "only a nearest entry that is nearly tied may differ between float32 and float64"


def test_the_mean_is_over_three_blocks_of_a_vit_b():
    """The reference is transformers' ViT in float64, with two heads and the published depth."""
    state, centroids = random_weights.semanticodec_state(width=128, depth=12, sizes=(20, 20))
    encoder = SemanticEncoder(state, centroids)
    encoder.audiomae.load_state_dict(
        {k.removeprefix("audiomae.model."): v for k, v in state.items() if k.startswith("audiomae")}
    )
    mels = log_mel(wave(90_000))
    with torch.no_grad():
        found = encoder.audiomae(mels[None])[0]
    expected = Reference.vit(state)
    with torch.no_grad():
        hidden = expected(mels[None, None].double(), output_hidden_states=True).hidden_states
        mean = sum(expected.layernorm(hidden[block]) for block in (10, 11, 12)) / 3
    torch.testing.assert_close(found.flatten(0, 1).double(), mean[0, 1:], rtol=0, atol=2e-4)


def test_codes_are_those_of_the_authors_code(tmp_path, monkeypatch):
    """AudioMAE of the published size; few entries and one LSTM layer."""
    clone = references.cloned("haoheliu/SemantiCodec-inference", monkeypatch)
    package = types.ModuleType("semanticodec")  # its __init__ imports the decoder
    package.__path__ = [str(clone / "semanticodec")]
    monkeypatch.setitem(sys.modules, "semanticodec", package)
    own = references.installed(
        "semanticodec.modules.encoder.encoder",
        "pip install --no-deps timm vector-quantize-pytorch einx einops frozendict",
    )
    folder = random_weights.write_semanticodec(tmp_path, joined=1, width=768, depth=12, layers=1)
    codec = load(folder)
    files = backend.SemanticWeights.find("semanticodec", str(folder))
    theirs = own.AudioMAEConditionQuantResEncoder(
        centroid_npy_path=files.codebook, feature_dimension=768, codebook_size=80, lstm_layer=1
    ).eval()
    state = torch.load(files.encoder)
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("decoder" in key or "mask_token" in key or key == "quantizer.zero" for key in missing.missing_keys)
    for samples in (1, 560, 30_000, WINDOW + 500):
        audio = wave(samples, samples)
        count = samples // WINDOW + 1
        padded = F.pad(audio, (0, count * WINDOW - samples))[None]
        mel = own.extract_kaldi_fbank_feature(padded, 16_000, target_length=1024 * count)["ta_kaldi_fbank"]
        with torch.no_grad():
            tokens = theirs(mel[None])
            latents = theirs.token_to_quantized_feature(tokens[:, :8])[0]
        codes = codec.encode([audio])[0].codes
        assert torch.equal(codes, to_rows(tokens[0], 8)[:, : codes.shape[1]])
        assert torch.equal(codec.latents(codes[:, :1])[:, 0], latents.flatten())


def test_without_lookahead_a_windows_last_frames_would_be_wrong(folders, monkeypatch):
    codec, audio = load(folders[1]), wave(WINDOW + 100)
    right = codec.encode([audio])[0].codes
    monkeypatch.setattr(layout, "LOOKAHEAD", 0)
    assert not torch.equal(codec.encode([audio])[0].codes, right)


@pytest.mark.parametrize("lanes", [1, 3])
def test_any_cut_of_the_stream_and_any_batch_give_the_same_codes(folders, lanes):
    """More lanes are how a GPU encodes."""
    alone, codec = load(folders[1]), load(folders[1])
    codec.lanes = lanes
    waves = [wave(n, seed) for seed, n in enumerate([1, 2561, WINDOW, WINDOW + 30_000])]
    for audio, codes in zip(waves, helpers.codes_of(codec, waves)):
        assert torch.equal(alone.encode([audio])[0].codes, codes)
        stream = codec.stream()
        pieces = [stream.push(part) for part in audio.split(70_001)]
        assert torch.equal(torch.cat([*pieces, stream.finish()], 1), codes)
        assert stream.finish().shape == (16, 0)
    assert len(codes[:8].unique()) > 50  # the codes depend on the audio
    assert len(codes[8:].unique()) > 20


def test_latents_are_the_vectors_of_a_column_side_by_side(folders):
    codec = load(folders[2])
    codes = codec.encode([wave(60_000)])[0].codes
    latents = codec.latents(codes)
    assert latents.shape == (codec.card.latent_dim, codes.shape[1]) == (4 * 2 * 128, 24)
    centroids, acoustic = codec.encoder.centroids, codec.encoder.acoustic
    for column in (0, 11, 23):
        vectors = [torch.cat([acoustic[codes[4 + band, column]], centroids[codes[band, column]]]) for band in range(4)]
        assert torch.equal(latents[:, column], torch.cat(vectors))
    assert codec.latents(codes[:, :0]).shape == (1024, 0)


def test_one_codebook_is_the_semantic_one(folders):
    one, both, audio = load(folders[2], num_codebooks=1), load(folders[2]), wave(30_000)
    codes = one.encode([audio])[0].codes
    assert torch.equal(codes, both.encode([audio])[0].codes[:4])
    assert one.card.codebook_sizes == (300,)
    latents = one.latents(codes)
    assert latents.shape == (one.card.latent_dim, codes.shape[1]) == (4 * 128, 12)
    assert torch.equal(latents[:, 2], torch.cat([one.encoder.centroids[code] for code in codes[:, 2]]))


def test_it_does_not_decode_and_has_no_tables_that_sum_to_the_latent(folders):
    codec = load(folders[1])
    with pytest.raises(UserError, match=r"semanticodec: encodes only; .*to_tokens\(codes, 8\)\[None\]"):
        codec.decode(torch.zeros(16, 2, dtype=torch.int64))
    with pytest.raises(UserError, match=r"16 codes side by side, 1024 numbers; .* would take 0\.0 GB"):
        codec.embeddings()


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("joined", GRIDS)
def test_the_checkpoint_determines_the_network(folders, joined):
    codec, grid = load(folders[joined]), GRIDS[joined]
    card = codec.card
    assert card.name == "semanticodec"
    assert (card.sample_rate, card.hop_length) == (16_000, grid.hop_length)
    assert (card.codebook_sizes, card.codes_per_frame) == ((300, 80), (grid.cells, grid.cells))
    assert math.isclose(card.bits_per_second, grid.token_rate / 2 * (9 + 7))
    assert CodecCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


@pytest.mark.parametrize(("joined", "layers"), [(1, 4), (2, 3), (4, 2)])
def test_the_published_sizes_are_accepted(joined, layers):
    """Shapes of the published state dicts, without memory for them."""
    dim = 768 * joined
    with torch.device("meta"):
        state = {"audiomae.model.patch_embed.proj.bias": torch.zeros(768)}
        state |= {f"audiomae.model.blocks.{n}.norm1.bias": torch.zeros(768) for n in range(12)}
        state |= {f"encoder.bias_ih_l{n}{way}": torch.zeros(8 * dim) for n in range(layers) for way in ("", "_reverse")}
        state |= {"quantizer._codebook.embed": torch.zeros(1, 8192, dim)}
        network = SemanticEncoder(state, torch.zeros(16_384, dim))
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes["audiomae.patch_embed.proj.weight"] == (768, 1, 16, 16)
    assert shapes["audiomae.pos_embed"] == (1, 513, 768)
    assert shapes["audiomae.blocks.11.mlp.fc1.weight"] == (3072, 768)
    assert shapes["audiomae.blocks.0.attn.qkv.weight"] == (2304, 768)
    assert shapes["encoder.weight_ih_l0"] == (8 * dim, 2 * dim)
    assert shapes[f"encoder.weight_hh_l{layers - 1}_reverse"] == (8 * dim, 2 * dim)
    assert shapes["encoder_output_linear.weight"] == (dim, 4 * dim)
    vit_b = sum(p.numel() for p in network.audiomae.parameters())
    assert vit_b == 12 * (12 * 768**2 + 13 * 768) + 768 * 256 + 768 + 514 * 768 + 2 * 768


def test_the_sha256_covers_both_files(folders, tmp_path):
    before = load(folders[1]).card.weights_sha256
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
    assert load(random_weights.write_semanticodec(tmp_path / "same")).card.weights_sha256 == before
    path = next((tmp_path / "same").rglob("*.npy"))
    np.save(path, np.load(path) * 2)
    assert load(tmp_path / "same").card.weights_sha256 != before
    assert load(random_weights.write_semanticodec(tmp_path / "other", seed=1)).card.weights_sha256 != before


def rewrite(root, **tensors):
    path = next(root.rglob("encoder.ckpt"))
    state = torch.load(path) | {key.replace("__", "."): value for key, value in tensors.items()}
    torch.save({key: value for key, value in state.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: next(root.rglob("*.npy")).unlink(), r"holds 0 of codebook_\*.npy, must be 1; give a folder with"),
        (lambda root: random_weights.write_semanticodec(root, sizes=(20, 9)), r"holds 2 of codebook_\*.npy"),
        (lambda root: np.save(next(root.rglob("*.npy")), np.zeros((40, 50), "f4")), "centroids of 50 numbers"),
        (lambda root: np.save(next(root.rglob("*.npy")), np.zeros(40, "f4")), r"an array \[40\]"),
        (lambda root: np.save(next(root.rglob("*.npy")), np.array(["a"])), "not a semantic codebook"),
        (lambda root: next(root.rglob("*.npy")).write_bytes(b"x" * 99), "not a semantic codebook"),
        (lambda root: next(root.rglob("encoder.ckpt")).write_bytes(b"x" * 99), "not the weights of semanticodec"),
        (lambda root: rewrite(root, quantizer___codebook__embed=None), "not a checkpoint of semanticodec"),
        (lambda root: rewrite(root, encoder_output_linear__weight=None), "lacks encoder_output_linear.weight"),
        (lambda root: rewrite(root, encoder__weight_hh_l1=torch.zeros(3)), "size mismatch for weight_hh_l1"),
        (lambda root: rewrite(root, audiomae__model__patch_embed__proj__bias=torch.zeros(3)), "0 of width 3|centroids"),
    ],
)
def test_another_checkpoint_is_refused(tmp_path, spoil, says):
    spoil(random_weights.write_semanticodec(tmp_path))
    with pytest.raises(UserError, match=says):
        load_codec(f"semanticodec@{tmp_path}")


def test_without_weights_the_error_says_how_to_get_them(tmp_path):
    for spec in ("semanticodec", f"semanticodec@{tmp_path / 'none'}"):
        with pytest.raises(UserError, match="no weights at .*huggingface-cli download haoheliu/SemantiCodec"):
            load_codec(spec)
