"""Codes of a wave, computed once: a cache keyed by what the wave contains.

SUPERB's upstream is frozen, so that the codes of a wave never change, yet s3prl asks for its features at
every step. Codes cost about a kilobyte per second of audio, features a hundred times that: so the codes are
what is kept.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def wave_key(wav: Tensor) -> str:
    """sha256 of a 1-D float32 wave's samples: equal keys mean equal input."""
    samples = np.ascontiguousarray(wav.detach().cpu().numpy(), dtype="<f4")
    return hashlib.sha256(samples.data).hexdigest()


class CodeCache:
    """Codes [K, T] by content of the wave, in memory and, with a folder, on disk.

    `folder/<codec fingerprint>/<key[:2]>/<key>.npy`: codes of two codecs can't mix. A file appears by rename,
    so that several processes may share the folder. `limit_bytes` bounds both; beyond it nothing more is kept.
    """

    def __init__(
        self,
        encode: Callable[[list[Tensor]], list[Tensor]],
        fingerprint: str,
        folder: Path | None = None,
        limit_bytes: int = 4 << 30,
    ) -> None:
        self.encode = encode
        self.folder = folder / fingerprint[:16] if folder else None
        self.encoded = 0  # waves that went through the codec
        self._codes: dict[str, np.ndarray] = {}
        self._room = limit_bytes

    def __call__(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """1-D float32 waves as `encode` takes them -> int64 codes [K, T_i] on the CPU."""
        keys = [wave_key(wav) for wav in wavs]
        found = {key: codes for key in set(keys) if (codes := self._find(key)) is not None}
        missing = {key: wav for key, wav in zip(keys, wavs, strict=True) if key not in found}
        self.encoded += len(missing)
        fresh = self.encode(list(missing.values())) if missing else []
        for key, encoded in zip(missing, fresh, strict=True):
            found[key] = encoded.cpu().numpy().astype(np.uint16)
            self._keep(key, found[key])
        return [torch.from_numpy(found[key].astype(np.int64)) for key in keys]

    def _find(self, key: str) -> np.ndarray | None:
        if key not in self._codes and self.folder and (path := self._path(key)).exists():
            self._codes[key] = np.load(path)
        return self._codes.get(key)

    def _keep(self, key: str, codes: np.ndarray) -> None:
        if codes.nbytes > self._room:
            return
        self._room -= codes.nbytes
        self._codes[key] = codes
        if self.folder:
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            with part.open("wb") as file:
                np.save(file, codes)
            part.rename(path)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.npy"
