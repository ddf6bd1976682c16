"""In-memory cache of loaded audio. s3prl decodes, resamples and filters a file at every step."""

import copy
import functools
from pathlib import Path
from typing import Any

from codecssl.tokenize.common.errors import UserError


class LoadedOnce:
    """Replacement of `__getitem__` of s3prl's LoadAudio, which keeps up to `limit_bytes` of waves.

    A wave is kept after decoding, resampling and effects. Random crops follow and still differ each time.
    An item without a crop is the kept tensor itself, so that `wave_key` hashes it once. A tensor that was changed in
    place is loaded again.
    """

    def __init__(self, genuine: Any, limit_bytes: int) -> None:
        self.genuine = genuine
        self._waves: dict[tuple[Any, ...], Any] = {}
        self._room = limit_bytes

    def item(self, audio: Any, index: int) -> dict[str, Any]:
        """Load as LoadAudio does: {"wav_path", "wav_len" (samples), "wav" (float [samples])}.

        Raises UserError for a file that is not audio or has non-finite samples.
        """
        wave = self._whole(audio, index)
        if audio.max_secs is not None and len(wave) / audio.sample_rate > audio.max_secs:
            samples = round(audio.max_secs * audio.sample_rate)
            start = audio.generator.randint(0, len(wave) - samples)
            wave = wave[start : start + samples]
        return {"wav_path": audio.filepaths[index], "wav_len": len(wave), "wav": wave}

    def _whole(self, audio: Any, index: int) -> Any:
        """Return the wave without a crop."""
        path = audio.filepaths[index]
        try:
            state = Path(path).stat()  # a file that was overwritten is read again
            place = [None if seconds is None else seconds[index] for seconds in (audio.start_secs, audio.end_secs)]
            effects = None if audio.individual_sox_effects is None else repr(audio.individual_sox_effects[index])
            key = (path, state.st_mtime_ns, state.st_size, audio.sample_rate, *place, effects)
            wave = self._waves.get(key)
            if wave is not None and not wave._version:
                return wave
            whole = copy.copy(audio)
            whole.max_secs = None
            loaded = self.genuine(whole, index)["wav"].clone()  # its own memory, of version 0
        except (MemoryError, UserError):
            raise
        except Exception as error:  # of librosa, soundfile or audioread, each with its own classes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path}: cannot be used ({reason}); replace it or remove its row") from error
        if wave is not None or loaded.nbytes <= self._room:
            self._room -= 0 if wave is not None else loaded.nbytes
            self._waves[key] = loaded
        return loaded


def install(limit_bytes: int = 1 << 30) -> None:
    """Make s3prl's loader keep what it loads; idempotent."""
    from s3prl.dataio.dataset.load_audio import LoadAudio

    if not hasattr(LoadAudio.__getitem__, "once"):
        once = LoadedOnce(LoadAudio.__getitem__, limit_bytes)

        @functools.wraps(once.genuine)
        def item(self: Any, index: int) -> dict[str, Any]:
            return once.item(self, index)

        item.once = once  # type: ignore[attr-defined]
        LoadAudio.__getitem__ = item
