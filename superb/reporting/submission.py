"""Submission zip for SUPERB's leaderboard: predictions of one upstream's `full` runs on the official corpora.

    predict/ks_public/predict.txt ...        as predictions.py describes them

The format follows s3prl's docs ("Leaderboard submission" in s3prl/downstream/docs/superb.md) and its submit.py. Nothing
is sent. No submission has been tried, and it is unknown whether superbbenchmark.org still accepts any. Its hidden sets
need models, not predictions. A subset of the tasks may be submitted. er needs all five folds.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

from codecssl.superb.reporting.comparison import Comparison, load
from codecssl.superb.reporting.predictions import FOLDER
from codecssl.superb.rows import ResultRow
from codecssl.superb.tasks import TASKS
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import atomic_file, refuse_links_out

EPOCH = (1980, 1, 1, 0, 0, 0)
"""Date of every member. Equal predictions give identical bytes."""


def write_zip(folders: Sequence[Path], archive: Path, upstream: str | None = None) -> list[str]:
    """Pack the best runs of the lowest seed. Return the tasks without a finished run.

    Raises UserError, and writes no zip, if no run is a full run on the official corpora, the upstream is ambiguous, er
    lacks a fold, or a run has no predictions.
    """
    comparison = _superb(folders)
    name = _chosen(comparison, upstream)
    cells = {task: comparison.cells[name, task] for task in comparison.tasks if (name, task) in comparison.cells}
    members = {}
    for cell in cells.values():
        runs = [run for run in cell.runs if run["seed"] == cell.seeds[0]]
        if lacking := cell.untested_folds:
            numbers = ", ".join(map(str, lacking))
            raise UserError(f"--zip: er of {name} lacks the folds {numbers}; run it again, finished ones stay")
        for run in runs:
            members.update(_files(folders, run))
    with atomic_file(archive) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in sorted(members):
            info = zipfile.ZipInfo(member, EPOCH)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            packed.writestr(info, members[member].read_bytes())
    return [name for name, task in TASKS.items() if task.superb and name not in cells]


def _superb(folders: Sequence[Path]) -> Comparison:
    where = " ".join(map(str, folders))
    comparisons = load(folders)
    found = [comparison for comparison in comparisons if comparison.is_superb]
    if not found and (partial := [comparison for comparison in comparisons if comparison.is_full]):
        raise UserError(f"--zip: {where}: {partial[0].claim}; only runs on the official data can be submitted")
    if not found:
        raise UserError(
            f"--zip: {where} has no run of --budget full on SUPERB's own corpora; no other can be submitted"
        )
    if len(found) > 1:
        data = ", ".join(comparison.data for comparison in found)
        raise UserError(f"--zip: {where} has full runs on several corpora ({data}); give folders of one")
    return found[0]


def _chosen(comparison: Comparison, upstream: str | None) -> str:
    if upstream is None and len(comparison.upstreams) == 1:
        return comparison.upstreams[0]
    if upstream not in comparison.upstreams:
        given = f" {upstream}" if upstream else ""
        raise UserError(f"--of{given}: give one of {', '.join(comparison.upstreams)}; a zip holds one upstream")
    return upstream


def _files(folders: Sequence[Path], run: ResultRow) -> dict[str, Path]:
    """Map names in the zip to files."""
    for folder in folders:
        kept = folder / str(run.get("folder")) / FOLDER
        refuse_links_out(kept, folder)
        if files := [path for path in kept.rglob("*") if path.is_file()]:
            return {f"{FOLDER}/{path.relative_to(kept).as_posix()}": path for path in files}
    name = f"{run['task']}, learning rate {run['learning_rate']}, seed {run['seed']},"
    raise UserError(
        f"--zip: the run of {name} kept no predictions (older version); remove its result.json and run again"
    )
