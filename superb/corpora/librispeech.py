"""LibriSpeech as rows, for asr and pr."""

from pathlib import Path

from codecssl.superb.corpora.place import Place, check_files, make_row, read_lines, sound_files
from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError

LIBRISPEECH = {"train": "train-clean-100", "valid": "dev-clean", "test": "test-clean"}
LEXICONS = ("librispeech-lexicon-200k-g2p.txt", "librispeech-lexicon-allothers-g2p.txt")
"""Lexicons, read in this order. The first pronunciation of a word is used."""


def asr_rows(place: Place) -> list[ManifestRow]:
    """LibriSpeech: `text` and `speaker`; train-clean-100, dev-clean and test-clean."""
    corpus = place.corpus("LibriSpeech", ("LibriSpeech",), tuple(LIBRISPEECH.values()))
    rows = []
    for split, folder in LIBRISPEECH.items():
        texts = _transcripts(corpus / folder)
        for path in sound_files(corpus / folder, "*.flac"):
            if path.stem not in texts:
                raise UserError(f"{path}: no line in {path.parent.name}'s .trans.txt; unpack {folder} again")
            speaker = path.stem.split("-")[0]
            rows.append(make_row("asr", split, path, id=path.stem, speaker=speaker, text=texts[path.stem]))
    return rows


def _transcripts(folder: Path) -> dict[str, str]:
    """Text of each utterance. Raises UserError if one of them has no audio file."""
    texts: dict[str, str] = {}
    for listed in sound_files(folder, "*.trans.txt"):
        own = dict(read_lines(listed, _transcript, "`utterance TEXT`"))
        check_files((listed.parent / f"{name}.flac" for name in own), listed)
        texts |= own
    return texts


def _transcript(line: str) -> tuple[str, str]:
    name, text = line.split(maxsplit=1)
    return name, text


def pr_rows(place: Place) -> list[ManifestRow]:
    """Return the rows of asr with `phones`, looked up word by word in the lexicons of SUPERB's PR."""
    rows = asr_rows(place)
    corpus = Path(rows[0]["path"]).parents[3] if rows else place.root
    source = "the dataset s3prl/g2p, folder lexicon, on the Hugging Face hub"
    files = [place.file((name,), source, corpus) for name in LEXICONS]
    lexicon = _lexicon(files)
    for row in rows:
        row["task"], row["splits"] = "pr", {"pr": row["splits"]["asr"]}
        try:
            row["phones"] = [phone for word in row["text"].upper().split() for phone in lexicon[word]]
        except KeyError as error:
            raise UserError(f"word {error} of {row['id']}: in no lexicon of {files[0].parent}; add a line") from error
    return rows


def _lexicon(files: list[Path]) -> dict[str, list[str]]:
    lexicon: dict[str, list[str]] = {}
    for file in files:
        for word, phones in read_lines(file, _pronunciation, "`WORD phone ...`"):
            lexicon.setdefault(word, phones)
    return lexicon


def _pronunciation(line: str) -> tuple[str, list[str]]:
    word, first, *others = line.split()
    return word, [first, *others]
