"""Trials of verification: read, or made by a rule; the same each time."""

from itertools import combinations
from pathlib import Path

import pytest

from codecssl.superb.corpora.asv_trials import MOST_PAIRS, Trial, paired, read_trials
from codecssl.superb.corpora.corpus import Example
from codecssl.tokenize.common.errors import UserError


def examples_of(counts: dict[str, int]) -> list[Example]:
    return [
        Example(id=f"{name}{i}", path=Path(f"/c/{name}{i}.wav"), columns={"spk": name})
        for name, count in counts.items()
        for i in range(count)
    ]


def test_all_pairs_of_one_speaker_and_as_many_of_two() -> None:
    examples = examples_of({"a": 4, "b": 3, "c": 9})
    trials = paired(examples)
    speaker = {str(example.path): example.columns["spk"] for example in examples}
    assert all((speaker[t.enrol] == speaker[t.test]) == t.same for t in trials)
    same = [frozenset((t.enrol, t.test)) for t in trials if t.same]
    different = [frozenset((t.enrol, t.test)) for t in trials if not t.same]
    files = sorted(speaker)
    assert set(same) == {frozenset(pair) for pair in combinations(files, 2) if speaker[pair[0]] == speaker[pair[1]]}
    assert len(different) == len(same) == len(set(different)) == 6 + 3 + 36
    assert paired(examples[::-1]) == trials
    assert paired(examples, seed=1) != trials


def test_few_pairs_of_two_speakers_and_too_many_of_one() -> None:
    lopsided = paired(examples_of({"a": 10, "b": 1}))
    assert [sum(t.same is label for t in lopsided) for label in (True, False)] == [45, 10]
    many = paired(examples_of({"a": 150, "b": 150}))
    assert [sum(t.same is label for t in many) for label in (True, False)] == [MOST_PAIRS, MOST_PAIRS]


def test_a_single_speaker_gives_no_trial() -> None:
    with pytest.raises(UserError, match="two speakers with two utterances"):
        paired(examples_of({"a": 4}))


def test_a_list_is_read(tmp_path: Path) -> None:
    examples = [Example(id=n, path=(tmp_path / f"{n}.wav").resolve(), columns={"spk": n}) for n in "ab"]
    listed = tmp_path / "trials.txt"
    listed.write_text("1 a.wav a.wav\n0 a.wav b.wav\n")
    a, b = (str(example.path) for example in examples)
    assert read_trials(listed, examples) == [Trial(same=True, enrol=a, test=a), Trial(same=False, enrol=a, test=b)]
    for text, message in (
        ("2 a.wav b.wav\n", r"trials.txt:1: not `label path path`"),
        ("1 a.wav c.wav\n", r"trials.txt:1: .*c.wav: not an asv test utterance"),
        ("1 a.wav a.wav\n", "make no pairs of both kinds"),
    ):
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            read_trials(listed, examples)
