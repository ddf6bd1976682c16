"""In-memory cache of decoded audio. s3prl decodes and resamples a file at every step."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError


class DecodedOnce:
    """Replacement of librosa in s3prl's loader, whose `load` caches up to `limit_bytes`.

    Random crops and effects are applied after loading and still differ each time.
    """

    def __init__(self, librosa: Any, limit_bytes: int) -> None:
        self.librosa = librosa
        self._waves: dict[tuple[Any, ...], tuple[NDArray[Any], float]] = {}
        self._room = limit_bytes

    def load(self, path: str, *, sr: float, offset: float = 0.0, duration: float | None = None) -> Any:
        """Load as librosa.load does: (samples, Hz). The samples are a copy, since s3prl's tensors share their memory.

        Raises UserError for a file that is not audio or has non-finite samples.
        """
        try:
            state = Path(path).stat()  # a file that was overwritten is read again
            key = (path, state.st_mtime_ns, state.st_size, sr, offset, duration)
            if key in self._waves:
                wave, rate = self._waves[key]
                return wave.copy(), rate
            wave, rate = self.librosa.load(path, sr=sr, offset=offset, duration=duration)
        except MemoryError:
            raise
        except Exception as error:  # of librosa, soundfile or audioread, each with its own classes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path}: cannot be used ({reason}); replace it or remove its row") from error
        if wave.nbytes <= self._room:
            self._room -= wave.nbytes
            self._waves[key] = wave.copy(), rate
        return wave, rate


def install(limit_bytes: int = 1 << 30) -> None:
    """Make s3prl's loader keep what it decodes; idempotent."""
    import s3prl.dataio.dataset.load_audio as loader

    if not isinstance(loader.librosa, DecodedOnce):
        loader.librosa = DecodedOnce(loader.librosa, limit_bytes)
