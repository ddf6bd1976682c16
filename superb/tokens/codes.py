"""Codes of a wave, computed once: from the token cache on disk, from memory, or by the codec.

SUPERB's upstream is frozen, and the codes of a wave never change, but s3prl requests its features at every step. Codes
take about a kilobyte per second of audio, features a hundred times that. Therefore the codes are cached.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codecssl.superb.tokens.token_cache import TokenCache, wave_key

__all__ = ["CodeCache", "counts_of", "wave_key"]


class CodeCache:
    """Cache of codes [R, T], keyed by the content of the wave.

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
    """`CodeCache.counts` of an upstream, below its wrappers; None if it reads no codes."""
    while not hasattr(upstream, "codes") and hasattr(upstream, "frozen"):
        upstream = upstream.frozen
    codes = getattr(upstream, "codes", None)
    return codes.counts if isinstance(codes, CodeCache) else None
