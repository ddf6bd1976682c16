"""Settings of a tokenization run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codecssl.tokenize.common.errors import UserError, check_share
from codecssl.tokenize.mel import MAX_BANDS, Scale


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Settings of `codecssl-tokenize run`. Raises UserError for values out of range."""

    sources: tuple[str, ...]
    output: Path
    codec: str = "tiny_16khz"
    num_codebooks: int | None = None
    device: str = "cpu"
    tasks: int = 1
    task: int = 0
    workers: int | None = None
    """Number of processes that read and, on a CPU or several GPUs, encode. None is one per core, or two per GPU if
    there are several; 0 uses this process."""
    entropy_code: bool = False
    """Entropy-code the shards, losslessly."""
    mel_bands: int | None = None
    """Number of bands (1 to 256) of the log-mel plane stored next to the codes. None stores no plane."""
    mel_scale: Scale | None = None
    """Mel scale of the bands. None: the scale of the existing folder, or htk for a new one."""
    shard_inputs: int = 8192
    """Inputs per shard."""
    block_inputs: int = 2048
    """Maximum number of inputs per block. A kill loses at most one block."""
    block_seconds: float = 7200.0
    """Seconds of audio after which a block is closed early."""
    retry_failed: bool = False
    """Read the inputs of finished shards that failed before again."""

    def __post_init__(self) -> None:
        check_share(self.tasks, self.task)
        if self.mel_bands is not None and not 1 <= self.mel_bands <= MAX_BANDS:
            raise UserError(f"--with-mel {self.mel_bands}: must be from 1 to {MAX_BANDS} bands")
        if self.mel_scale is not None and self.mel_bands is None:
            raise UserError(f"--mel-scale {self.mel_scale}: is of a log-mel plane; add --with-mel 80")
        for name in ("shard_inputs", "block_inputs", "block_seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} {getattr(self, name)}: must be above 0")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"workers {self.workers}: must be 0 or more")
