"""VoxCeleb1 as rows, for sid and asv, and the verification trials of asv."""

import re
from pathlib import Path

from codecssl.superb.corpora.place import Place, check_files, make_row, read_lines
from codecssl.superb.rows import ManifestRow, TrialLine

SPLIT_LIST = "iden_split.txt"
SPLIT_SOURCE = "robots.ox.ac.uk/~vgg/data/voxceleb/meta"
TRIAL_LISTS = ("voxceleb1_test_v2.txt", "veri_test2.txt")
"""Trial lists of Vox1-O: the one that s3prl reads, from openslr.org/49, and the cleaned one of VoxCeleb's site."""
CODES = {"1": "train", "2": "valid", "3": "test"}
ASV_TEST = range(10270, 10310)
"""Numbers of the 40 test speakers of Vox1-O."""


def sid_rows(place: Place) -> list[ManifestRow]:
    """VoxCeleb1 by the official identification split: `speaker` (id10001), `label` (speaker_0, s3prl's name)."""
    return [
        make_row("sid", CODES[code], path, id=_dashed(name), speaker=name[:7], label=_label(name))
        for code, name, path in _voxceleb(place)
    ]


def asv_rows(place: Place) -> list[ManifestRow]:
    """VoxCeleb1: train is every utterance of the 1,211 development speakers, test those of the 40 others."""
    return [
        make_row("asv", _asv_split(name), path, id=name.replace("/", "-"), speaker=name[:7])
        for _, name, path in _voxceleb(place)
    ]


def asv_trials(place: Place) -> list[TrialLine]:
    """Return the trials of Vox1-O (1 for the same speaker or 0, path, path), with absolute paths."""
    corpus = _voxceleb_folder(place)
    source = "openslr.org/49 or VoxCeleb's site"
    listed = place.file(TRIAL_LISTS, source, corpus)
    trials = read_lines(listed, _trial, "`1 or 0, file, file` with files as id10001/VIDEO/00001.wav")
    names = {name for trial in trials for name in trial[1:]}
    paths = {name: corpus / "test" / "wav" / name for name in sorted(names)}
    check_files(paths.values(), listed)
    return [(same, str(paths[one]), str(paths[other])) for same, one, other in trials]


def _trial(line: str) -> tuple[int, str, str]:
    same, one, other = line.split()
    return ("0", "1").index(same), _name(one), _name(other)


def _name(written: str) -> str:
    """Return a file as id10001/VIDEO/00001.wav. Some copies of the lists have `wav/` before it."""
    name = written.replace("\\", "/").removeprefix("./").removeprefix("wav/")
    if not re.fullmatch(r"id\d{5}/[^/]+/[^/]+\.wav", name):
        raise ValueError(f"{written} does not begin with a speaker as id10001")
    return name


def _voxceleb_folder(place: Place) -> Path:
    return place.corpus("VoxCeleb1", ("VoxCeleb1", "Voxceleb1", "voxceleb1"), ("dev/wav", "test/wav"))


def _voxceleb(place: Place) -> list[tuple[str, str, Path]]:
    """Read (code, name as id10001/video/00001.wav, path) from the official list."""
    corpus = _voxceleb_folder(place)
    listed = place.file((SPLIT_LIST,), SPLIT_SOURCE, corpus)
    entries = read_lines(listed, _entry, "`1, 2 or 3, file` with a file as id10001/VIDEO/00001.wav")
    found = [(code, name, _under(corpus, name)) for code, name in entries]
    check_files((path for _, _, path in found), listed)
    return found


def _entry(line: str) -> tuple[str, str]:
    code, name = line.split()
    if code not in CODES:
        raise ValueError(f"{code} is no split")
    return code, _name(name)


def _under(corpus: Path, name: str) -> Path:
    return corpus / ("test" if _number(name) in ASV_TEST else "dev") / "wav" / name


def _number(name: str) -> int:
    return int(name[2:7])


def _asv_split(name: str) -> str:
    return "test" if _number(name) in ASV_TEST else "train"


def _dashed(name: str) -> str:
    return name.replace("/", "-").removesuffix(".wav")


def _label(name: str) -> str:
    return f"speaker_{_number(name) - 10001}"
