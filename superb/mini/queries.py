"""Task qbe of mini-SUPERB: spoken words are queries; real sentences with or without them are documents."""

from dataclasses import dataclass

import numpy as np

from codecssl.superb.mini.audio import Wave, at_level
from codecssl.superb.mini.builder import MiniBuilder, require
from codecssl.superb.mini.manifest import by_speaker, by_utterance, keyword_of, pick
from codecssl.superb.mini.spliced_tasks import band_of, by_word, cut, in_a_row, words_of
from codecssl.superb.rows import ManifestRow

HALVES = {"valid": 0.5, "test": 0.5}
FILLERS = 2
"""Number of other words in a document around a word that no sentence contains."""
SHORTEST = 1.0
"""Minimum length in seconds of a keyword clip that is a document by itself."""


@dataclass(frozen=True, kw_only=True)
class SplitWords:
    """Material of a split."""

    clips: dict[str, list[ManifestRow]]
    """Clips of each word."""
    sentences: list[ManifestRow]


@dataclass(frozen=True, kw_only=True)
class Document:
    """Consecutive clips and the terms that they contain."""

    rows: list[ManifestRow]
    terms: set[str]


def qbe(builder: MiniBuilder) -> list[ManifestRow]:
    """Build queries and documents.

    Queries are single words. Documents are sentences with and without these words. For a word that no sentence
    contains, its own clips are documents: unmodified if surrounded by silence, else among other words. Valid and test
    share no clip, no named speaker of words and no speaker of sentences. All audio is limited to the words' band.
    """
    band, parts = band_of(builder), _parts(builder)
    terms = sorted(set(parts["valid"].clips) & set(parts["test"].clips))
    made = [row for split in HALVES for row in _searched(builder, split, terms, parts[split], band)]
    require([row for row in made if row.get("role") == "query"], "words that occur in other clips")
    builder.note(
        "qbe", f"Every clip is limited to the band below {band // 2} Hz, the narrowest of the words' recordings."
    )
    return made


def _parts(builder: MiniBuilder) -> dict[str, SplitWords]:
    words = by_word([row for row in words_of(builder) if not keyword_of(row).startswith("_")])
    voiced = [row for clips in words.values() for row in clips if row["speaker"]]
    speakers = by_speaker(voiced, HALVES, builder.rng("qbe words")) if voiced else {}
    speech = builder.data.speech()
    voices = by_speaker(speech, HALVES, builder.rng("qbe sentences")) if speech else {}
    clips: dict[str, dict[str, list[ManifestRow]]] = {split: {} for split in HALVES}
    for word, rows in words.items():
        unnamed = by_utterance([row for row in rows if not row["speaker"]], HALVES, builder.rng(f"qbe {word}"))
        for split in HALVES:
            found = [row for row in rows if row["speaker"] and speakers[row["speaker"]] == split] + unnamed[split]
            if found:
                clips[split][word] = found
    return {s: SplitWords(clips=clips[s], sentences=[r for r in speech if voices[r["speaker"]] == s]) for s in HALVES}


def _searched(builder: MiniBuilder, split: str, terms: list[str], part: SplitWords, band: int) -> list[ManifestRow]:
    """Build the queries and documents of a split."""
    rng = builder.rng(f"qbe {split}")
    queries = {term: pick(part.clips[term], builder.recipe.qbe_queries, rng) for term in terms}
    documents = _documents(builder, terms, part, queries, rng)
    held = {term for document in documents for term in document.terms}
    made = []
    for term in terms:
        for number, row in enumerate(queries[term] if term in held else []):
            wave, name = cut(builder.audio.read(row, band)), f"{split}-query-{term}-{number}"
            made.append(builder.written("qbe", split, name, wave, row, role="query", query=term))
    for number, document in enumerate(documents):
        wave, first = _sound(builder, document, band, rng), document.rows[0]
        text = {"text": first["plain"]} if first["plain"] else {}
        columns = {"role": "document", "queries": sorted(document.terms), **text}
        made.append(builder.written("qbe", split, f"{split}-document-{number:03d}", wave, first, **columns))
    return made


def _sound(builder: MiniBuilder, document: Document, band: int, rng: np.random.Generator) -> Wave:
    waves = [builder.audio.read(row, band) for row in document.rows]
    return waves[0] if len(waves) == 1 else in_a_row([at_level(wave, -25.0) for wave in waves], rng)


def _documents(
    builder: MiniBuilder,
    terms: list[str],
    part: SplitWords,
    queries: dict[str, list[ManifestRow]],
    rng: np.random.Generator,
) -> list[Document]:
    sentences = [
        Document(rows=[row], terms={term for term in terms if term.upper() in row["plain"].split()})
        for row in part.sentences
    ]
    asked = {row["path"] for rows in queries.values() for row in rows}
    free = {term: [row for row in part.clips[term] if row["path"] not in asked] for term in terms}
    chosen: dict[str, Document] = {}
    for term in terms:
        having = [document for document in sentences if term in document.terms] or _spoken(term, free, rng)
        for document in pick(having, builder.recipe.qbe_documents, rng):
            chosen[document.rows[0]["path"]] = document
    for document in pick([d for d in sentences if not d.terms], builder.recipe.qbe_distractors, rng):
        chosen[document.rows[0]["path"]] = document
    return list(chosen.values())


def _spoken(term: str, free: dict[str, list[ManifestRow]], rng: np.random.Generator) -> list[Document]:
    """Build documents from the word's own clips. Short ones are placed among clips of other words."""
    others = [name for name in sorted(free) if name != term and free[name]]
    documents = []
    for row in free[term]:
        rows, terms = [row], {term}
        if row["seconds"] < SHORTEST and len(others) >= FILLERS:
            for name in (others[i] for i in rng.permutation(len(others))[:FILLERS]):
                rows.append(free[name][int(rng.integers(len(free[name])))])
                terms.add(name)
        documents.append(Document(rows=[rows[i] for i in rng.permutation(len(rows))], terms=terms))
    return documents
