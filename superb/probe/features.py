"""The data of a probe: a manifest of audio files, or token shards whose columns are the labels."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE, SHORTEST
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import Upstream
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.hashing import file_sha256
from codecssl.tokenize.sources.manifest import read_rows


class AudioRows:
    """A manifest of audio files: path and label columns."""

    def __init__(self, manifest: Path) -> None:
        self.manifest = manifest
        self.fingerprint = hashlib.sha256(manifest.read_bytes()).hexdigest()
        self.rows = read_rows(manifest, "path")

    def source_sha256(self, index: int) -> str:
        """SHA-256 of the audio file of a row."""
        return file_sha256(self.manifest.parent / self.rows[index]["path"])

    def seconds(self, index: int) -> float:
        """Duration of a row's audio."""
        from codecssl.tokenize.sources.audio import read_wave

        return len(read_wave(self.manifest.parent / self.rows[index]["path"], SAMPLE_RATE)) / SAMPLE_RATE

    def features(self, upstream: Upstream, builder: UpstreamBuilder) -> Callable[[int], list[np.ndarray]]:
        """Return a function from a row's number to its hidden states [T, D]."""
        import torch

        from codecssl.tokenize.sources.audio import read_wave

        expert = builder.build_unnormalised(upstream)

        def states(index: int) -> list[np.ndarray]:
            wave = torch.from_numpy(read_wave(self.manifest.parent / self.rows[index]["path"], SAMPLE_RATE))
            wave = torch.nn.functional.pad(wave, (0, max(0, SHORTEST - len(wave)))).to(builder.device)
            with torch.no_grad():
                return [layer[0].cpu().numpy() for layer in expert([wave])["hidden_states"]]

        return states


class ShardRows:
    """A folder of token shards with the probe's label columns. It needs no codec and no audio."""

    def __init__(self, folder: Path) -> None:
        from codecssl.tokenize.shards import Shards

        self.shards: Shards = Shards(folder)
        self.fingerprint = self.shards.fingerprint
        self.rows: list[dict[str, Any]] = [{"path": u.path, **u.labels} for u in self.shards.utterances()]

    def source_sha256(self, index: int) -> str:
        """SHA-256 of the audio file of a row."""
        return str(self.shards.utterance(index).source_sha256)

    def seconds(self, index: int) -> float:
        """Duration of a row's audio."""
        return self.shards.utterance(index).samples / self.shards.card.sample_rate

    def features(self, upstream: Upstream, builder: UpstreamBuilder) -> Callable[[int], list[np.ndarray]]:
        """Return a function from a row's number to its hidden states [T, D]."""
        from codecssl.superb.upstreams.token_reader import TokenReader

        reader = TokenReader(builder, upstream, self.shards)
        return lambda index: [layer.cpu().numpy() for layer in reader.states(index)]


def open_rows(path: Path) -> "AudioRows | ShardRows":
    """Open a manifest file, a folder with manifest.jsonl, or a folder of token shards."""
    if (path / "manifest.jsonl").is_file():
        return AudioRows(path / "manifest.jsonl")
    if path.is_file():
        return AudioRows(path)
    if path.is_dir():
        return ShardRows(path)
    raise UserError(f"data {path}: no such file or folder; give a manifest.jsonl or a folder of token shards")
