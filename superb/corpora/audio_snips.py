"""Audio SNIPS as rows, for sf."""

import re

from codecssl.superb.corpora.place import Place, guarded, make_row, read_text, sound_files
from codecssl.superb.rows import ManifestRow

SNIPS_SPEAKERS = {
    "train": ("Ivy", "Joanna", "Joey", "Justin", "Kendra", "Kimberly", "Matthew", "Salli"),
    "valid": ("Aditi", "Amy", "Geraint", "Nicole"),
    "test": ("Brian", "Emma", "Raveena", "Russell"),
}
PUNCTUATION = "?!.,;-–…"


def sf_rows(place: Place) -> list[ManifestRow]:
    """Audio SNIPS: `text` and `iob`, one tag a word, punctuation dropped; SUPERB's speakers in each split."""
    name = "all.iob.snips.txt"
    corpus = place.corpus("Audio SNIPS", ("SNIPS", "audio_slu", "SNIPS/audio_slu"), ("train", "valid", "test"))
    source = "s3prl's preprocess/snips_prepare_data.sh, which makes it from aws-lex-noisy-spoken-language-understanding"
    listed = place.file((name,), source, corpus, corpus.parent)
    lines = {line.split(" ", 1)[0]: (number, line) for number, line in enumerate(read_text(listed).split("\n"), 1)}
    rows = []
    for split, speakers in SNIPS_SPEAKERS.items():
        for path in sound_files(corpus / split, "*.wav"):
            speaker = path.stem.split("-")[0]
            if path.stem in lines and speaker in speakers:
                number, line = lines[path.stem]
                with guarded(f"{listed}:{number}", line, "`ID BOS word ... EOS<tab>O tag ... intent`"):
                    rows.append(make_row("sf", split, path, id=path.stem, speaker=speaker, **_snips_labels(line)))
    return rows


def _snips_labels(line: str) -> dict[str, str]:
    """Parse text, iob and intent of `ID BOS word ... EOS<tab>O tag ... intent`."""
    _, _, rest = line.strip().partition(" ")
    sentence, tab, labels = rest.partition("\t")
    tags = labels.strip().split(" ")
    words = _plain(" ".join(sentence.strip().split(" ")[1:-1])).split(" ")
    if not tab or len(words) != len(tags) - 2:
        raise ValueError(f"{len(words)} words and {len(tags) - 2} tags")
    kept = [(word, tag) for word, tag in zip(words, tags[1:-1], strict=True) if word not in PUNCTUATION]
    text, iob = (" ".join(column) for column in zip(*kept, strict=True))
    return {"text": text, "iob": iob, "intent": tags[-1]}


def _plain(text: str) -> str:
    """Reduce the text to the letters of SUPERB's vocabulary for sf. The table of accents is s3prl's own."""
    from codecssl.superb.patches import import_patches

    import_patches.install()
    from s3prl.problem.asr.superb_sf import translator

    for old, new in (("楽園追放", "EXPELLED"), ("官方杂志", ""), ("–", "-"), ("&", " AND ")):
        text = text.replace(old, new)
    return re.sub(" +", " ", text.translate(translator)).strip(" ")
