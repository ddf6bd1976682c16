"""Decoded audio, once per process where memory allows: s3prl decodes and resamples a file at every step."""

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from codecssl.tokenize.common.errors import UserError


class DecodedOnce:
    """Stands for librosa in s3prl's loader: `load` remembers what it gave, as much as fits `limit_bytes`.

    What is cut at random or goes through effects is still cut and changed each time: that comes after loading.
    """

    def __init__(self, librosa: Any, limit_bytes: int) -> None:
        self.librosa = librosa
        self._waves: dict[tuple[Any, ...], tuple[NDArray[Any], float]] = {}
        self._room = limit_bytes

    def load(self, path: str, *, sr: float, offset: float = 0.0, duration: float | None = None) -> Any:
        """librosa.load: (samples, Hz), the samples a copy: s3prl's tensors share their memory. UserError names a file
        that is no audio, or has samples that are no numbers.
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
        except Exception as error:  # of librosa, soundfile or audioread, each with classes of its own
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path}: cannot be used ({said}); replace it or take its row out") from error
        if wave.nbytes <= self._room:
            self._room -= wave.nbytes
            self._waves[key] = wave.copy(), rate
        return wave, rate


def install(limit_bytes: int = 1 << 30) -> None:
    """Make s3prl's loader keep what it decodes; idempotent."""
    import s3prl.dataio.dataset.load_audio as loader

    if not isinstance(loader.librosa, DecodedOnce):
        loader.librosa = DecodedOnce(loader.librosa, limit_bytes)
