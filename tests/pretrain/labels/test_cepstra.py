"""Labels of cepstra, the targets of HuBERT's first iteration, against librosa and SciPy."""

from pathlib import Path

import librosa
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.preprocessing import StandardScaler

from codecssl.pretrain.cli import main
from codecssl.pretrain.labels.cepstra import cepstra
from codecssl.pretrain.labels.clustering import Clustering
from codecssl.pretrain.labels.label import LabelConfig, label
from codecssl.pretrain.labels.labellers import normalised
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.format.records import EncodedUtterance
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset
from codecssl.tokenize.mel import MelSpec
from codecssl.tokenize.shards import Shards

CARD = CodecCard(
    name="synthetic", weights="none", weights_sha256="0" * 64, sample_rate=16_000, hop_length=320,
    codebook_sizes=(16,), codes_per_frame=(1,), latent_dim=4,
)  # fmt: skip
SPEC = MelSpec.for_codec(40, CARD)


def by_librosa(plane: np.ndarray) -> np.ndarray:
    log_power = (SPEC.low + plane.T / 255.0 * (SPEC.high - SPEC.low)) * np.log(10.0)
    static = librosa.feature.mfcc(S=log_power, n_mfcc=13)
    first = librosa.feature.delta(static, width=5, mode="nearest")
    return np.concatenate([static, first, librosa.feature.delta(first, width=5, mode="nearest")]).T


def planes(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (int(random.integers(20, 60)), 40)).astype(np.uint8) for _ in range(count)]


def test_cepstra_and_their_differences_are_librosas() -> None:
    for plane in planes(3):
        np.testing.assert_allclose(cepstra(SPEC, plane), by_librosa(plane), rtol=1e-4, atol=2e-4)


def shards(folder: Path, *, mel: bool) -> Shards:
    utterances = [
        EncodedUtterance(
            id=f"u{number}", path=f"u{number}", source_sha256="0" * 64, source_rate=16_000,
            samples=len(plane) * 320, source_samples=len(plane) * 320,
            codes=[np.zeros(len(plane), np.uint16)], mel=plane if mel else None,
        )
        for number, plane in enumerate(planes(12))
    ]  # fmt: skip
    writer = ShardWriter(folder, 0, CARD)
    writer.add_block(12, utterances, [])
    writer.finish("0" * 64)
    finish_dataset(folder, {"codec": CARD.to_dict(), "sources": []} | ({"mel": SPEC.to_dict()} if mel else {}), 1)
    return Shards(folder)


def test_labels_are_the_nearest_centroids_of_the_cepstra(tmp_path: Path) -> None:
    data = shards(tmp_path / "data", mel=True)
    label(LabelConfig(source="mfcc", data=(data.path,), output=tmp_path / "labels", clusters=7, sample_frames=300))
    made, clustering = Shards(tmp_path / "labels"), Clustering.load(tmp_path / "labels" / "clustering.safetensors")
    assert made.card.codebook_sizes == (7,)
    assert clustering.centroids.shape == (7, 39)
    for index, plane in enumerate(planes(12)):
        expected = cdist(by_librosa(plane), clustering.centroids).argmin(1)
        assert (made.codes(index)[0] == expected).mean() > 0.98


def test_cmvn_clusters_the_normalised_cepstra_of_each_utterance(tmp_path: Path) -> None:
    """Oracle: scikit-learn's StandardScaler, whose deviation has no floor, of librosa's cepstra."""
    data = shards(tmp_path / "data", mel=True)
    command = ["label", "mfcc", "--data", str(data.path), "--output", str(tmp_path / "labels"), "--clusters", "7",
               "--sample-frames", "300"]  # fmt: skip
    assert main([*command, "--cmvn"]) == 0
    made, clustering = Shards(tmp_path / "labels"), Clustering.load(tmp_path / "labels" / "clustering.safetensors")
    for index, plane in enumerate(planes(12)):
        expected = cdist(StandardScaler().fit_transform(by_librosa(plane)), clustering.centroids).argmin(1)
        assert (made.codes(index)[0] == expected).mean() > 0.9
    assert main(command) == 1  # the same folder with other features


def test_cmvn_leaves_silence_at_zero() -> None:
    assert not normalised(np.full((20, 39), 3.0, np.float32)).any()


def test_cmvn_is_refused_for_labels_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cmvn: normalises features, but labels.jsonl has labels; remove it"):
        LabelConfig(source="labels.jsonl", data=(tmp_path,), output=tmp_path / "labels", cmvn=True)


def test_shards_without_a_plane_are_refused(tmp_path: Path) -> None:
    data = shards(tmp_path / "data", mel=False)
    config = LabelConfig(source="mfcc", data=(data.path,), output=tmp_path / "labels", clusters=7, sample_frames=300)
    with pytest.raises(UserError, match="has no log-mel plane, which mfcc reads; tokenize with --with-mel 80"):
        label(config)
