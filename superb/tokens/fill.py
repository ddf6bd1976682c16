"""Fill the token cache: encode the waves of a task once, into a set of token shards.

Any number of processes, started by one or several commands, may fill one set. Each takes an unlocked shard. A shard is
written block by block. A killed process leaves complete blocks, and the next one resumes after them.
"""

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from codecssl.superb.tokens.codec_at_16khz import SAMPLE_RATE, at_codec_rate, encode_at_codec_rate
from codecssl.superb.tokens.token_cache import KeyedShards, TokenCache, codec_folder, wave_key
from codecssl.superb.tokens.waves import Wave
from codecssl.tokenize.codec import Codec, CodecCard, Encoded
from codecssl.tokenize.common.errors import UserError, one_line
from codecssl.tokenize.common.files import NO_LOCKS, locked
from codecssl.tokenize.encode import load_in_order
from codecssl.tokenize.format.layout import shard_path, to_planes
from codecssl.tokenize.format.records import EncodedUtterance, Failure
from codecssl.tokenize.format.writer import ShardWriter, finish_dataset

SHARD_WAVES = 4096
BLOCK_WAVES = 256
"""Waves per block: the most that a killed process loses."""
GROUP_WAVES = 32
"""Waves encoded together."""
POLL_SECONDS = 0.2
"""Interval between checks of shards locked by other processes."""

OnWaves = Callable[[int], None]
"""Callback that receives the number of finished waves."""


@dataclass(frozen=True, kw_only=True)
class CacheJob:
    """One set to fill: the waves of a task for a codec. `load` loads the codec in each worker process."""

    root: Path
    name: str
    waves: Sequence[Wave]
    card: CodecCard
    load: Callable[[], Codec]
    device: str = "cpu"
    workers: int = 0
    """Processes that load waves and, on a CPU, encode them. 0 uses this process."""

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"workers {self.workers}: must be 0 (this process) or more")

    @property
    def folder(self) -> Path:
        """Folder of the set. Its name depends on the waves and the state of their files."""
        digest = hashlib.sha256(b"".join(wave.digest() for wave in self.waves)).hexdigest()
        return codec_folder(self.root, self.card) / f"{self.name}-{digest[:12]}"


def fill(job: CacheJob, on_progress: OnWaves = lambda done: None) -> KeyedShards:
    """Encode missing waves and return the finished set. Raises UserError if the disk is full or lacks file locks."""
    try:
        return _fill(job, job.folder, on_progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"cache {job.root}: disk full; make room and run the same command again") from error
        if error.errno in (*NO_LOCKS, errno.EROFS, errno.EACCES):
            raise UserError(
                f"cache {job.root}: cannot be written or locked ({error.strerror}); give another folder"
            ) from error
        raise


def _fill(job: CacheJob, folder: Path, on_progress: OnWaves) -> KeyedShards:
    if (folder / "dataset.json").exists():
        return KeyedShards(folder, job.card)
    locks, encoder = folder.with_name(f".{folder.name}.locks"), _Encoder(job)
    while left := _unfinished(job, folder):
        on_progress(sum(len(_shard(job, s)) for s in range(_count(job)) if s not in left))
        written = [_fill_shard(job, folder, shard, locks, encoder, on_progress) for shard in left]
        if not any(written):
            time.sleep(POLL_SECONDS)
    with locked(locks / "finish", wait=True):
        if not (folder / "dataset.json").exists():
            finish_dataset(folder, {"codec": job.card.to_dict(), "sources": []}, _count(job))
            shutil.rmtree(folder / "work", ignore_errors=True)
        done = KeyedShards(folder, job.card)
    shutil.rmtree(locks, ignore_errors=True)
    return done


def _count(job: CacheJob) -> int:
    return -(-len(job.waves) // SHARD_WAVES)


def _shard(job: CacheJob, shard: int) -> Sequence[Wave]:
    return job.waves[shard * SHARD_WAVES : (shard + 1) * SHARD_WAVES]


def _unfinished(job: CacheJob, folder: Path) -> list[int]:
    return [s for s in range(_count(job)) if not shard_path(folder, s).with_suffix(".json").exists()]


def _fill_shard(
    job: CacheJob, folder: Path, shard: int, locks: Path, encoder: "_Encoder", on_progress: OnWaves
) -> bool:
    """Write the rest of a shard. False if another process holds its lock."""
    with locked(locks / f"{shard:05d}") as free:
        if not free or (folder / "dataset.json").exists():
            return False
        if shard_path(folder, shard).with_suffix(".json").exists():
            return True
        writer, waves = ShardWriter(folder, shard, job.card), _shard(job, shard)
        first = len(writer.parts) * BLOCK_WAVES
        blocks = [waves[at : at + BLOCK_WAVES] for at in range(first, len(waves), BLOCK_WAVES)]
        done = shard * SHARD_WAVES + first
        for block, results in zip(blocks, encoder.encode(blocks), strict=True):
            good = [r for r in results if isinstance(r, EncodedUtterance)]
            bad = [r for r in results if isinstance(r, Failure)]
            writer.add_block(len(good) + len(bad), good, bad)
            on_progress(done := done + len(block))
        writer.finish(hashlib.sha256(b"".join(wave.digest() for wave in waves)).hexdigest())
        return True


# ---------------------------------------------------------------- waves to codes


@dataclass(frozen=True, kw_only=True)
class LoadedWave:
    """A loaded wave and its key."""

    wave: Wave
    key: str
    samples: Tensor


class _Encoder(Dataset[Any]):
    """Encode groups of waves, in worker processes or here. Known and randomly cut waves give no result."""

    def __init__(self, job: CacheJob) -> None:
        self.job = job
        self.here = job.workers == 0 or torch.device(job.device).type != "cpu"
        self._open: tuple[Codec, TokenCache] | None = None
        self._seen: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_seen": set()}

    def encode(self, blocks: Sequence[Sequence[Wave]]) -> Iterator[list[EncodedUtterance | Failure]]:
        """Yield the results of each block."""
        groups = [block[at : at + GROUP_WAVES] for block in blocks for at in range(0, len(block), GROUP_WAVES)]
        results = load_in_order(self, groups, min(self.job.workers, len(groups)))
        for block in blocks:
            found: list[EncodedUtterance | Failure] = []
            for _ in range(0, len(block), GROUP_WAVES):
                group = next(results)
                found += self._encoded(group) if self.here else group
            yield [r for r in found if isinstance(r, Failure) or self._is_new(r.id)]

    def __getitem__(self, group: Any) -> Any:
        loaded = [load_wave(wave) for wave in group]
        return loaded if self.here else self._encoded(loaded)

    def _opened(self) -> tuple[Codec, TokenCache]:
        if self._open is None:
            self._open = self.job.load(), TokenCache(self.job.root, self.job.card)
        return self._open

    def _encoded(self, loaded: Sequence[LoadedWave | Failure | None]) -> list[EncodedUtterance | Failure]:
        codec, cache = self._opened()
        fresh = {h.key: h for h in loaded if isinstance(h, LoadedWave) and h.key not in self._seen}
        new = {key: h for key, h in fresh.items() if cache.find(key) is None}
        bad: list[EncodedUtterance | Failure] = [h for h in loaded if isinstance(h, Failure)]
        waves = [at_codec_rate(h.samples, codec.card).to(self.job.device) for h in new.values()]
        found = encode_at_codec_rate(codec, waves, self.job.device)
        return bad + [_utterance(codec.card, *of) for of in zip(new.values(), waves, found, strict=True)]

    def _is_new(self, key: str) -> bool:
        new = key not in self._seen
        self._seen.add(key)
        return new


def load_wave(wave: Wave) -> LoadedWave | Failure | None:
    """Load a wave. None if it is cut at random, a `Failure` if it cannot be read. The task fails on it later."""
    try:
        samples = wave.load()
    except MemoryError:
        raise
    except Exception as error:  # any decoder error affects only its own file
        return Failure(id=wave.path, path=wave.path, reason=one_line(error))
    if samples is not None and not len(samples):
        return Failure(id=wave.path, path=wave.path, reason="no samples")
    return None if samples is None else LoadedWave(wave=wave, key=wave_key(samples), samples=samples)


def _utterance(card: CodecCard, loaded: LoadedWave, wave: Tensor, encoded: Encoded) -> EncodedUtterance:
    return EncodedUtterance(
        id=loaded.key,
        path=loaded.wave.path,
        codes=to_planes(encoded.codes.cpu().numpy().astype(np.uint16), card),
        samples=wave.shape[-1],
        source_sha256=loaded.key,
        source_rate=SAMPLE_RATE,
        source_samples=len(loaded.samples),
        scales=None if encoded.scales is None else encoded.scales.cpu().numpy(),
    )
