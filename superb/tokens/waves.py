"""Waves of a task as s3prl passes them to the upstream: files, cuts and sox effects."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from codecssl.superb.patches import import_patches
from codecssl.superb.tasks import Task

QBE_EFFECTS = [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]]
"""The sox effects of s3prl's quesst14_dtw."""
QBE_LEAST_SAMPLES = 800
"""s3prl pads shorter waves with zeros."""

Effects = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Wave:
    """One wave of a task. Equal objects have the same samples, as long as the file does not change."""

    path: str
    start: float | None = None
    """Start in seconds. None is the file's start."""
    end: float | None = None
    effects: Effects = ()
    """sox effects, applied by `codecssl.superb.patches.sox_effects`."""
    longest: float | None = None
    """Seconds above which a wave is cut at random each time, and therefore differs each time."""
    by_sox: bool = False
    """True if sox opens the file at its own rate, as in QbE. Otherwise s3prl's loader opens it at 16 kHz."""

    samples: tuple[int, int] | None = None
    """First sample and the one after the last, if the task's dataset cuts the unprocessed file (diarisation)."""

    def load(self) -> Tensor | None:
        """Load the task's samples, float32 at 16 kHz. None if the wave would be cut at random."""
        if self.samples is not None:
            return _stretch(self.path, *self.samples)
        if self.by_sox:
            return load_qbe(self.path)
        import_patches.install()
        from s3prl.dataio.dataset import LoadAudio

        cut = self.start is not None or self.end is not None
        loader = LoadAudio(
            [self.path],
            start_secs=[self.start] if cut else None,
            end_secs=[self.end] if cut else None,
            sox_effects=[list(effect) for effect in self.effects] or None,
        )
        wav: Tensor = loader[0]["wav"]
        return None if self.longest is not None and len(wav) / loader.sample_rate > self.longest else wav

    def digest(self) -> bytes:
        """Hash of the request and of the file's size and date."""
        found = Path(self.path).stat()
        parts = [asdict(self), found.st_size, found.st_mtime_ns]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def _stretch(path: str, first: int, last: int) -> Tensor:
    import soundfile
    import torch

    wave, _ = soundfile.read(path, start=first, stop=last, dtype="float32")
    return torch.from_numpy(wave)


def load_qbe(path: str) -> Tensor:
    """Load a clip of QbE, float32 [n] at 16 kHz: attenuated by sox's own effects, padded to QBE_LEAST_SAMPLES."""
    from torch.nn.functional import pad

    from codecssl.superb.patches.sox_effects import apply_effects_file

    wav, _ = apply_effects_file(path, QBE_EFFECTS)
    return pad(wav.flatten(), (0, max(0, QBE_LEAST_SAMPLES - wav.numel())))


def waves_of(task: Task, splits: Mapping[str, Iterable[Any]], frame_shift: int = 320) -> list[Wave]:
    """Distinct waves of a task, given its examples by split (see `codecssl.superb.corpora.corpus`).

    frame_shift: the upstream's samples per frame, the unit in which diarisation cuts recordings.
    """
    waves: dict[Wave, None] = {}
    for split, examples in splits.items():
        settings = _settings(task, split)
        for example in examples:
            if task.name == "sd":
                waves.update(dict.fromkeys(_stretches(str(example.path), frame_shift, **settings)))
            else:
                start, end = (_seconds(example.columns.get(name)) for name in ("start_sec", "end_sec"))
                waves[Wave(path=str(example.path), start=start, end=end, **settings)] = None
    return list(waves)


def _stretches(
    path: str, frame_shift: int, chunk_size: int, subsampling: int, rate: int, use_last_samples: bool, label_delay: int
) -> Iterator[Wave]:
    """Cut a recording by the rule of s3prl's DiarizationDataset."""
    import soundfile
    from s3prl.dataio.dataset.diarization import _gen_frame_indices

    frames = int(int(soundfile.info(path).duration * rate / frame_shift) / subsampling)
    cut = (chunk_size, chunk_size, use_last_samples, label_delay, subsampling)
    for first, last in _gen_frame_indices(frames, *cut):
        scale = subsampling * frame_shift
        yield Wave(path=path, samples=(first * scale, last * scale))


def _settings(task: Task, split: str) -> dict[str, Any]:
    """s3prl's settings for the waves of a split: effects, and the length above which they are cut at random."""
    import_patches.install()
    if task.problem is None:
        return {"by_sox": True}
    import s3prl.problem
    from s3prl.problem.asv import superb_asv

    datasets = getattr(s3prl.problem, task.problem)().default_config().get("build_dataset") or {}
    if task.name == "sd":
        return dict(datasets)
    dataset = datasets.get(split) or {}
    effects = dataset.get("sox_effects") or ()
    if task.name == "asv" and split == "train":  # a constant in s3prl's module, absent from its configuration
        effects = superb_asv.EFFECTS
    return {"effects": tuple(tuple(effect) for effect in effects), "longest": dataset.get("max_secs")}


def _seconds(value: Any) -> float | None:
    return None if value is None or value != value else float(value)
