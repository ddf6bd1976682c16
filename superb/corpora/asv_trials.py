"""Trials of speaker verification: pairs of test utterances of the same or of different speakers."""

import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from codecssl.superb.corpora.corpus import Example, TaskCorpus
from codecssl.tokenize.common.errors import UserError

LISTED = "trials.txt"
"""File next to the manifest with lines `label path path`; label 1: the same speaker."""
MOST_PAIRS = 20_000
"""Maximum number of trials of the same speaker. VoxCeleb1's own list has 18,860."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Two files, with a label for the same speaker."""

    same: bool
    enrol: str
    test: str


def trials_of(corpus: TaskCorpus, tested: list[Example]) -> list[Trial]:
    """Return the official list for an official corpus, ROOT/trials.txt if it exists, else `paired`."""
    if corpus.official:
        from codecssl.superb.corpora.official import official_trials

        found = official_trials(corpus.root, corpus.side)
        return [Trial(same=bool(label), enrol=str(one), test=str(two)) for label, one, two in found]
    listed = corpus.root / LISTED
    return read_trials(listed, tested) if listed.is_file() else paired(tested)


def read_trials(path: Path, tested: list[Example]) -> list[Trial]:
    """Read trials; paths are relative to the list's folder. Raises UserError for a malformed line or a foreign file."""
    known, trials = {str(example.path) for example in tested}, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise UserError(f"{path}:{number}: not `label path path` with label 0 or 1; correct it")
        files = [str((path.parent / name).resolve()) for name in fields[1:]]
        if unknown := [file for file in files if file not in known]:
            raise UserError(f"{path}:{number}: {unknown[0]}: not an asv test utterance of the manifest; add it there")
        trials.append(Trial(same=fields[0] == "1", enrol=files[0], test=files[1]))
    return _both_kinds(trials, path)


def paired(tested: list[Example], seed: int = 0) -> list[Trial]:
    """Return all pairs of the same speaker (a sample if above 20,000) and as many pairs of different speakers.

    Both are drawn from the sorted files with `seed`. The same utterances give the same trials.
    """
    by_speaker: dict[str, list[str]] = defaultdict(list)
    for example in sorted(tested, key=lambda example: str(example.path)):
        by_speaker[example.columns["spk"]].append(str(example.path))
    draw = random.Random(seed)
    same = [pair for speaker in sorted(by_speaker) for pair in combinations(by_speaker[speaker], 2)]
    same = draw.sample(same, MOST_PAIRS) if len(same) > MOST_PAIRS else same
    different = _crossed(by_speaker, len(same), draw)
    kinds = ((True, same), (False, different))
    trials = [Trial(same=label, enrol=a, test=b) for label, pairs in kinds for a, b in pairs]
    return _both_kinds(trials, "the asv test utterances")


def _crossed(by_speaker: dict[str, list[str]], count: int, draw: random.Random) -> list[tuple[str, str]]:
    """Draw `count` distinct pairs of different speakers, or all if there are fewer."""
    files = [(speaker, file) for speaker in sorted(by_speaker) for file in by_speaker[speaker]]
    total = (len(files) ** 2 - sum(len(own) ** 2 for own in by_speaker.values())) // 2
    if total <= 2 * count:
        pairs = [(a, b) for (s, a), (t, b) in combinations(files, 2) if s != t]
        return draw.sample(pairs, min(count, len(pairs)))
    found: dict[tuple[str, str], None] = {}
    while len(found) < count:
        (s, a), (t, b) = sorted(draw.sample(files, 2))
        if s != t:
            found[a, b] = None
    return list(found)


def _both_kinds(trials: list[Trial], source: object) -> list[Trial]:
    if len({trial.same for trial in trials}) < 2:
        raise UserError(f"task asv: {source} make no pairs of both kinds; two speakers with two utterances are needed")
    return trials
