"""Libri2Mix as rows, for sd."""

from pathlib import Path

from codecssl.superb.corpora.place import Place, check_files, guarded, make_row, read_lines
from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError

KALDI_FILES = ("wav.scp", "segments", "utt2spk", "reco2dur")


def sd_rows(place: Place) -> list[ManifestRow]:
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


def _kaldi(place: Place, split: str, folder: Path) -> list[ManifestRow]:
    waves, durations, speakers = (_table(folder / name) for name in ("wav.scp", "reco2dur", "utt2spk"))

    def segment(line: str) -> tuple[str, ManifestRow]:
        utterance, name, start, end = line.split()
        begin, stop = float(start), float(end)
        found = {"speaker": speakers[utterance], "start": begin, "end": stop}
        if name not in waves or not 0 <= begin < stop:
            raise ValueError(f"{name} is not in wav.scp" if name not in waves else "the end is not after the start")
        return name, found

    segments: dict[str, list[ManifestRow]] = {name: [] for name in waves}
    for name, found in read_lines(folder / "segments", segment, "`utterance mixture start end`, with a speaker"):
        segments[name].append(found)
    if empty := [name for name in waves if not segments[name]]:
        raise UserError(f"{folder}/segments: no segment of {empty[0]} ({len(empty)} in all); make the folder again")
    paths = {name: _moved(place, Path(wave)) for name, wave in waves.items()}
    check_files(paths.values(), folder / "wav.scp")
    seconds = {}
    for name in waves:
        with guarded(f"{folder}/reco2dur", f"{name} {durations.get(name)}", "`mixture seconds`"):
            seconds[name] = float(durations[name])
    return [
        make_row("sd", split, paths[name], id=name, seconds=seconds[name], segments=segments[name]) for name in waves
    ]


def _table(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a Kaldi folder has {', '.join(KALDI_FILES)}")
    return dict(read_lines(path, _pair, "`name value`"))


def _pair(line: str) -> tuple[str, str]:
    name, value = line.split(maxsplit=1)
    return name, value


def _moved(place: Place, wave: Path) -> Path:
    """Return the file of wav.scp. If it is missing, return the one under root with the same path from wav16k on."""
    if not wave.is_file() and "wav16k" in wave.parts:
        tail = Path(*wave.parts[wave.parts.index("wav16k") :])
        for folder in (place.root, place.root / "Libri2Mix"):
            if (folder / tail).is_file():
                return (folder / tail).absolute()
    return wave.absolute()
