"""Corpora about who speaks and how, as rows: VoxCeleb1 for sid and asv, Libri2Mix for sd, IEMOCAP for er."""

import json
from pathlib import Path

from codecssl.superb.corpora.place import Place, Row, check_files, make_row, read_lines
from codecssl.tokenize.common.errors import UserError

Trial = tuple[int, str, str]

SPLIT_LIST = "iden_split.txt"
SPLIT_SOURCE = "robots.ox.ac.uk/~vgg/data/voxceleb/meta"
TRIAL_LISTS = ("voxceleb1_test_v2.txt", "veri_test2.txt")
"""The cleaned list of Vox1-O under the names that openslr.org/49 and VoxCeleb's site give it."""
CODES = {"1": "train", "2": "valid", "3": "test"}
ASV_TEST = range(10270, 10310)
"""Numbers of the 40 test speakers of Vox1-O."""

KALDI_FILES = ("wav.scp", "segments", "utt2spk", "reco2dur")
SESSIONS = 5
VALID_SHARE = 0.2


def sid_rows(place: Place) -> list[Row]:
    """VoxCeleb1 by the official identification split: `speaker` (id10001), `label` (speaker_0, s3prl's name)."""
    return [
        make_row("sid", CODES[code], path, id=_dashed(name), speaker=name[:7], label=_label(name))
        for code, name, path in _voxceleb(place)
    ]


def asv_rows(place: Place) -> list[Row]:
    """VoxCeleb1: train is every utterance of the 1,211 development speakers, test those of the 40 others."""
    return [
        make_row("asv", _asv_split(name), path, id=name.replace("/", "-"), speaker=name[:7])
        for _, name, path in _voxceleb(place)
    ]


def asv_trials(place: Place) -> list[Trial]:
    """(1 for the same speaker or 0, path, path), paths absolute; Vox1-O, cleaned."""
    corpus = _voxceleb_folder(place)
    source = "openslr.org/49 or VoxCeleb's site (veri_test.txt is the uncleaned list, not SUPERB's)"
    listed = place.file(TRIAL_LISTS, source, corpus)
    trials = [line.split() for line in read_lines(listed)]
    if any(len(trial) != 3 or trial[0] not in "01" for trial in trials):
        raise UserError(f"{listed}: a line is not `1 or 0, file, file`; get the list again")
    names = {name for trial in trials for name in trial[1:]}
    paths = {name: corpus / "test" / "wav" / name for name in sorted(names)}
    check_files(paths.values(), listed)
    return [(int(same), str(paths[one]), str(paths[other])) for same, one, other in trials]


def _voxceleb_folder(place: Place) -> Path:
    return place.corpus("VoxCeleb1", ("VoxCeleb1", "Voxceleb1", "voxceleb1"), ("dev/wav", "test/wav"))


def _voxceleb(place: Place) -> list[tuple[str, str, Path]]:
    """(code, name as id10001/video/00001.wav, path) of the official list."""
    corpus = _voxceleb_folder(place)
    listed = place.file((SPLIT_LIST,), SPLIT_SOURCE, corpus)
    entries = [line.split() for line in read_lines(listed)]
    if any(len(entry) != 2 or entry[0] not in CODES for entry in entries):
        raise UserError(f"{listed}: a line is not `1, 2 or 3, file`; get the list again")
    found = [(code, name, _under(corpus, name)) for code, name in entries]
    check_files((path for _, _, path in found), listed)
    return found


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


def sd_rows(place: Place) -> list[Row]:
    """Libri2Mix's mixtures from Kaldi folders train, dev and test: `segments` (speaker, start, end), `seconds`."""
    folders = [place.root, place.root / "data", place.root / "Libri2Mix", place.root / "Libri2Mix" / "data"]
    folders = [place.side, place.side / "data", *folders] if place.side else folders
    kaldi = [f for f in folders if all((f / part / "segments").is_file() for part in ("train", "dev", "test"))]
    if not kaldi:
        raise UserError(
            f"train/segments, dev/segments and test/segments: not in {', '.join(map(str, folders))}; SUPERB's "
            "fork of LibriMix writes them (s3prl/LibriMix, scripts/prepare_diarization.py); give --side their folder"
        )
    parts = (("train", "train"), ("valid", "dev"), ("test", "test"))
    return [row for split, part in parts for row in _kaldi(place, split, kaldi[0] / part)]


def _kaldi(place: Place, split: str, folder: Path) -> list[Row]:
    waves, durations, speakers = (_table(folder / name) for name in ("wav.scp", "reco2dur", "utt2spk"))
    segments: dict[str, list[Row]] = {name: [] for name in waves}
    for line in read_lines(folder / "segments"):
        try:
            utterance, name, start, end = line.split()
            segments[name].append({"speaker": speakers[utterance], "start": float(start), "end": float(end)})
        except (ValueError, KeyError) as error:
            raise UserError(f"{folder}/segments: {line!r} does not fit wav.scp and utt2spk ({error})") from error
    paths = {name: _moved(place, Path(wave)) for name, wave in waves.items()}
    check_files(paths.values(), folder / "wav.scp")
    return [
        make_row("sd", split, paths[name], id=name, seconds=float(durations[name]), segments=segments[name])
        for name in waves
    ]


def _table(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(f"{path}: not there; a Kaldi folder has {', '.join(KALDI_FILES)}")
    entries = [line.strip().split(maxsplit=1) for line in read_lines(path)]
    return {entry[0]: entry[-1] for entry in entries}


def _moved(place: Place, wave: Path) -> Path:
    """The file of wav.scp; where it is gone, the one under root whose path ends the same from wav16k on."""
    if not wave.is_file() and "wav16k" in wave.parts:
        tail = Path(*wave.parts[wave.parts.index("wav16k") :])
        for folder in (place.root, place.root / "Libri2Mix"):
            if (folder / tail).is_file():
                return (folder / tail).absolute()
    return wave.absolute()


def er_rows(place: Place) -> list[Row]:
    """IEMOCAP's four classes: `label` (neu, hap with exc, ang, sad), `speaker`, `fold` 1 to 5, the session.

    `fold_splits` is the split of the row in each of the five folds, keyed by the tested fold as a string; in
    `splits` stands fold 1's. A fifth of the four other sessions is valid, drawn with SUPERB's generator and seed.
    """
    corpus = place.corpus("IEMOCAP", ("IEMOCAP", "IEMOCAP_full_release"), ("Session1", f"Session{SESSIONS}"))
    rows: dict[str, Row] = {}
    for fold in range(1, SESSIONS + 1):
        train, test = (_session_list(place, corpus, fold, part) for part in ("train", "test"))
        for split, entries in zip(("train", "valid", "test"), (*_halves(train), test), strict=True):
            for entry in entries:
                row = rows.setdefault(entry["path"], _emotion(corpus, entry))
                row["fold_splits"][str(fold)] = split
    for row in rows.values():
        row["splits"] = {"er": row["fold_splits"]["1"]}
    check_files((Path(row["path"]) for row in rows.values()), corpus)
    return list(rows.values())


def _session_list(place: Place, corpus: Path, fold: int, part: str) -> list[dict[str, str]]:
    source = (
        "the dataset s3prl/iemocap_split on the Hugging Face hub, or make it by `python -m s3prl.downstream."
        "emotion.IEMOCAP_preprocess IEMOCAP`, whose order, and so the validation part, depends on the disk,"
    )
    name = f"Session{fold}/{part}_meta_data.json"
    listed = place.file((name, f"iemocap_split/{name}", f"meta_data/{name}"), source, corpus)
    try:
        entries: list[dict[str, str]] = json.loads(listed.read_text(encoding="utf-8"))["meta_data"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{listed}: no JSON object with a list meta_data ({error}); get it again") from error
    return entries


def _halves(entries: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """SUPERB's random split into train and valid: torch's generator, seed 0."""
    import torch

    length = int((1 - VALID_SHARE) * len(entries))
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0)).tolist()
    return [entries[i] for i in order[:length]], [entries[i] for i in order[length:]]


def _emotion(corpus: Path, entry: dict[str, str]) -> Row:
    path = corpus / entry["path"]
    columns = {"label": entry["label"].replace("exc", "hap"), "speaker": path.stem.split("_")[0]}
    return {
        **make_row("er", "", path, id=path.stem, fold=int(path.stem[3:5]), **columns),
        "fold_splits": {},
    }
