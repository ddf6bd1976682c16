"""What s3prl 0.4.18 needs before it imports and runs, unmodified, on today's torch and torchaudio.

s3prl is used as published; each patch below fills a hole that a newer library left, states its reason, and
touches nothing when the hole is not there. `install` must run before the first `import s3prl`.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from codecssl.tokenize.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One repair: `apply` makes it and is safe to call twice."""

    name: str
    reason: str
    apply: Callable[[], None]


def apply_effects(wav: Any, sample_rate: int, effects: Sequence[Sequence[str]]) -> tuple[Any, int]:
    """The sox effects of SUPERB's keyword spotting on a tensor [C, samples]: channels 1, rate, gain (dB).

    `gain` scales by 10^(dB/20), as sox's gain does where nothing clips. Any other effect is refused: a
    silently skipped effect would change the benchmark.
    """
    import torchaudio

    for name, *arguments in effects:
        if name == "channels" and arguments == ["1"]:
            wav = wav.mean(dim=0, keepdim=True)
        elif name == "rate" and len(arguments) == 1:
            wav = torchaudio.functional.resample(wav, sample_rate, int(arguments[0]))
            sample_rate = int(arguments[0])
        elif name == "gain" and len(arguments) == 1:
            wav = wav * 10 ** (float(arguments[0]) / 20)
        else:
            raise UserError(f"sox effect {name} {' '.join(arguments)}: not one of channels 1, rate R, gain DB")
    return wav, sample_rate


def _no_effects_file(*arguments: Any, **options: Any) -> None:
    raise UserError("sox effects on files: torchaudio dropped them; run this task through codecssl-superb instead")


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
    module.apply_effects_tensor = apply_effects
    module.apply_effects_file = _no_effects_file
    sys.modules[module.__name__] = module
    torchaudio.sox_effects = module


class _Absent(ModuleType):
    """A package that is not installed: it imports, and using anything of it says what to install."""

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
        reason="keyword spotting runs channels, rate and gain through torchaudio.sox_effects; 2.9 dropped it",
        apply=_torchaudio_sox_effects,
    ),
    Patch(
        name="optional_packages",
        reason="s3prl.problem imports sed_eval and dcase_util for HEAR scores, the classic keyword task "
        "imports catalyst for distributed sampling; none serves the tasks run here",
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
