"""Fill the token cache for a comparison with the waves of each task, encoded by each codec of its upstreams."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from codecssl.superb.corpora.corpus import Example, TaskCorpus
from codecssl.superb.tasks import Task
from codecssl.superb.tokens.fill import CacheJob, fill
from codecssl.superb.tokens.waves import Wave, waves_of
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.codec_upstream import frame_shift
from codecssl.superb.upstreams.names import Upstream
from codecssl.tokenize.codec import Codec
from codecssl.tokenize.common.cores import available_cores

FEW_WAVES = 512
"""Minimum number of waves for worker processes, which take seconds to start."""


def jobs(
    upstreams: Sequence[Upstream],
    tasks: Sequence[Task],
    corpus: TaskCorpus,
    root: Path,
    *,
    device: str = "cpu",
    workers: int | None = None,
) -> Iterator[CacheJob]:
    """Yield a job per codec and task with waves. `workers` None is one per core, or none for few waves."""
    builder, seen = UpstreamBuilder(device=device), set()
    for upstream in upstreams:
        if not upstream.runs_codec:
            continue
        codec, load = builder.codec(upstream)
        if codec.card.fingerprint in seen:
            continue
        seen.add(codec.card.fingerprint)
        for task in tasks:
            waves = task_waves(task, corpus, frame_shift(codec.card))
            count = _workers(len(waves)) if workers is None else workers
            made = load if count else functools.partial(_itself, codec)  # a loaded codec can't be pickled
            options: dict[str, Any] = {"load": made, "workers": count, "device": device}
            if waves:
                yield CacheJob(root=root, name=task.name, waves=waves, card=codec.card, **options)


def _itself(codec: Codec) -> Codec:
    return codec


def task_waves(task: Task, corpus: TaskCorpus, frame_shift: int) -> list[Wave]:
    """Return the waves of all splits, and of all folds if the task is cross-validated."""
    if task.name == "er" and corpus.has_folds(task.name):
        rows = corpus.rows_of(task.name)
        return waves_of(task, {"test": [Example(id="", path=Path(row["path"]), columns={}) for row in rows]})
    return waves_of(task, corpus.select(task).splits, frame_shift)


def _workers(waves: int) -> int:
    cores = available_cores()
    return 0 if waves < FEW_WAVES or cores == 1 else cores


def fill_all(todo: Sequence[CacheJob], console: Any) -> None:
    """Execute all jobs, with a progress bar on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    waiting = [job for job in todo if not (job.folder / "dataset.json").exists()]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for job in waiting:
            bar = progress.add_task(f"codes  {job.card.name}  {job.name}", total=len(job.waves))
            filled = fill(job, on_progress=lambda done, bar=bar: progress.update(bar, completed=done))  # type: ignore[misc]
            failed = len((filled.shards.path / "failed.jsonl").read_text().splitlines())
            note = f", {failed} that can't be read: see failed.jsonl" if failed else ""
            console.print(f"codes of {job.name} by {job.card.name}: {len(filled)} new waves of {len(job.waves)}{note}")
