"""Patches that s3prl 0.4.18, unmodified, needs to import and run on today's torch and torchaudio.

s3prl is used as published. Each patch below adds an interface that newer libraries lack and states its reason.
It does nothing if the interface exists. `install` must run before the first `import s3prl`.
"""

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

from codecssl.superb.patches import sox_effects


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A patch with an idempotent `apply`."""

    name: str
    reason: str
    apply: Callable[[], None]


def _torchaudio_backend() -> None:
    import torchaudio

    if not hasattr(torchaudio, "set_audio_backend"):
        torchaudio.set_audio_backend = lambda *arguments: None


def _torchaudio_sox_effects() -> None:
    import torchaudio

    if importlib.util.find_spec("torchaudio.sox_effects") is not None:
        return
    module: Any = ModuleType("torchaudio.sox_effects")
    module.__spec__ = importlib.util.spec_from_loader(module.__name__, loader=None)
    module.apply_effects_tensor = sox_effects.apply_effects
    module.apply_effects_file = sox_effects.apply_effects_file
    sys.modules[module.__name__] = module
    torchaudio.sox_effects = module


def _torchaudio_info() -> None:
    import torchaudio

    if not hasattr(torchaudio, "info"):
        torchaudio.info = _info


def _info(path: Any, *arguments: Any, **options: Any) -> Any:
    """Replace torchaudio.info with soundfile."""
    import soundfile

    found = soundfile.info(str(path))
    return SimpleNamespace(
        sample_rate=found.samplerate,
        num_frames=found.frames,
        num_channels=found.channels,
        bits_per_sample=_BITS.get(found.subtype, 0),
        encoding=found.subtype,
    )


def torchaudio_load() -> None:
    """Let torchaudio.load read through soundfile where torchcodec is missing."""
    import torchaudio

    genuine: Any = torchaudio.load
    if hasattr(genuine, "with_soundfile"):
        return

    @functools.wraps(genuine)
    def load(path: Any, frame_offset: int = 0, num_frames: int = -1, **options: Any) -> tuple[Any, int]:
        try:
            return genuine(path, frame_offset, num_frames, **options)
        except (ImportError, RuntimeError, OSError) as error:
            if "torchcodec" not in str(error).lower():
                raise
        return _load(path, frame_offset, num_frames, **options)

    load.with_soundfile = True  # type: ignore[attr-defined]
    torchaudio.load = load


def _load(path: Any, frame_offset: int = 0, num_frames: int = -1, channels_first: bool = True) -> tuple[Any, int]:
    """Replace torchaudio.load with soundfile. Returns float32 [C, samples] and Hz."""
    import soundfile
    import torch

    wave, rate = soundfile.read(str(path), frames=num_frames, start=frame_offset, dtype="float32", always_2d=True)
    return torch.from_numpy(wave.T.copy() if channels_first else wave), rate


class _Absent(ModuleType):
    """Placeholder of a package that is not installed. It imports; its use raises an error naming what to install."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None, is_package=True)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        package = self.__name__.split(".")[0]

        def refuse(*arguments: Any, **options: Any) -> None:
            raise ModuleNotFoundError(f"{self.__name__}.{attribute} needs a package: pip install {package}")

        return type(attribute, (), {"__init__": refuse})


def _optional_packages() -> None:
    for package, modules in _OPTIONAL.items():
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            for name in (package, *(f"{package}.{module}" for module in modules)):
                sys.modules[name] = _Absent(name)
            for module in modules:
                parent, _, child = f"{package}.{module}".rpartition(".")
                setattr(sys.modules[parent], child, sys.modules[f"{package}.{module}"])


def _safe_globals() -> None:
    import torch

    torch.serialization.add_safe_globals([argparse.Namespace])


_BITS = {"PCM_U8": 8, "PCM_S8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": 32, "DOUBLE": 64}

_OPTIONAL = {
    "sed_eval": ("sound_event", "util"),
    "dcase_util": ("containers",),
    "catalyst": ("data", "data.sampler"),
}

PATCHES = (
    Patch(
        name="torchaudio_backend",
        reason="load_audio calls torchaudio.set_audio_backend at import; torchaudio 2.9 dropped it",
        apply=_torchaudio_backend,
    ),
    Patch(
        name="torchaudio_sox_effects",
        reason="keyword spotting and QbE run channels, rate and gain through torchaudio.sox_effects, speaker "
        "verification silence too; 2.9 dropped the module",
        apply=_torchaudio_sox_effects,
    ),
    Patch(
        name="torchaudio_info",
        reason="keyword spotting cuts the _silence_ of Speech Commands by the lengths from torchaudio.info; "
        "2.9 dropped it",
        apply=_torchaudio_info,
    ),
    Patch(
        name="torchaudio_load",
        reason="the classic SID and ASR tasks call torchaudio.load, which since 2.9 needs torchcodec, and that a "
        "system ffmpeg; without one it reads through soundfile",
        apply=torchaudio_load,
    ),
    Patch(
        name="optional_packages",
        reason="s3prl.problem imports sed_eval and dcase_util for HEAR scores, the classic keyword task "
        "imports catalyst for distributed sampling; the tasks run here need none of them",
        apply=_optional_packages,
    ),
    Patch(
        name="safe_globals",
        reason="the classic runner's checkpoints hold an argparse.Namespace; torch >= 2.6 refuses to load it",
        apply=_safe_globals,
    ),
)


def install() -> None:
    """Apply every patch; idempotent."""
    for patch in PATCHES:
        patch.apply()
