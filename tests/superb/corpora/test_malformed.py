"""Lists of official corpora as people have them: read rightly, or refused by file and line, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from codecssl.superb.corpora.official import official_rows, official_trials
from codecssl.superb.corpora.official_counts import deviations
from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError


def write(path: Path, text: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


SPLIT = "1 id10001/a/00001.wav\n2 id10001/a/00002.wav\n3 id10001/a/00003.wav\n1 id10270/b/00001.wav\n"
TRIALS = "1 id10270/b/00001.wav id10270/b/00002.wav\n0 id10270/b/00001.wav id10271/c/00001.wav\n"
FLUENT = "path,speakerId,transcription,action,object,location\nwavs/a.wav,s1,lights on,activate,lights,none\n"
EMOTION = {"path": "Session1/x/Ses01F_impro01_F000.wav", "label": "neu"}
SCP, DURATIONS, SPEAKERS = "m1 wav16k/m1.wav\n", "m1 3.5\n", "u1 alice\n"
SEGMENTS = "u1 m1 0.0 1.5\n"
QUERIES = "quesst14Database/Audio/q.wav nnenglish\n"


def voxceleb(root: Path, split: str = SPLIT, trials: str = TRIALS) -> None:
    touch(*(root / f"VoxCeleb1/dev/wav/id10001/a/0000{i}.wav" for i in (1, 2, 3)))
    touch(*(root / f"VoxCeleb1/test/wav/{name}.wav" for name in ("id10270/b/00001", "id10270/b/00002")))
    touch(root / "VoxCeleb1/test/wav/id10271/c/00001.wav")
    write(root / "iden_split.txt", split)
    write(root / "veri_test2.txt", trials)


def fluent(root: Path, table: str = FLUENT, encoding: str = "utf-8") -> None:
    corpus = root / "fluent_speech_commands_dataset"
    touch(corpus / "wavs/a.wav")
    for split in ("train", "valid", "test"):
        write(corpus / f"data/{split}_data.csv", table if split == "train" else FLUENT, encoding)


def iemocap(root: Path, entry: dict[str, str] = EMOTION) -> None:
    corpus = root / "IEMOCAP"
    touch(*(corpus / f"Session{i}/x/Ses0{i}F_impro01_F000.wav" for i in range(1, 6)))
    for fold in range(1, 6):
        others = [{"path": f"Session{i}/x/Ses0{i}F_impro01_F000.wav", "label": "hap"} for i in range(1, 6) if i != fold]
        own = [entry] if fold == 1 else [{"path": f"Session{fold}/x/Ses0{fold}F_impro01_F000.wav", "label": "exc"}]
        for part, entries in (("train", others), ("test", own)):
            write(corpus / f"Session{fold}/{part}_meta_data.json", json.dumps({"meta_data": entries}))


def libri2mix(root: Path, segments: str = SEGMENTS, durations: str = DURATIONS) -> None:
    touch(root / "wav16k/m1.wav")
    for part in ("train", "dev", "test"):
        for name, text in (("wav.scp", SCP), ("reco2dur", durations), ("utt2spk", SPEAKERS), ("segments", segments)):
            write(root / part / name, text)


def quesst(root: Path, queries: str = QUERIES) -> None:
    scoring = root / "quesst14Database/scoring"
    touch(root / "quesst14Database/Audio/q.wav", root / "quesst14Database/Audio/d.wav")
    write(scoring / "language_key_utterances.lst", "quesst14Database/Audio/d.wav nnenglish\n")
    for part in ("dev", "eval"):
        write(scoring / f"language_key_{part}.lst", queries)
        write(scoring / f"groundtruth_quesst14_{part}/quesst14_{part}.rttm", "LEXEME d 1 q quesst14_dev_001\n")


def librispeech(root: Path, transcripts: str = "1-2-0 A CAT\n") -> None:
    for folder in ("train-clean-100", "dev-clean", "test-clean"):
        touch(root / f"LibriSpeech/{folder}/1/2/1-2-0.flac", root / f"LibriSpeech/{folder}/1/2/._1-2-0.flac")
        write(root / f"LibriSpeech/{folder}/1/2/1-2.trans.txt", transcripts)


def snips(root: Path, line: str) -> None:
    write(root / "SNIPS/all.iob.snips.txt", f"\n{line}\n")
    for split, speaker in (("train", "Ivy"), ("valid", "Amy"), ("test", "Emma")):
        touch(root / f"SNIPS/{split}/{speaker}-1.wav")


REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "names of VoxCeleb instead of ids": (
        "sid",
        lambda root: voxceleb(root, split="1 id10001/a/00001.wav\n1 A.J._Buckley/a/00001.wav\n"),
        r"iden_split.txt:2: '1 A.J._Buckley/a/00001.wav' is not `1, 2 or 3, file`",
    ),
    "latin-1 in Fluent": (
        "ic",
        lambda root: fluent(root, FLUENT + "wavs/a.wav,s1,café,activate,lights,none\n", "latin-1"),
        r"train_data.csv:3: not UTF-8",
    ),
    "a short line in Fluent": (
        "ic",
        lambda root: fluent(root, FLUENT + "wavs/a.wav,s1,lights on\n"),
        r"train_data.csv:3: 'wavs/a.wav, s1, lights on' is not a row of 6 columns",
    ),
    "an empty class in Fluent": (
        "ic",
        lambda root: fluent(root, FLUENT + "wavs/a.wav,s1,lights on,activate,,none\n"),
        r"train_data.csv:3: .*object is empty",
    ),
    "another header in Fluent": ("ic", lambda root: fluent(root, FLUENT[5:]), r"train_data.csv:1: .*path is missing"),
    "an emotion that is none": (
        "er",
        lambda root: iemocap(root, {**EMOTION, "label": "xxx"}),
        r"test_meta_data.json: entry 1: .* is not a path and a label of neu, hap, exc, ang, sad",
    ),
    "a comma in reco2dur": (
        "sd",
        lambda root: libri2mix(root, durations="m1,3.5\n"),
        r"train/reco2dur:1: 'm1,3.5' is not `name value`",
    ),
    "a decimal comma in reco2dur": (
        "sd",
        lambda root: libri2mix(root, durations="m1 3,5\n"),
        r"train/reco2dur: 'm1 3,5' is not `mixture seconds`",
    ),
    "empty segments": ("sd", lambda root: libri2mix(root, segments="\n"), r"train/segments: no segment of m1"),
    "a segment that ends before it begins": (
        "sd",
        lambda root: libri2mix(root, segments="u1 m1 2.0 1.5\n"),
        r"train/segments:1: 'u1 m1 2.0 1.5' is not .*the end is not after the start",
    ),
    "one column in QUESST": (
        "qbe",
        lambda root: quesst(root, "quesst14Database/Audio/q.wav\n"),
        r"language_key_dev.lst:1: 'quesst14Database/Audio/q.wav' is not `folder/file language`",
    ),
    "a transcript without its file": (
        "asr",
        lambda root: librispeech(root, "1-2-0 A CAT\n1-2-1 A DOG\n"),
        r"1-2-1.flac: listed in .*1-2.trans.txt but missing",
    ),
    "an empty transcript": ("asr", lambda root: librispeech(root, "1-2-0\n"), r"1-2.trans.txt:1: '1-2-0' is not"),
    "tags of SNIPS that do not fit": (
        "sf",
        lambda root: snips(root, "Ivy-1 BOS PLAY IT EOS\tO O Play"),
        r"all.iob.snips.txt:2: .*2 words and 1 tags",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_line_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    task, make, message = REFUSED[name]
    make(tmp_path)
    if name.startswith("tags"):
        pytest.importorskip("s3prl")
    with pytest.raises(UserError, match=message) as raised:
        official_rows(task, tmp_path)
    assert "\n" not in str(raised.value)


def test_other_spellings_are_read_rightly(tmp_path: Path) -> None:
    voxceleb(tmp_path / "vox", split=SPLIT.replace(" id", " wav/id"), trials=TRIALS.replace(" id", " wav/id"))
    voxceleb(tmp_path / "same")
    names = [[row["id"] for row in official_rows("sid", tmp_path / folder)] for folder in ("vox", "same")]
    assert names[0] == names[1]
    assert [trial[0] for trial in official_trials(tmp_path / "vox")] == [1, 0]
    fluent(tmp_path / "ic", FLUENT.replace(",", ";"))
    [row] = [row for row in official_rows("ic", tmp_path / "ic") if row["splits"]["ic"] == "train"]
    assert row["slots"] == {"action": "activate", "object": "lights", "location": "none"}
    iemocap(tmp_path / "er", {**EMOTION, "path": EMOTION["path"].replace("/", "\\")})
    assert {row["label"] for row in official_rows("er", tmp_path / "er")} == {"neu", "hap"}
    librispeech(tmp_path / "asr")
    assert len(official_rows("asr", tmp_path / "asr")) == 3, "macOS's ._ files must be ignored"


def test_part_of_a_corpus_is_not_the_official_data() -> None:
    def rows(task: str, split: str, count: int, speakers: int) -> list[ManifestRow]:
        return [
            {"path": f"{split}{i}", "splits": {task: split}, "speaker": str(i % speakers), "slots": {}}
            for i in range(count)
        ]

    whole = rows("asr", "train", 28_539, 251) + rows("asr", "valid", 2_703, 40) + rows("asr", "test", 2_620, 40)
    assert deviations("asr", whole) == []
    assert deviations("asr", whole[1:]) == ["train has 28,538 files, not 28,539"]
    assert deviations("qbe", rows("qbe", "valid", 4, 1)) == [
        "valid has 4 files, not at least 2,000",
        "test has 0 files, not at least 2,000",
    ]
    voxceleb_rows = rows("asv", "train", 148_642, 1_211) + rows("asv", "test", 4_874, 40)
    assert deviations("asv", voxceleb_rows, 37_720) == deviations("asv", voxceleb_rows, 37_611) == []
    assert deviations("asv", voxceleb_rows, 37_000) == ["the list has 37,000 trials, not 37,720"]
    mixtures = rows("sd", "train", 13_900, 2) + rows("sd", "valid", 3_000, 2) + rows("sd", "test", 3_000, 2)
    assert deviations("sd", mixtures) == []
    assert deviations("sd", [*mixtures, mixtures[0] | {"path": "more"}]) == ["train has 13,901 files, not 13,900"], (
        "13,901 pieces of 20 s are not the mixtures"
    )
    folds = [{"path": str(i), "splits": {"er": "train"}, "fold": 1, "label": i % 4} for i in range(1_085)]
    assert deviations("er", folds)[0] == "session 2 has 0 utterances, not 1,023"


def test_a_missing_speaker_of_snips_is_named() -> None:
    row = {"path": "a", "splits": {"sf": "valid"}, "speaker": "Amy"}
    assert "valid has 1 speakers, not 4 (none of Aditi, Geraint, Nicole)" in deviations("sf", [row])
