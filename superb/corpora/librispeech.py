"""Corpora of transcribed speech as rows: LibriSpeech for asr and pr, Audio SNIPS for sf."""

import re
from pathlib import Path

from codecssl.superb.corpora.place import Place, Row, make_row, read_lines
from codecssl.tokenize.common.errors import UserError

LIBRISPEECH = {"train": "train-clean-100", "valid": "dev-clean", "test": "test-clean"}
LEXICONS = ("librispeech-lexicon-200k-g2p.txt", "librispeech-lexicon-allothers-g2p.txt")
"""Both are read, in this order; a word's first pronunciation counts."""

SNIPS_SPEAKERS = {
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "valid": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
PUNCTUATION = "?!.,;-–…"


def asr_rows(place: Place) -> list[Row]:
    """LibriSpeech: `text` and `speaker`; train-clean-100, dev-clean and test-clean."""
    corpus = place.corpus("LibriSpeech", ("LibriSpeech",), tuple(LIBRISPEECH.values()))
    rows = []
    for split, folder in LIBRISPEECH.items():
        texts = dict(_transcripts(corpus / folder))
        for path in sorted((corpus / folder).rglob("*.flac"), key=lambda path: path.stem):
            if path.stem not in texts:
                raise UserError(f"{path}: no line in {path.parent.name}'s .trans.txt; unpack {folder} again")
            speaker = path.stem.split("-")[0]
            rows.append(make_row("asr", split, path, id=path.stem, speaker=speaker, text=texts[path.stem]))
    return rows


def _transcripts(folder: Path) -> list[tuple[str, str]]:
    lines = [line for path in folder.rglob("*.trans.txt") for line in read_lines(path)]
    return [(name, text) for name, _, text in (line.partition(" ") for line in lines)]


def pr_rows(place: Place) -> list[Row]:
    """The rows of asr with `phones`, looked up word by word in the lexicons that SUPERB's PR uses."""
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
    for line in (line for file in files for line in read_lines(file)):
        word, *phones = line.split()
        lexicon.setdefault(word, phones)
    return lexicon


def sf_rows(place: Place) -> list[Row]:
    """Audio SNIPS: `text` and `iob`, one tag a word, punctuation dropped; SUPERB's speakers in each split."""
    name = "all.iob.snips.txt"
    corpus = place.corpus("Audio SNIPS", ("SNIPS", "audio_slu", "SNIPS/audio_slu"), ("train", "valid", "test"))
    source = "s3prl's preprocess/snips_prepare_data.sh, which makes it from aws-lex-noisy-spoken-language-understanding"
    listed = place.file((name,), source, corpus, corpus.parent)
    labels = {line.split(" ", 1)[0]: line for line in read_lines(listed)}
    rows = []
    for split, speakers in SNIPS_SPEAKERS.items():
        for path in sorted((corpus / split).rglob("*.wav"), key=lambda path: path.stem):
            speaker = path.stem.split("-")[0]
            if path.stem in labels and speaker in speakers:
                columns = _snips_labels(labels[path.stem], listed)
                rows.append(make_row("sf", split, path, id=path.stem, speaker=speaker, **columns))
    return rows


def _snips_labels(line: str, listed: Path) -> dict[str, str]:
    """text, iob and intent of `ID BOS word ... EOS<tab>O tag ... intent`."""
    name, _, rest = line.strip().partition(" ")
    sentence, tab, labels = rest.partition("\t")
    tags = labels.strip().split(" ")
    words = _plain(" ".join(sentence.strip().split(" ")[1:-1])).split(" ")
    if not tab or len(words) != len(tags) - 2:
        raise UserError(f"{listed}: {name} has {len(words)} words and {len(tags) - 2} tags; make the file again")
    kept = [(word, tag) for word, tag in zip(words, tags[1:-1], strict=True) if word not in PUNCTUATION]
    text, iob = (" ".join(column) for column in zip(*kept, strict=True))
    return {"text": text, "iob": iob, "intent": tags[-1]}


def _plain(text: str) -> str:
    """The text in the letters that SUPERB's vocabulary for sf has; the table of accents is s3prl's own."""
    from codecssl.superb.patches import import_patches

    import_patches.install()
    from s3prl.problem.asr.superb_sf import translator

    for old, new in (("楽園追放", "EXPELLED"), ("官方杂志", ""), ("–", "-"), ("&", " AND ")):
        text = text.replace(old, new)
    return re.sub(" +", " ", text.translate(translator)).strip(" ")
