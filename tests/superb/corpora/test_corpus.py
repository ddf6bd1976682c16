"""A corpus: rows by task, split and fold; what can't be used is one clear line or a counted skip."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from codecssl.superb.corpora.corpus import Example, TaskCorpus, chance, open_corpus
from codecssl.superb.tasks import TASKS
from codecssl.tokenize.common.errors import UserError


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"path": "a.flac", "task": "ks", "keyword": "yes"},
            r'manifest.jsonl:1: splits has "ks": None; give one of',
        ),
        ({"path": "a.flac", "task": "ks", "splits": {"ks": "dev"}}, r"'dev'; give one of train, valid, test"),
        (
            {"path": "a.flac", "task": "ks", "splits": "train"},
            r"""splits is 'train'; give an object, {"ks": "train"}""",
        ),
        (
            {"path": "a.flac", "task": "ks", "splits": {"ks": "test"}},
            r"task ks needs the column 'keyword or label'",
        ),
        ({"path": "a.flac", "task": "ks", "splits": {"ks": "test"}, "label": "x"}, r"a.flac: no such file"),
        (
            {"path": "a.flac", "task": "ic", "splits": {"ic": "test"}, "slots": {"action": 1}},
            r"needs the column 'object'",
        ),
        (
            {"path": "a.flac", "task": "sf", "splits": {"sf": "test"}, "text": "a b", "iob": "O"},
            r"task sf: iob has 1 tags for 2 words; correct it",
        ),
        ({"path": "a.flac", "task": "asv", "splits": {"asv": "valid"}}, r"'valid'; give one of train, test"),
        ({"path": "a.flac", "task": "asr"}, r"has no train utterance for it; it has --tasks asr$"),
        ({"task": "ks"}, r"manifest.jsonl:1: not a JSON object with a path"),
    ],
)
def test_a_bad_manifest_is_one_clear_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    name = row.get("task", "ks") if row.get("task") != "asr" else "ks"
    with pytest.raises(UserError, match=message):
        TaskCorpus(tmp_path).examples(TASKS[name])


def test_a_manifest_in_another_encoding_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_bytes('{"path": "ü.wav"}'.encode("latin-1"))
    with pytest.raises(UserError, match="manifest.jsonl: not UTF-8"):
        TaskCorpus(tmp_path).examples(TASKS["ks"])


def test_a_root_without_a_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        TaskCorpus(tmp_path / "none")
    with pytest.raises(UserError, match=r"no manifest\.jsonl in it; as SUPERB's own ks: "):
        TaskCorpus(tmp_path).examples(TASKS["ks"])


def make(root: Path, rows: list[dict[str, Any]], seconds: dict[str, float] | None = None) -> TaskCorpus:
    """A manifest with 0.1 s of silence for each path, or the given number of seconds."""
    for row in rows:
        wave = np.zeros(int(16_000 * (seconds or {}).get(row["path"], 0.1)), "f4")
        soundfile.write(root / row["path"], wave, 16_000)
    (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskCorpus(root)


def keyword(path: str, split: str, label: str = "x") -> dict[str, Any]:
    return {"path": path, "task": "ks", "splits": {"ks": split}, "keyword": label}


def test_a_label_never_seen_in_training_is_named(tmp_path: Path) -> None:
    rows = [keyword("a.wav", "train"), keyword("b.wav", "valid"), keyword("c.wav", "test", "new")]
    with pytest.raises(UserError, match=r"task ks: test label 'new' \(c.wav\) never occurs in training"):
        make(tmp_path, rows).select(TASKS["ks"])


def test_clips_too_short_or_too_long_are_counted(tmp_path: Path) -> None:
    rows = [keyword(f"{name}.wav", "train") for name in "abcd"] + [keyword("v.wav", "valid"), keyword("t.wav", "test")]
    rows[3]["seconds"] = 600.0
    selection = make(tmp_path, rows, {"b.wav": 0.01, "c.wav": 0.03}).select(TASKS["ks"])
    assert selection.skipped == {"shorter than 0.02 s": 1, "longer than 300 s": 1}
    assert [example.path.name for example in selection.splits["train"]] == ["a.wav", "c.wav"]


def test_folds_test_every_row_once_and_follow_superbs_draw(corpus: Path) -> None:
    """Each of five folds is tested once; a fifth of the rest validates, drawn as s3prl draws it."""
    import torch

    tested = []
    for fold in range(1, 6):
        splits = TaskCorpus(corpus).examples(TASKS["er"], fold)
        paths = {split: [example.path.name for example in examples] for split, examples in splits.items()}
        rest = [f"{i:02d}.flac" for i in range(48) if i % 5 + 1 != fold]
        torch.manual_seed(0)
        length = int(0.8 * len(rest))
        train, valid = torch.utils.data.random_split(rest, [length, len(rest) - length])
        assert set(paths["train"]) == set(train)
        assert set(paths["valid"]) == set(valid)
        tested += paths["test"]
    assert sorted(tested) == [f"{i:02d}.flac" for i in range(48)]
    with pytest.raises(UserError, match="fold 6: no row has it"):
        TaskCorpus(corpus).examples(TASKS["er"], 6)


def test_given_fold_splits_count(tmp_path: Path) -> None:
    splits = [{"1": "train", "2": "test"}, {"1": "valid", "2": "train"}, {"1": "test", "2": "valid"}]
    rows = [
        {"path": f"{i}.wav", "task": "er", "splits": {"er": own["1"]}, "label": "a", "fold": 1, "fold_splits": own}
        for i, own in enumerate(splits)
    ]
    corpus = make(tmp_path, rows)
    for fold, own in ((1, "012"), (2, "120")):
        found = corpus.examples(TASKS["er"], fold)
        assert [found[split][0].path.stem for split in ("train", "valid", "test")] == list(own)


def test_a_changed_manifest_is_read_again(tmp_path: Path) -> None:
    import os

    rows = [keyword("a.wav", "train"), keyword("b.wav", "valid"), keyword("c.wav", "test")]
    make(tmp_path, rows)
    assert len(open_corpus(tmp_path).examples(TASKS["ks"])["train"]) == 1
    make(tmp_path, [*rows, keyword("d.wav", "train")])
    os.utime(tmp_path / "manifest.jsonl", ns=(1, 1))
    assert len(open_corpus(tmp_path).examples(TASKS["ks"])["train"]) == 2


def test_chance_answers_the_most_frequent_training_class() -> None:
    def examples(labels: str) -> list[Example]:
        return [Example(id="", path=Path(), columns={"label": label}) for label in labels]

    assert chance({"train": examples("aab"), "test": examples("abbb")}) == 0.25
    intents = [Example(id="", path=Path(), columns={"labels": text}) for text in ("a ; b ; c", "a ; b ; d")]
    assert chance({"train": intents[:1], "test": intents}) == 0.5


def test_only_the_identity_of_verification_contains_the_trials(tmp_path: Path) -> None:
    corpus = make(tmp_path, [keyword("a.wav", "train")])
    before = corpus.identity("asv"), corpus.identity("ks")
    (tmp_path / "trials.txt").write_text("1 a.wav a.wav\n")
    assert corpus.identity("asv") != before[0]
    assert corpus.identity("ks") == before[1]


def test_an_official_layout_needs_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and trials come from `official`; the identity holds the rows with paths under the root."""
    from codecssl.superb.corpora import official
    from codecssl.superb.corpora.asv_trials import Trial, trials_of

    def rows(task: str, root: Path, side: Path | None) -> list[dict[str, Any]]:
        assert side == tmp_path / "side"
        found = []
        for i, split in enumerate(("train", "test", "test", "test")):
            path = root / f"{i}.wav"
            soundfile.write(path, np.zeros(1600, "f4"), 16_000)
            found.append(
                {"path": str(path), "id": f"id{i}", "task": task, "splits": {task: split}, "speaker": "ab"[i % 2]}
            )
        return found

    monkeypatch.setattr(official, "official_rows", rows)
    monkeypatch.setattr(official, "official_trials", lambda root, side: [(1, str(root / "1.wav"), str(root / "3.wav"))])
    one, other = tmp_path / "one", tmp_path / "other"
    for root in (one, other):
        root.mkdir()
    corpora = [TaskCorpus(root, tmp_path / "side") for root in (one, other)]
    assert corpora[0].official
    splits = corpora[0].examples(TASKS["asv"])
    assert [example.id for example in splits["test"]] == ["utt:id1", "utt:id2", "utt:id3"]
    wanted = Trial(same=True, enrol=str(one / "1.wav"), test=str(one / "3.wav"))
    assert trials_of(corpora[0], splits["test"]) == [wanted]
    assert corpora[0].identity("asv") == corpora[1].identity("asv")
    assert corpora[0].identity("asv")["manifest_sha256"] is None
