"""Build mini-SUPERB, a corpus folder for SUPERB's ten tasks and three of sound and music, from one labelled manifest.

The folder holds manifest.jsonl (a row per task and utterance, with its split), trials.txt for asv, newly made audio,
and a corpus card. It is published by an atomic rename.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from codecssl.configs.load import config_path, load_config
from codecssl.superb.mini import mixtures, queries, recorded_tasks, sound_tasks, spliced_tasks
from codecssl.superb.mini.audio import AudioWriter
from codecssl.superb.mini.builder import LackingError, MiniBuilder
from codecssl.superb.mini.corpus_card import card
from codecssl.superb.mini.manifest import read_manifest
from codecssl.superb.mini.recipe import Recipe
from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import alone_in

MARKER = "mini.json"
"""Record of the corpus's inputs, written last."""
VERSION = 3

BUILDERS: dict[str, Callable[[MiniBuilder], list[ManifestRow]]] = {
    "pr": recorded_tasks.pr,
    "asr": recorded_tasks.asr,
    "ks": spliced_tasks.ks,
    "qbe": queries.qbe,
    "sid": recorded_tasks.sid,
    "sd": mixtures.sd,
    "ic": spliced_tasks.ic,
    "sf": spliced_tasks.sf,
    "er": recorded_tasks.er,
    "env": sound_tasks.env,
    "inst": sound_tasks.inst,
    "pitch": sound_tasks.pitch,
}
"""Builders by task, without asv, which also makes trials."""
TASKS = ("pr", "asr", "ks", "qbe", "sid", "asv", "sd", "ic", "sf", "er", "env", "inst", "pitch")
SYNTHESISED = ("inst", "pitch")
"""Tasks that need nothing of the manifest."""


def build(
    manifest: Path, output: Path, *, seed: int = 0, recipe: str = "mini", on_progress: Callable[[str], None] = print
) -> Path:
    """Build the corpus in the folder `output` and return it. A corpus built from the same inputs is kept.

    The content depends only on the manifest, its audio, the seed and the recipe (a name in configs/superb or a YAML
    file). Tasks without data in the manifest are left out, and listed by `on_progress` and in the card. Raises
    UserError if `output` holds anything else, or if no task can be built.
    """
    if not (manifest / "manifest.jsonl" if manifest.is_dir() else manifest).is_file():
        raise UserError(f"manifest {manifest}: no such file; give a .jsonl with path, task and label columns")
    identity = _identity(manifest, seed, recipe)
    if _built(output) == identity:
        on_progress(f"{output}: built before from this manifest, seed and recipe; nothing to do")
        return output
    _check_free(output)
    with _scratch(output) as folder:
        _fill(folder, manifest, seed, recipe, identity, on_progress)
        if output.is_dir():
            output.rmdir()  # empty, as checked by _check_free
        folder.rename(output)
    return output


def _identity(manifest: Path, seed: int, recipe: str) -> dict[str, Any]:
    path = manifest / "manifest.jsonl" if manifest.is_dir() else manifest
    settings = dataclasses.asdict(load_config(Recipe, "superb", recipe))
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"version": VERSION, "manifest_sha256": digest, "folder": str(path.parent.resolve()), "seed": seed, **plain}


def _built(output: Path) -> dict[str, Any] | None:
    try:
        marker: dict[str, Any] = json.loads((output / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker


def _check_free(output: Path) -> None:
    if (output / MARKER).is_file():
        raise UserError(
            f"{output}: built from another manifest, seed or recipe, or by another release (see {MARKER}); "
            "give another folder"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not a mini-SUPERB corpus; give a new or an empty folder")


@contextlib.contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """Create an empty folder next to `output`, locked by this process. Remains of a killed process are removed."""
    folder = output.parent / f".{output.name}.partial"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(alone_in(output.parent, f".{output.name}.lock"))
        except OSError as error:
            raise UserError(f"{output}: cannot write there ({error.strerror}); give another folder") from error
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _fill(
    folder: Path, manifest: Path, seed: int, recipe: str, identity: dict[str, Any], on_progress: Callable[[str], None]
) -> None:
    data = read_manifest(manifest)
    settings = load_config(Recipe, "superb", recipe)
    builder = MiniBuilder(data=data, recipe=settings, audio=AudioWriter(folder), seed=seed)
    rows, missing = _build_tasks(builder, folder, on_progress)
    if not any(row["task"] not in SYNTHESISED for row in rows):
        raise UserError(f"manifest {manifest}: no task can be built from it; {'; '.join(missing.values())}")
    for reason, count in data.dropped.items():
        on_progress(f"{count} rows of the manifest left out: {reason}")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")
    text = card(rows, builder.notes, missing, data, seed, config_path("superb", recipe).stem)
    (folder / "README.md").write_text(text, encoding="utf-8")
    with (folder / MARKER).open("w", encoding="utf-8") as file:
        json.dump(identity, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _build_tasks(
    builder: MiniBuilder, folder: Path, on_progress: Callable[[str], None]
) -> tuple[list[ManifestRow], dict[str, str]]:
    rows: list[ManifestRow] = []
    missing: dict[str, str] = {}
    for task in TASKS:
        try:
            made = _asv(builder, folder) if task == "asv" else BUILDERS[task](builder)
        except LackingError as error:
            missing[task] = f"{task} needs {error}"
            on_progress(f"{task:3}  left out: it needs {error}")
            continue
        counts = {split: sum(row["splits"][task] == split for row in made) for split in ("train", "valid", "test")}
        minutes = sum(row["seconds"] for row in made) / 60
        on_progress(f"{task:3}  {' + '.join(map(str, counts.values()))} utterances, {minutes:.1f} min")
        rows += made
    return rows, missing


def _asv(builder: MiniBuilder, folder: Path) -> list[ManifestRow]:
    rows, trials = recorded_tasks.asv(builder)
    (folder / "trials.txt").write_text("".join(f"{label} {one} {other}\n" for label, one, other in trials))
    return rows
