"""Small shards made in the test, and a config that trains on them in seconds."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from codecssl.configs.load import from_dict
from codecssl.pretrain.config import RunConfig
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.write_codes import write_shards

SIZES = (16, 12, 8)


def card(name: str = "synthetic", sizes: tuple[int, ...] = SIZES) -> CodecCard:
    return CodecCard(
        name=name, weights="none", weights_sha256="0" * 64, sample_rate=16_000, hop_length=320,
        codebook_sizes=sizes, codes_per_frame=(1,) * len(sizes), latent_dim=12,
    )  # fmt: skip


def utterances(count: int, seed: int) -> Iterator[tuple[str, np.ndarray, dict[str, str]]]:
    """Codes that stay for some frames and depend on one another, so that masked ones can be guessed."""
    random = np.random.default_rng(seed)
    for number in range(count):
        frames = int(random.integers(15, 130))
        state = np.repeat(random.integers(0, 8, frames // 4 + 1), 4)[:frames]
        codes = np.stack(
            [(state * (book + 1) + random.integers(0, 2, frames)) % size for book, size in enumerate(SIZES)]
        )
        yield f"utterance-{seed}-{number:04d}", codes.astype(np.uint16), {}


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    def make(
        name: str = "shards", *, count: int = 40, seed: int = 0, codec: str = "synthetic", per_shard: int = 8192
    ) -> Path:
        write_shards(tmp_path / name, card(codec), utterances(count, seed), per_shard)
        return tmp_path / name

    return make


SMALL = {
    "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "conv_kernel": 8, "conv_groups": 4,
              "embedding_init": "random"},
    "data": {"batch_frames": 400, "crop_frames": 60, "min_frames": 20, "valid_fraction": 0.15, "valid_frames": 300},
    "mask": {"span_frames": 10, "start_probability": 0.08},
    "optim": {"steps": 20, "lr": 3e-3, "clip_norm": 1.0},
    "log": {"log_every": 3, "valid_every": 10, "checkpoint_every": 10},
}  # fmt: skip


@pytest.fixture
def small_config() -> Callable[..., RunConfig]:
    """small_config(dirs, model={...}, ...): a run of a minute fraction; keyword sections change it."""

    def make(dirs: Path | list[Path], **sections: dict[str, object]) -> RunConfig:
        values = {key: {**SMALL.get(key, {}), **sections.get(key, {})} for key in {*SMALL, *sections}}
        values["data"]["dirs"] = [str(path) for path in ([dirs] if isinstance(dirs, Path) else dirs)]
        return from_dict(RunConfig, values)

    return make


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a run of four steps and two checkpoints on them, its export and its labels."""
    from codecssl.pretrain.export.export import export
    from codecssl.pretrain.labels.label import LabelConfig, label
    from codecssl.pretrain.run import run

    root = tmp_path_factory.mktemp("trained")
    write_shards(root / "shards", card(), utterances(40, 0), 8192)
    values: dict[str, dict[str, object]] = {key: dict(section) for key, section in SMALL.items()}
    values["data"]["dirs"] = [str(root / "shards")]
    values["optim"]["steps"], values["log"]["checkpoint_every"] = 4, 2
    run(from_dict(RunConfig, values), root / "run")
    export(root / "run", root / "model")
    label(LabelConfig(source=str(root / "run"), data=(root / "shards",), output=root / "labels", clusters=4))
    return root
