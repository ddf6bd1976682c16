"""IEMOCAP as rows, for er."""

import json
from pathlib import Path

from codecssl.superb.corpora.place import Place, check_files, guarded, make_row, read_text
from codecssl.superb.rows import ManifestRow

SESSIONS = 5
LABELS = ("neu", "hap", "exc", "ang", "sad")
VALID_SHARE = 0.2


def er_rows(place: Place) -> list[ManifestRow]:
    """IEMOCAP's four classes: `label` (neu, hap with exc, ang, sad), `speaker`, `fold` 1 to 5, the session.

    `fold_splits` maps the tested fold, as a string, to the split of the row. `splits` holds that of fold 1. A fifth
    of the four other sessions is valid, drawn with SUPERB's generator and seed.
    """
    corpus = place.corpus("IEMOCAP", ("IEMOCAP", "IEMOCAP_full_release"), ("Session1", f"Session{SESSIONS}"))
    rows: dict[str, ManifestRow] = {}
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
    entries = []
    with guarded(str(listed), "", "a JSON object with a list meta_data"):
        written = list(json.loads(read_text(listed))["meta_data"])
    for number, entry in enumerate(written, start=1):
        with guarded(f"{listed}: entry {number}", entry, f"a path and a label of {', '.join(LABELS)}"):
            path = str(entry["path"]).replace("\\", "/")
            if entry["label"] not in LABELS or not 1 <= int(Path(path).stem[3:5]) <= SESSIONS:
                raise ValueError("another label, or no session in the name")
            entries.append({"path": path, "label": str(entry["label"])})
    return entries


def _halves(entries: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """SUPERB's random split into train and valid: torch's generator, seed 0."""
    import torch

    length = int((1 - VALID_SHARE) * len(entries))
    order = torch.randperm(len(entries), generator=torch.Generator().manual_seed(0)).tolist()
    return [entries[i] for i in order[:length]], [entries[i] for i in order[length:]]


def _emotion(corpus: Path, entry: dict[str, str]) -> ManifestRow:
    path = corpus / entry["path"]
    columns = {"label": entry["label"].replace("exc", "hap"), "speaker": path.stem.split("_")[0]}
    return {
        **make_row("er", "", path, id=path.stem, fold=int(path.stem[3:5]), **columns),
        "fold_splits": {},
    }
