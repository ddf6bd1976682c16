"""The token cache on disk: codes of waves in token shards, keyed by the content of the wave.

    DIR/CODEC-FINGERPRINT/SET/       a finished dataset of token shards, as codecssl.tokenize writes and verifies it;
                                     each utterance's id and source_sha256 are the sha256 of the wave's float32 samples
    DIR/CODEC-FINGERPRINT/SET/keys.npy   sorted hashes and the utterance of each; memory-mapped

A set holds the waves of one task and never changes. Another task adds another set without the existing waves. Codes of
two codecs, or of one codec on two kinds of devices, cannot mix, because the codec's fingerprint names their folder.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import atomic_file
from codecssl.tokenize.format.layout import read_numbers, shard_path
from codecssl.tokenize.shards import Shards

KEY = np.dtype([("key", "u1", (32,)), ("index", "<u4")])


def wave_key(wav: Tensor) -> str:
    """sha256 of a 1-D float32 wave's samples, in hex: equal keys mean equal input."""
    samples = np.ascontiguousarray(wav.detach().cpu().numpy(), dtype="<f4")
    return hashlib.sha256(samples.data).hexdigest()


def codec_folder(root: Path, card: CodecCard) -> Path:
    """Folder of the sets of a codec."""
    return root / f"{card.name}-{card.fingerprint[:16]}"


class KeyedShards:
    """One set, queried by `find(key)`. It is memory-mapped and safe to share between processes."""

    def __init__(self, folder: Path, card: CodecCard) -> None:
        self.shards = Shards(folder)
        if self.shards.card.fingerprint != card.fingerprint:
            difference = self.shards.card.difference(card)
            raise UserError(f"cache {folder}: made with another codec ({difference}); give another --cache")
        path = folder / "keys.npy"
        if not path.exists():
            write_keys(self.shards)
        self.keys: NDArray[np.void] = np.load(path, mmap_mode="r").view(np.ndarray)
        if len(self.keys) != len(self.shards):
            raise UserError(f"cache {path}: {len(self.keys)} keys, the shards hold {len(self.shards)}; remove the file")

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, key: str) -> NDArray[np.uint16] | None:
        """Codes [R, T] of the wave with this `wave_key`. None if it is missing."""
        digest, column = bytes.fromhex(key), self.keys["key"]
        place = bisect_left(range(len(column)), digest, key=lambda i: column[i].tobytes())
        if place == len(column) or column[place].tobytes() != digest:
            return None
        return self.shards.codes(int(self.keys["index"][place]))


def write_keys(shards: Shards) -> None:
    """Write keys.npy of a finished set, from the hashes in its shards."""
    table = np.zeros(len(shards), KEY)
    for row in shards.blocks:
        with shard_path(shards.path, int(row["shard"])).open("rb") as file:
            table["key"][row["first"] : row["first"] + row["count"]] = read_numbers(file, int(row["offset"]))["sha256"]
    table["index"] = np.arange(len(table))
    order = np.argsort(np.ascontiguousarray(table["key"]).view("S32").ravel(), kind="stable")
    with atomic_file(shards.path / "keys.npy") as file:
        np.save(file, table[order])


class TokenCache:
    """All finished sets of a codec under a folder. `refresh` finds sets finished later."""

    def __init__(self, root: Path, card: CodecCard) -> None:
        self.folder, self.card = codec_folder(root, card), card
        self._sets: dict[Path, KeyedShards] = {}
        self.refresh()

    def refresh(self) -> None:
        for folder in finished_sets(self.folder):
            if folder not in self._sets:
                self._sets[folder] = KeyedShards(folder, self.card)

    def __len__(self) -> int:
        return sum(map(len, self._sets.values()))

    def find(self, key: str) -> NDArray[np.uint16] | None:
        """Codes [R, T] of a wave by its `wave_key`. None if no set has it."""
        for shards in self._sets.values():
            if (codes := shards.find(key)) is not None:
                return codes
        return None


def finished_sets(folder: Path) -> Iterator[Path]:
    """Finished datasets in a codec's folder, sorted by name."""
    return (path.parent for path in sorted(folder.glob("*/dataset.json")))
