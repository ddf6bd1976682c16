"""Speech Commands as rows, for ks."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from codecssl.superb.corpora.place import Place, guarded, make_row
from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
SILENCE, UNKNOWN, NOISE = "_silence_", "_unknown_", "_background_noise_"
HASH_BUCKETS = 2**27 - 1
"""Hash range of the split by speaker (Warden 2018, "Speech Commands", section 7)."""


def ks_rows(place: Place) -> list[ManifestRow]:
    """Speech Commands v0.01: `keyword` is one of ten commands, `_unknown_` or `_silence_`.

    As in SUPERB: the training tree is split by a hash of the speaker, its hashed test part unused; the test
    set is the separate tree. A row of silence is one second of a longer file: `start` and `end` in seconds.
    The background noise is in train and in valid.
    """
    train = place.corpus("Speech Commands v0.01", ("speech_commands_v0.01",), ("yes", NOISE))
    places = (place.root, train.parent, *([place.side] if place.side else []))
    names = ("speech_commands_test_set_v0.01", "test")
    tests = [folder / name for folder in places for name in names if (folder / name / SILENCE).is_dir()]
    if not tests:
        raise UserError(f"data {place.root}: no speech_commands_test_set_v0.01 next to {train}; unpack it there")
    rows = [row for folder in _folders(train) for row in _training(folder)]
    return rows + [row for folder in _folders(tests[0]) for row in _labelled("test", folder, folder.name)]


def _folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.absolute().iterdir() if folder.is_dir())


def _training(folder: Path) -> Iterator[ManifestRow]:
    if folder.name == NOISE:
        for split in ("train", "valid"):
            yield from _labelled(split, folder, SILENCE)
        return
    keyword = folder.name if folder.name in COMMANDS else UNKNOWN
    for path in _waves(folder):
        split = _hashed_split(path.name)
        if split != "test":
            yield make_row("ks", split, path, id=f"{folder.name}/{path.name}", keyword=keyword)


def _labelled(split: str, folder: Path, keyword: str) -> Iterator[ManifestRow]:
    for path in _waves(folder):
        name = f"{folder.name}/{path.name}"
        if keyword == SILENCE:
            for first, last, rate in _seconds(path):
                part = {"id": f"{name}_{first}_{last}", "start": first / rate, "end": last / rate}
                yield make_row("ks", split, path, keyword=keyword, **part)
        else:
            yield make_row("ks", split, path, id=name, keyword=keyword)


def _waves(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.wav") if not path.name.startswith("._"))


def _seconds(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield (first sample, last, rate) of each second of a file."""
    import soundfile

    with guarded(str(path), "", "audio that can be read"):
        info = soundfile.info(path)
    for first in range(0, info.frames, info.samplerate):
        yield first, min(first + info.samplerate, info.frames), info.samplerate


def _hashed_split(name: str) -> str:
    """Return the split of a speaker by its hash: 10 % valid, 10 % test. All takes of a speaker share a split."""
    digest = hashlib.sha1(re.sub("_nohash_.*$", "", name).encode()).hexdigest()
    percent = int(digest, 16) % (HASH_BUCKETS + 1) * (100.0 / HASH_BUCKETS)
    return "valid" if percent < 10 else "test" if percent < 20 else "train"
