"""Unpack the spoken sample corpus of the package and read its manifest, without espeak-ng.

`sample_corpus.tar` holds the manifest and one Opus file per speaker, in which the utterances follow one
another; one file per utterance would spend a third of its bytes on headers. `unpack` cuts them into one FLAC
per utterance, 16 kHz mono, which every reader of audio opens at the rate that the manifest says. It adds synthesised
notes and environmental sounds.
`sample_corpus.md` describes its contents.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from codecssl.superb.rows import ManifestRow
from codecssl.superb.sounds.clips import SynthesisedClip, notes, sounds
from codecssl.tokenize.common.errors import UserError

ARCHIVE = Path(__file__).with_name("sample_corpus.tar")
SAMPLE_RATE = 16_000
MANIFEST = "manifest.jsonl"
PRETRAIN = "pretrain.jsonl"
"""Rows for pretraining without labels, which are in no task's valid or test split."""
SYNTHESISED: dict[str, Callable[[], Iterator[SynthesisedClip]]] = {"notes": notes, "sounds": sounds}
"""Synthesised clips by the name of their folder."""
SOUNDS_VERSION = 1
"""Version of the synthesised notes and sounds. Copies unpacked with another one are replaced."""
MARKER = "unpacked.json"
"""File with the sha256 of the archive and the size of every unpacked file. Written last."""


def unpack(output: str | Path) -> Path:
    """Unpack the corpus into the folder `output` and return it. A complete copy is kept.

    The folder is published by an atomic rename. A killed run leaves no incomplete copy, and concurrent processes share
    the result of the first. A damaged or older copy is replaced. Raises UserError if `output` holds anything else.
    """
    output = Path(output)
    if is_whole(output):
        return output
    _check_free(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise UserError(f"{output}: cannot write there ({error.strerror}); give another folder") from error
    try:
        _extract(scratch)
        _publish(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return output


def manifest_rows(path: str | Path) -> list[ManifestRow]:
    """Read the rows of an unpacked corpus from its folder or manifest, with absolute paths."""
    manifest = Path(path)
    if manifest.is_dir():
        manifest = manifest / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{manifest}: no such manifest; make one with `codecssl-superb sample OUTPUT`")
    folder = manifest.parent.absolute()
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [{**row, "path": str(folder / row["path"])} for row in rows]


def is_whole(output: str | Path) -> bool:
    """True if `output` was unpacked from this archive and all files have their sizes."""
    output = Path(output)
    marker = _read_marker(output)
    if marker.get("archive_sha256") != _archive_sha256() or marker.get("sounds") != SOUNDS_VERSION:
        return False
    try:
        return all((output / name).stat().st_size == size for name, size in marker["bytes"].items())
    except OSError:
        return False


def _archive_sha256() -> str:
    try:
        return hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{ARCHIVE}: cannot be read ({error.strerror}); install codecssl again") from error


def _read_marker(output: Path) -> dict[str, Any]:
    try:
        marker = json.loads((output / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return marker if isinstance(marker, dict) else {}


def _check_free(output: Path) -> None:
    """Raise UserError unless `output` is absent, empty, or an earlier copy that may be replaced."""
    if not output.exists() or (output.is_dir() and (output / MARKER).exists()):
        return
    if not output.is_dir() or any(output.iterdir()):
        raise UserError(f"{output}: exists and is not an unpacked sample corpus; give a new or an empty folder")


def _extract(folder: Path) -> None:
    """Write every utterance, the manifest and, last, the marker into `folder`."""
    import soundfile

    with tarfile.open(ARCHIVE) as archive:
        members = {member.name: archive.extractfile(member) for member in archive.getmembers()}
        blobs = {name: stream.read() for name, stream in members.items() if stream is not None}
    bundles: dict[str, list[ManifestRow]] = defaultdict(list)
    lines, pretrain = [], []
    for line in gzip.decompress(blobs[MANIFEST + ".gz"]).decode().splitlines():
        row: ManifestRow = json.loads(line)
        # The position in the Opus file is not needed after the cut.
        cut = {"path": row["path"], "start": row.pop("start"), "stop": row.pop("stop")}
        bundles[row.pop("bundle")].append(cut)
        lines.append(json.dumps(row))
        if set(row["splits"].values()) == {"train"}:
            pretrain.append(json.dumps({"path": row["path"]}))
    for name, cuts in bundles.items():
        wave, rate = soundfile.read(io.BytesIO(blobs[name]), dtype="float32")
        assert rate == SAMPLE_RATE, (name, rate)
        for cut in cuts:
            target = folder / cut["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(target, wave[cut["start"] : cut["stop"]], SAMPLE_RATE, subtype="PCM_16")
    for row in _synthesise(folder):
        lines.append(json.dumps(row))
        if set(row["splits"].values()) == {"train"}:
            pretrain.append(json.dumps({"path": row["path"]}))
    for manifest, rows in ((MANIFEST, lines), (PRETRAIN, pretrain)):
        (folder / manifest).write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    marker = {"archive_sha256": _archive_sha256(), "sounds": SOUNDS_VERSION, "bytes": sizes}
    (folder / MARKER).write_text(json.dumps(marker), encoding="utf-8")


def _synthesise(folder: Path) -> Iterator[ManifestRow]:
    """Write the clips of tasks env, inst and pitch and yield their rows."""
    import soundfile

    for place, clips in SYNTHESISED.items():
        (folder / place).mkdir()
        for clip in clips():
            path = f"{place}/{clip.name}.flac"
            soundfile.write(folder / path, clip.wave, SAMPLE_RATE, subtype="PCM_16")
            yield {
                "path": path,
                "seconds": len(clip.wave) / SAMPLE_RATE,
                "sample_rate": SAMPLE_RATE,
                "task": ",".join(clip.splits),
                "splits": clip.splits,
                **clip.labels,
            }


def _publish(scratch: Path, output: Path) -> None:
    """Rename `scratch` to `output`. A complete copy of a faster process is kept."""
    scratch.chmod(0o755)  # mkdtemp makes it private
    while True:
        try:
            scratch.rename(output)  # takes the place of an empty folder, fails on any other
            return
        except OSError:
            if is_whole(output):
                return
            _check_free(output)
            aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
            try:
                output.rename(aside)
            except FileNotFoundError:
                pass  # another process has just moved the same damaged copy
            finally:
                shutil.rmtree(aside, ignore_errors=True)
