"""The token cache: codes of waves, keyed by the content of the wave, on disk as token shards and in memory.

SUPERB's upstream is frozen, and the codes of a wave never change, but s3prl requests its features at every step. Codes
take about a kilobyte per second of audio, features a hundred times that. Therefore the codes are cached.

    DIR/CODEC-FINGERPRINT/SET/       a finished dataset of token shards, as codecssl.tokenize writes and verifies it;
                                     each utterance's id and source_sha256 are the sha256 of the wave's float32 samples
    DIR/CODEC-FINGERPRINT/SET/keys.npy   sorted hashes and the utterance of each; memory-mapped

A set holds the waves of one task and never changes. Another task adds another set without the existing waves. Codes of
two codecs, or of one codec on two kinds of devices, cannot mix, because the codec's fingerprint names their folder.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import atomic_file
from codecssl.tokenize.format.layout import read_numbers, shard_path
from codecssl.tokenize.shards import Shards

KEY = np.dtype([("key", "u1", (32,)), ("index", "<u4")])


def wave_key(wav: Tensor) -> str:
    """sha256 of a 1-D float32 wave's samples, in hex: equal keys mean equal input.

    The tensor keeps its key. A change in place by torch makes it invalid, a change by numpy does not.
    """
    version = None if wav.is_inference() else wav._version
    known = getattr(wav, "wave_key", None)
    if known is not None and known[0] == version:
        return str(known[1])
    samples = np.ascontiguousarray(wav.detach().cpu().numpy(), dtype="<f4")
    key = hashlib.sha256(samples.data).hexdigest()
    if version is not None:
        wav.wave_key = (version, key)  # type: ignore[attr-defined]
    return key


def on_device(wav: Tensor, device: torch.device) -> Tensor:
    """Return the wave on a device, with its key."""
    if wav.device == device:
        return wav
    key, moved = wave_key(wav), wav.to(device)
    moved.wave_key = (moved._version, key)  # type: ignore[attr-defined]
    return moved


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


# ---------------------------------------------------------------- in memory


class CachedCodec:
    """A function from waves to codes [R, T] that encodes each distinct wave once.

    Waves in the token cache are read from it. Other waves (randomly cut or changed ones, or uncached ones) go through
    the codec. Their codes are kept in memory up to `limit_bytes`.
    """

    def __init__(
        self,
        encode: Callable[[list[Tensor]], list[Tensor]],
        cache: TokenCache | None = None,
        limit_bytes: int = 1 << 30,
    ) -> None:
        self.encode, self.cache = encode, cache
        self.found = self.kept = self.encoded = 0
        """Numbers of requested waves found in the token cache, found in memory, and encoded."""
        self._codes: dict[str, NDArray[np.uint16]] = {}
        self._room = limit_bytes

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of waves by the origin of their codes."""
        return {"cached": self.found, "kept": self.kept, "live": self.encoded}

    def __call__(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """1-D float32 waves as `encode` takes them -> int64 codes [R, T_i] on the CPU."""
        keys = [wave_key(wav) for wav in wavs]
        found = {key: codes for key in dict.fromkeys(keys) if (codes := self._find(key)) is not None}
        missing = {key: wav for key, wav in zip(keys, wavs, strict=True) if key not in found}
        self.encoded += len(missing)
        fresh = self.encode(list(missing.values())) if missing else []
        for key, encoded in zip(missing, fresh, strict=True):
            found[key] = encoded.cpu().numpy().astype(np.uint16)
            self._keep(key, found[key])
        return [torch.from_numpy(found[key].astype(np.int64)) for key in keys]

    def _find(self, key: str) -> NDArray[np.uint16] | None:
        if (codes := self._codes.get(key)) is not None:
            self.kept += 1
        elif self.cache is not None and (codes := self.cache.find(key)) is not None:
            self.found += 1
        return codes

    def _keep(self, key: str, codes: NDArray[np.uint16]) -> None:
        if codes.nbytes <= self._room:
            self._room -= codes.nbytes
            self._codes[key] = codes


def counts_of(upstream: object) -> dict[str, int] | None:
    """`CachedCodec.counts` of an upstream, below its wrappers; None if it reads no codes."""
    while not hasattr(upstream, "codes") and hasattr(upstream, "frozen"):
        upstream = upstream.frozen
    codes = getattr(upstream, "codes", None)
    return codes.counts if isinstance(codes, CachedCodec) else None
