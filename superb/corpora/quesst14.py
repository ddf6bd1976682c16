"""QUESST14 as rows, for qbe."""

import re
from collections import defaultdict
from pathlib import Path

from codecssl.superb.corpora.place import Place, check_files, make_row, read_lines
from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError

ENGLISH = "nnenglish"  # the part of QUESST14 that SUPERB uses


def qbe_rows(place: Place) -> list[ManifestRow]:
    """QUESST14's English part: `role` query has its id in `query`, `role` document its query ids in `queries`.

    Development queries are valid, evaluation queries test. Both search the same documents. A document has two rows,
    each with the queries of its split.
    """
    corpus = place.corpus("QUESST14", ("quesst14Database",), ("scoring", "Audio"))
    documents = _listed(corpus, "language_key_utterances.lst")
    rows = []
    for split, part in (("valid", "dev"), ("test", "eval")):
        queries, held = _listed(corpus, f"language_key_{part}.lst"), _ground_truth(corpus, part)
        known = {path.stem for path in queries}
        for path in queries:
            rows.append(make_row("qbe", split, path, id=path.stem, role="query", query=path.stem))
        for path in documents:
            found = sorted(held[path.stem] & known)
            rows.append(make_row("qbe", split, path, id=f"{part}-{path.stem}", role="document", queries=found))
    return rows


def _listed(corpus: Path, name: str) -> list[Path]:
    listed = corpus / "scoring" / name
    if not listed.is_file():
        raise UserError(f"{listed}: no such file; unpack quesst14Database.tgz again (speech.fit.vutbr.cz)")
    entries = read_lines(listed, _entry, "`folder/file language`")
    paths = [corpus / name for name, language in entries if language == ENGLISH]
    check_files(paths, listed)
    return paths


def _ground_truth(corpus: Path, part: str) -> dict[str, set[str]]:
    """Map document ids to their query ids, from lines `LEXEME document ... query ...` (NIST's RTTM)."""
    path = corpus / "scoring" / f"groundtruth_quesst14_{part}" / f"quesst14_{part}.rttm"
    if not path.is_file():
        raise UserError(f"{path}: no such file; the eval part is its own archive at speech.fit.vutbr.cz")
    held: dict[str, set[str]] = defaultdict(set)

    def lexeme(line: str) -> tuple[str, str] | None:
        query = re.search(rf"\bquesst14_{part}_\d+\b", line)
        return (line.split()[1], query.group()) if line.startswith("LEXEME") and query else None

    for found in read_lines(path, lexeme, "`LEXEME document ... query ...`"):
        if found:
            held[found[0]].add(found[1])
    return held


def _entry(line: str) -> tuple[str, str]:
    name, language = line.replace("\\", "/").split()[:2]
    return name.partition("/")[2], language
