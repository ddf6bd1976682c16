"""mini-SUPERB: ten tasks, disjoint splits, the same bytes from the same seed, nothing half built.

The source is a manifest made here of clips of the sample corpus, with columns as real corpora have them: speakers
known for some, digits at 8 kHz, orders without transcripts, noises.
"""

import gzip
import io
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from codecssl.superb.cli import main
from codecssl.superb.mini import build as mini
from codecssl.superb.mini.audio import RATE, active, at_level, loudest_part, quiet_part, spans, trimmed
from codecssl.superb.mini.build import build
from codecssl.superb.mini.manifest import by_speaker, by_utterance, plain_text
from codecssl.superb.mini.mixtures import overlapped
from codecssl.superb.mini.recorded_tasks import plain_phones
from codecssl.tokenize.common.errors import UserError

TEN = ("pr", "asr", "ks", "qbe", "sid", "asv", "sd", "ic", "sf", "er")
SOUND = ("env", "inst", "pitch")
DIGIT_VOICES = 4
ORDER_SLOTS = {"action": "verb", "object": "thing", "location": "place"}
RECIPE = """
ks_per_word: [4, 2, 2]
sd_mixtures: [3, 2, 2]
sf_commands: [4, 2, 2]
asv_trials: 30
qbe_distractors: 4
slot_order: [[verb], [thing], [place, time]]
"""
Rows = list[dict[str, Any]]


def _source_row(row: dict[str, Any]) -> dict[str, Any] | None:
    """Row of a clip as in the manifest of a real corpus; None for clips not used."""
    kind, head = row["path"].split("/")[0], {"path": row["path"], "origin": f"source {row['speaker'] > 'spk09'}"}
    if kind == "words" and row["text"] in ("yes", "stop", "left") and row["speaker"] < "spk06":
        return {**head, "task": "kws", "label": row["text"]}
    if kind == "words" and row["task"] == "digits" and row["speaker"] < "spk12":
        digit = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine").index(row["text"])
        return {
            **head,
            "task": "digits,sid",
            "label": str(digit),
            "speaker": f"voice {int(row['speaker'][3:]) % DIGIT_VOICES}",
        }
    if kind in ("sentences", "requests") and row["path"][-6] in "02468":
        text = row["text"].capitalize() + "."
        phones = [f"{phone}_I" for phone in row["phones"]]
        voice = {"speaker": row["speaker"], "gender": row["gender"]}
        if kind == "sentences":
            return {**head, "task": "asr,pr,sid", "text": text, "phones": phones, **voice}
        return {**head, "task": "asr,sid", "text": text, **voice}
    if kind == "commands" and row["speaker"] < "spk09":
        slots = {ORDER_SLOTS[name]: value for name, value in row["slots"].items() if value != "none"}
        return {**head, "task": "ic", "slots": {**slots, "time": f"{row['path'][-6:-5]} o'clock"}}
    if kind == "styles" and row["speaker"] in ("spk00", "spk03", "spk05", "spk08", "spk12", "spk16"):
        return {**head, "task": "er", "label": row["style"], "speaker": row["speaker"]}
    return None


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled manifest and its audio."""
    from codecssl.superb.sample.unpack import ARCHIVE

    folder, lines = tmp_path_factory.mktemp("source"), []
    with tarfile.open(ARCHIVE) as archive:
        members = {m.name: archive.extractfile(m) for m in archive.getmembers()}
        blobs = {name: stream.read() for name, stream in members.items() if stream is not None}
    chosen: dict[str, Rows] = defaultdict(list)
    for line in gzip.decompress(blobs["manifest.jsonl.gz"]).decode().splitlines():
        row = json.loads(line)
        made = _source_row(row) if row.get("speaker") else None
        if row["path"].startswith("silence") and len(chosen[row["bundle"]]) < 10:
            made = {"path": row["path"], "task": "env", "label": f"noise {len(chosen[row['bundle']]) % 2}"}
        if made:
            chosen[row["bundle"]].append({**made, "cut": (row["start"], row["stop"])})
    for bundle, rows in chosen.items():
        speech, _ = soundfile.read(io.BytesIO(blobs[bundle]), dtype="float32")
        for row in rows:
            wave, rate = speech[slice(*row.pop("cut"))], RATE
            if row["task"] == "digits,sid":
                wave, rate = soxr.resample(wave, RATE, 8000), 8000
            path = folder / row["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, wave, rate, subtype="PCM_16")
            lines.append(json.dumps(row))
    lines.append(json.dumps({"path": "gone.flac", "task": "asr", "text": "x", "speaker": "y"}))
    lines.append(json.dumps({"path": "gone.flac", "task": "music"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="session")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    root = tmp_path_factory.mktemp("built") / "mini"
    build(source / "manifest.jsonl", root, seed=3, recipe=str(source / "recipe.yaml"), on_progress=said.append)
    assert [line.split()[0] for line in said] == [*TEN, *SOUND, "1"], said
    assert all("utterances, " in line for line in said[:-1]), said
    assert said[-1] == "1 rows of the manifest left out: no such file"
    return root


@pytest.fixture(scope="session")
def rows(built: Path) -> Rows:
    return [json.loads(line) for line in (built / "manifest.jsonl").read_text().splitlines()]


def of(rows: Rows, task: str, split: str | None = None) -> Rows:
    return [row for row in rows if row["task"] == task and split in (None, row["splits"][task])]


def read(built: Path, row: dict[str, Any]) -> np.ndarray:
    wave, rate = soundfile.read(built / row["path"], dtype="float32")
    assert (rate, wave.ndim) == (RATE, 1)
    assert abs(len(wave) / RATE - row["seconds"]) < 1e-3
    return np.asarray(wave)


def test_the_runner_opens_all_ten_tasks(built: Path) -> None:
    from codecssl.superb.corpora.corpus import open_corpus
    from codecssl.superb.tasks import TASKS

    corpus = open_corpus(built)
    for task in (*TEN, *SOUND):
        splits = corpus.examples(TASKS[task])
        expected = {"qbe": {"valid", "test"}, "asv": {"train", "test"}}.get(task, {"train", "valid", "test"})
        assert {split for split, examples in splits.items() if examples} == expected


def test_no_clip_and_no_speaker_is_in_two_splits(rows: Rows) -> None:
    for task in TEN:
        clips, speakers = defaultdict(set), defaultdict(set)
        for row in of(rows, task):
            clips[row["path"]].add(row["splits"][task])
            for name in row.get("speakers") or [row.get("speaker")]:
                speakers[name].add(row["splits"][task])
        assert all(len(splits) == 1 for splits in clips.values())
        named = {name: splits for name, splits in speakers.items() if name}
        if task == "sid":
            assert all(len(splits) == 3 for splits in named.values())
        elif task != "ic":
            assert named
            assert all(len(splits) == 1 for splits in named.values()), task


def test_texts_of_asr_are_new_in_each_split(rows: Rows) -> None:
    texts = {split: {row["text"] for row in of(rows, "asr", split)} for split in ("train", "valid", "test")}
    assert not texts["train"] & (texts["valid"] | texts["test"])
    assert not texts["valid"] & texts["test"]
    assert all(text == text.upper() and not text.endswith(".") for found in texts.values() for text in found)


def test_trials_are_true_balanced_and_of_tested_speakers(built: Path, rows: Rows) -> None:
    speakers = {row["path"]: row["speaker"] for row in of(rows, "asv")}
    tested = {row["path"]: row for row in of(rows, "asv", "test")}
    trials = [line.split() for line in (built / "trials.txt").read_text().splitlines()]
    assert Counter(label for label, _, _ in trials) == {"1": 30, "0": 30}
    for label, one, other in trials:
        assert (speakers[one] == speakers[other]) == (label == "1")
        assert tested[one]["origin"] == tested[other]["origin"]
        assert tested[one]["gender"] == tested[other]["gender"]
    assert {path for _, *both in trials for path in both} == set(tested)
    assert len({tuple(trial) for trial in trials}) == len(trials)


def test_keywords_have_one_band_and_at_most_a_second(built: Path, rows: Rows) -> None:
    words = Counter((row["keyword"], row["splits"]["ks"]) for row in of(rows, "ks"))
    names = {"yes", "stop", "left", "zero", "nine", "_unknown_", "_silence_"}
    assert names < {name for name, _ in words}
    assert len(words) == 3 * (13 + 2)
    assert max(words.values()) == 4
    for row in of(rows, "ks", "test"):
        wave = read(built, row)
        assert len(wave) <= RATE
        power = np.abs(np.fft.rfft(wave.astype(float))) ** 2
        above = power[round(len(power) * 0.55) :].sum() / power.sum()
        assert above < (1e-2 if row["keyword"] == "_silence_" else 1e-3)  # rounding to 16 bits, of quiet clips


def test_silence_clips_are_quieter_than_words(built: Path, rows: Rows) -> None:
    level: dict[bool, list[float]] = {True: [], False: []}
    for row in of(rows, "ks"):
        power = float(np.mean(read(built, row).astype(float) ** 2))
        assert power > 0
        level[row["keyword"] == "_silence_"].append(10 * np.log10(power))
    assert np.median(level[False]) - np.median(level[True]) > 6
    assert max(level[True]) < -25


def test_mixtures_sound_where_segments_say(built: Path, rows: Rows) -> None:
    for row in of(rows, "sd"):
        wave, count = read(built, row), round(row["seconds"] * 100)
        marks = np.zeros((2, count), bool)
        for segment in row["segments"]:
            assert 0 <= segment["start"] < segment["end"] <= row["seconds"] + 0.01
            times = slice(round(segment["start"] * 100), round(segment["end"] * 100))
            marks[row["speakers"].index(segment["speaker"]), times] = True
        level = 10 * np.log10((wave[: count * 160 - 160].reshape(-1, 160).astype(float) ** 2).mean(1) + 1e-12)
        anyone = marks.any(axis=0)[: len(level)]
        assert len(row["speakers"]) == 2
        assert np.median(level[anyone]) > np.median(level[~anyone]) + 15
        assert abs(marks.all(axis=0).sum() / 100 - overlapped(row["segments"])) < 0.1
    assert any(overlapped(row["segments"]) > 0.3 for row in of(rows, "sd"))


def test_documents_hold_the_queries_that_their_text_holds(rows: Rows) -> None:
    for split in ("valid", "test"):
        found = of(rows, "qbe", split)
        queries = {row["query"] for row in found if row["role"] == "query"}
        documents = [row for row in found if row["role"] == "document"]
        assert queries == {term for row in documents for term in row["queries"]}
        for row in (row for row in documents if "text" in row):
            assert set(row["queries"]) == queries & set(row["text"].lower().split())
        assert any(not row["queries"] for row in documents)
        assert all(row["seconds"] > 1 for row in documents)


def test_slots_fit_words_and_are_known_in_training(rows: Rows) -> None:
    for row in of(rows, "sf"):
        words, tags = row["text"].split(), row["iob"].split()
        assert len(words) == len(tags)
        for before, tag in zip(["O", *tags], tags, strict=False):
            assert not tag.startswith("I-") or before[2:] == tag[2:]
        if row["path"].startswith("sf/"):
            assert tags == ["B-device", "B-number", *["I-number"] * (len(tags) - 2)]
        else:
            assert "I-time" in tags
            assert next(tag[2:] for tag in tags if tag.startswith("B-")) in ("verb", "thing", "time")
    for slot in ("action", "object", "location"):
        values = {s: {row["slots"][slot] for row in of(rows, "ic", s)} for s in ("train", "valid", "test")}
        assert values["valid"] | values["test"] <= values["train"]


def test_few_sentences_make_way_for_commands_of_two_words(source: Path, tmp_path: Path) -> None:
    words = ("kws", "digits,sid", "ic")
    lines = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    given = [{**row, "path": str(source / row["path"])} for row in lines if row["task"] in words]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    sentences = sum(row["task"] == "ic" for row in given)
    made = {}
    for least in (sentences, sentences + 1):
        recipe = tmp_path / f"{least}.yaml"
        recipe.write_text(f"{RECIPE}ic_least: {least}\nic_commands: [60, 30, 30]\n")
        root = build(tmp_path / "words.jsonl", tmp_path / str(least), recipe=str(recipe), on_progress=lambda line: None)
        made[least] = of([json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()], "ic")
    assert len(made[sentences]) <= sentences
    assert not any(row["path"].startswith("ic/") for row in made[sentences])
    commands = made[sentences + 1]
    for split, count in (("train", 60), ("valid", 30), ("test", 30)):
        pairs = Counter((row["slots"]["action"], row["slots"]["object"]) for row in of(commands, "ic", split))
        actions, objects = ({pair[i] for pair in pairs} for i in (0, 1))
        assert actions == {"yes", "stop", "left"}
        assert len(objects) >= 2
        assert objects <= {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}
        assert len(pairs) == len(actions) * len(objects)
        assert max(pairs.values()) - min(pairs.values()) <= 1
        assert pairs.total() == count
    voices = {s: {row["speaker"] for row in of(commands, "ic", s)} for s in ("train", "valid", "test")}
    assert not voices["test"] & (voices["train"] | voices["valid"])
    assert all(0.3 < row["seconds"] < 2.9 for row in commands)  # two words of a second at most, three pauses


def test_folds_hold_whole_speakers(rows: Rows) -> None:
    folds = defaultdict(set)
    for row in of(rows, "er"):
        folds[row["speaker"]].add(row["fold"])
        assert row["splits"]["er"] == {1: "test", 2: "valid"}.get(row["fold"], "train")
    assert all(len(found) == 1 for found in folds.values())
    assert set.union(*folds.values()) == {1, 2, 3, 4, 5}


def _content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_seed_decides_every_byte(source: Path, built: Path, tmp_path: Path) -> None:
    recipe = str(source / "recipe.yaml")
    again = build(source, tmp_path / "again", seed=3, recipe=recipe, on_progress=lambda line: None)
    assert _content(again) == _content(built)
    other = build(source, tmp_path / "other", seed=4, recipe=recipe, on_progress=lambda line: None)
    changed = {name for name, content in _content(other).items() if _content(built).get(name) != content}
    assert {"manifest.jsonl", "trials.txt", "sd/train-000.flac", "sf/train-0000.flac"} <= changed
    assert any(name.startswith("ks/") for name in changed)


def test_a_rerun_does_nothing_and_another_recipe_is_refused(
    source: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    build(source / "manifest.jsonl", built, seed=3, recipe=str(source / "recipe.yaml"), on_progress=said.append)
    assert said == [f"{built}: built before from this manifest, seed and recipe; nothing to do"]
    named = ["--output", str(built), "--seed", "3", "--recipe", str(source / "recipe.yaml")]
    assert main(["mini", str(source / "manifest.jsonl"), *named]) == 0
    assert capsys.readouterr().out == f"{said[0]}\n{built}\n"
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    with pytest.raises(UserError, match=r"built from another manifest, seed or recipe, or .*give another folder"):
        build(source / "manifest.jsonl", built, seed=3, on_progress=said.append)


def test_a_kill_leaves_no_output_and_the_next_run_removes_temporary_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(builder: Any) -> Rows:
        assert (tmp_path / ".mini.partial" / "ks").is_dir()  # others were made already
        raise KeyboardInterrupt

    (tmp_path / ".mini.partial").mkdir()
    (tmp_path / ".mini.partial" / "of a killed run").touch()
    monkeypatch.setitem(mini.BUILDERS, "er", die)
    with pytest.raises(KeyboardInterrupt):
        build(source, tmp_path / "mini", recipe=str(source / "recipe.yaml"), on_progress=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_missing_material_is_named(source: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    spoken = [{**row, "path": str(source / row["path"])} for row in lines if row["task"] in ("er", "asr,sid")]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spoken))
    said: list[str] = []
    root = build(tmp_path / "few.jsonl", tmp_path / "few", recipe=str(source / "recipe.yaml"), on_progress=said.append)
    text = (root / "README.md").read_text()
    for task in ("pr", "ks", "qbe", "sid", "ic", "sf"):
        assert any(line.startswith(f"{task:3}  left out: it needs") for line in said)
        assert f"- {task} needs " in text
    assert "- pr needs rows of task pr with phones, text and speaker." in text
    present = {json.loads(line)["task"] for line in (root / "manifest.jsonl").read_text().splitlines()}
    assert present == {"asr", "asv", "sd", "er", *mini.SYNTHESISED}


def test_the_cards_counts_match_the_files(built: Path, rows: Rows) -> None:
    text = (built / "README.md").read_text()
    for task in TEN:
        counts = [len(of(rows, task, split)) for split in ("train", "valid", "test")]
        minutes = sum(row["seconds"] for row in of(rows, task)) / 60
        [line] = [line for line in text.splitlines() if line.startswith(f"| {task} |")]
        assert [cell.strip() for cell in line.split("|")[3:7]] == [*map(str, counts), f"{minutes:.1f}"]
    assert "- 1 rows of the manifest: no such file." in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; give a .jsonl"),
        ("nonsense\n", r"manifest.jsonl:1: not a JSON object with path and task"),
        ('{"path": "a.flac"}\n', r"manifest.jsonl:1: not a JSON object with path and task"),
        ('{"path": "a.flac", "task": "er"}\n', r"nothing to build from \(no such file, 1 times\)"),
        ('{"path": "a.flac", "task": "x"}\n', r"nothing to build from \(no row of a known task\)"),
    ],
)
def test_a_bad_manifest_is_one_clear_line(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    if text is not None:
        (tmp_path / "manifest.jsonl").write_text(text)
    assert main(["mini", str(tmp_path / "manifest.jsonl"), "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"manifest.jsonl"}


def test_a_folder_with_other_content_is_not_changed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match="exists and is not a mini-SUPERB corpus"):
        build(source, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_speakers_are_dealt_by_share() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        sizes = rng.integers(1, 40, size=30)
        rows = [{"speaker": f"s{i}"} for i, size in enumerate(sizes) for _ in range(size)]
        split = by_speaker(rows, {"train": 0.6, "valid": 0.2, "test": 0.2}, np.random.default_rng(seed))
        got = Counter(split[row["speaker"]] for row in rows)
        assert set(split) == {row["speaker"] for row in rows}
        for name, share in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
            assert abs(got[name] / len(rows) - share) < 0.1
    few = [{"speaker": name} for name in "aaaaaaaabbbbbbbccccccccd"]
    for seed in range(20):
        dealt = by_speaker(few, {"train": 0.6, "valid": 0.2, "test": 0.2}, np.random.default_rng(seed))
        assert set(dealt.values()) == {"train", "valid", "test"}
    four = [{"speaker": name} for name in "abcd" for _ in range(300)]
    dealt = by_speaker(four, {"train": 0.6, "valid": 0.2, "test": 0.2}, np.random.default_rng(1))
    assert Counter(dealt.values()) == {"train": 2, "valid": 1, "test": 1}


def test_every_label_occurs_in_training() -> None:
    rows = [{"label": label, "n": n} for n, label in enumerate("aaaaaaaabbbbc" * 2)]
    for seed in range(10):
        shares = {"train": 0.6, "valid": 0.2, "test": 0.2}
        splits = by_utterance(rows, shares, np.random.default_rng(seed), lambda row: row["label"])
        assert sorted(row["n"] for found in splits.values() for row in found) == list(range(26))
        assert [len(splits[name]) for name in ("train", "valid", "test")] == [16, 5, 5]
        assert {row["label"] for row in splits["train"]} == set("abc")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Charles Curtiss' well-known “link”, café.", "CHARLES CURTISS WELL KNOWN LINK CAFE"),
        ("It’s Trotsky's!", "IT'S TROTSKY'S"),
        ("In 1992, he left", ""),
        ("Москва", ""),
        ("", ""),
    ],
)
def test_plain_text(text: str, plain: str) -> None:
    assert plain_text(text) == plain


def test_plain_phones() -> None:
    assert plain_phones(["AY0_I", "K_E", "IH_I", "AH1", "ZH"]) == ["AY", "K", "IH", "AH", "ZH"]
    assert plain_phones("DH AH0") == ["DH", "AH"]


def test_activity_finds_the_tone_and_its_surroundings() -> None:
    rng = np.random.default_rng(0)
    wave = (1e-3 * rng.standard_normal(3 * RATE)).astype("f4")
    wave[RATE : 2 * RATE] += 0.3 * np.sin(np.arange(RATE) * 0.2).astype("f4")
    [(first, end)] = spans(active(wave))
    assert (first, end) == (100, 200)
    assert abs(len(trimmed(wave)) - 1.1 * RATE) < 1
    loudest = loudest_part(wave, 1.0)
    assert len(loudest) == RATE
    assert np.sum(loudest**2) > 0.999 * np.sum(wave**2)
    quiet = quiet_part(wave, 0.5)
    assert quiet is not None
    assert len(quiet) == RATE // 2
    assert np.abs(quiet).max() < 0.01
    assert quiet_part(wave, 1.5) is None
    assert quiet_part(np.zeros(RATE, "f4"), 0.5) is None
    tone = at_level(wave, -20.0)[RATE : 2 * RATE]
    assert abs(10 * np.log10(np.mean(tone.astype(float) ** 2)) + 20) < 0.1


SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "manifest.jsonl"


@pytest.mark.skipif(not SHARED.is_file(), reason="needs real speech in ../shared/data next to the project")
def test_real_speech_gives_all_ten_tasks(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    text = (Path(mini.__file__).parents[2] / "configs" / "superb" / "mini.yaml").read_text()
    recipe.write_text(text + RECIPE.split("slot_order")[0])
    root = build(SHARED, tmp_path / "real", recipe=str(recipe), on_progress=lambda line: None)
    rows = [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(row["task"] for row in rows)) == [*TEN, *SOUND]
    assert all((root / row["path"]).is_file() for row in rows)
    test_no_clip_and_no_speaker_is_in_two_splits(rows)
    emotions = {"W": "anger", "F": "happiness", "N": "neutral", "T": "sadness"}  # in emodb's file names
    assert all(emotions[Path(row["path"]).stem[5]] == row["label"] for row in of(rows, "er"))
