"""Rows of official corpora: miniature trees of each layout, compared with the CSVs that s3prl writes.

The audio is cut from the sample corpus. Lists that s3prl would download are written to its cache.
"""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import soundfile

from codecssl.superb.corpora.official import official_rows, official_trials
from codecssl.superb.patches import import_patches
from codecssl.tokenize.common.errors import UserError

RATE = 16_000
Rows = list[dict[str, Any]]
Write = Callable[[Path, float], None]


@pytest.fixture(scope="session")
def write() -> Write:
    """Write the next part of a speaker's audio in the sample corpus to a path."""
    from codecssl.superb.sample.unpack import ARCHIVE

    with tarfile.open(ARCHIVE) as archive:
        member = next(member for member in archive.getmembers() if member.name.endswith((".opus", ".ogg")))
        opus = archive.extractfile(member)
        assert opus is not None
        speech, _ = soundfile.read(io.BytesIO(opus.read()), dtype="float32")
    state = {"at": 0}

    def write(path: Path, seconds: float = 0.3) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        length = int(seconds * RATE)
        state["at"] = (state["at"] + 1000) % (len(speech) - length)
        soundfile.write(path, speech[state["at"] :][:length], RATE, subtype="PCM_16")

    return write


@pytest.fixture(autouse=True)
def _patched() -> None:
    import_patches.install()


def text(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def by_split(rows: Rows, task: str, *columns: str) -> dict[str, set[tuple[Any, ...]]]:
    """split -> {(path, column, ...)}."""
    splits: dict[str, set[tuple[Any, ...]]] = {}
    for row in rows:
        values = (os.path.realpath(row["path"]), *(row[column] for column in columns))
        splits.setdefault(row["splits"][task], set()).add(values)
    return splits


def s3prls(csvs: tuple[Path, Path, list[Path]], *columns: str) -> dict[str, set[tuple[Any, ...]]]:
    """Read the three CSVs that s3prl wrote, in the same form."""
    splits = {}
    for split, path in zip(("train", "valid", "test"), (csvs[0], csvs[1], *csvs[2]), strict=True):
        table = pandas.read_csv(path, keep_default_na=False)
        where = "path" if "path" in table.columns else "wav_path"
        paths = [os.path.realpath(p) for p in table[where]]
        splits[split] = set(zip(paths, *(table[column] for column in columns), strict=True))
        assert len(splits[split]) == len(table)
    return splits


def problem(name: str) -> Any:
    import s3prl.problem

    return getattr(s3prl.problem, name)()


def prepare(name: str, folder: Path, **arguments: Any) -> Any:
    """Run s3prl's own prepare_data into a new folder."""
    target = folder / f"s3prl-{name}"
    target.mkdir()
    defaults = problem(name).default_config()["prepare_data"]
    return problem(name).prepare_data({**defaults, **arguments}, target, target, get_path_only=False)


@pytest.fixture
def librispeech(tmp_path: Path, write: Write) -> Path:
    corpus, sentences = tmp_path / "LibriSpeech", iter(["THE CAT", "A DOG'S DAY", "CAT AND DOG", "THE DAY"] * 3)
    speakers = ["ID |SEX| SUBSET |MINUTES| NAME"]
    for split, speaker in (("train-clean-100", 19), ("train-clean-100", 103), ("dev-clean", 84), ("test-clean", 61)):
        lines = []
        for i in range(2):
            name = f"{speaker}-198-{i:04d}"
            write(corpus / split / str(speaker) / "198" / f"{name}.flac")
            lines.append(f"{name} {next(sentences)}")
        text(corpus / split / str(speaker) / "198" / f"{speaker}-198.trans.txt", lines)
        speakers.append(f"{speaker:4d} | F | {split} | 25.1 | Somebody")
    text(corpus / "SPEAKERS.TXT", speakers)
    return corpus


def test_asr_reads_what_s3prl_reads(librispeech: Path, tmp_path: Path) -> None:
    rows = official_rows("asr", tmp_path)
    csvs = prepare("SuperbASR", tmp_path, dataset_root=str(librispeech), n_jobs=1)
    ours = by_split(rows, "asr", "id", "text")
    assert ours == s3prls(csvs, "id", "transcription")
    assert {split: len(values) for split, values in ours.items()} == {"train": 4, "valid": 2, "test": 2}
    assert {row["speaker"] for row in rows} == {"19", "103", "84", "61"}
    assert official_rows("asr", librispeech) == rows


def test_pr_takes_the_first_pronunciation_as_s3prl(
    librispeech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3prl.dataio.encoder.g2p as g2p

    side = tmp_path / "side"
    first = text(side / "librispeech-lexicon-200k-g2p.txt", ["THE DH AH", "THE DH IY", "CAT K AE T", "A\tAH"])
    second = text(
        side / "librispeech-lexicon-allothers-g2p.txt", ["DOG'S D AO G Z", "CAT X", "DAY D EY", "AND AE N D", "DOG D"]
    )
    monkeypatch.setattr(g2p, "_urls_to_filepaths", lambda *urls: [str(first), str(second)])
    rows = official_rows("pr", tmp_path, side)
    csvs = prepare("SuperbPR", tmp_path, dataset_root=str(librispeech), n_jobs=1)
    spoken = [{**row, "spoken": " ".join(row["phones"])} for row in rows]
    assert by_split(spoken, "pr", "id", "spoken") == s3prls(csvs, "id", "transcription")
    assert {row["id"]: row["phones"] for row in rows}["19-198-0000"] == ["DH", "AH", "K", "AE", "T"]
    text(second, ["DOG'S D"])
    with pytest.raises(UserError, match=r"word 'AND' of 103-198-0000: in no lexicon"):
        official_rows("pr", tmp_path, side)
    second.unlink()
    with pytest.raises(UserError, match=r"allothers-g2p.txt: not in .*; get it from the dataset s3prl/g2p"):
        official_rows("pr", tmp_path, side)


def test_ks_splits_by_the_speakers_hash(tmp_path: Path, write: Write) -> None:
    train, test = tmp_path / "speech_commands_v0.01", tmp_path / "speech_commands_test_set_v0.01"
    for word in ("yes", "stop", "bed"):
        for i in range(30):
            write(train / word / f"{i * 7919:08x}_nohash_0.wav")
    write(train / "_background_noise_" / "pink_noise.wav", 2.5)
    text(train / "_background_noise_" / "README.md", ["noise"])
    for word in ("yes", "_unknown_", "_silence_"):
        write(test / word / "a_nohash_0.wav", 1.0)
    rows = official_rows("ks", tmp_path)
    numbered = [{**row, "start": row.get("start", ""), "end": row.get("end", "")} for row in rows]
    csvs = prepare("SuperbKS", tmp_path, gsc1=str(train), gsc1_test=str(test))
    ours = by_split(numbered, "ks", "id", "keyword", "start", "end")
    assert _numbers(ours) == _numbers(s3prls(csvs, "id", "label", "start_sec", "end_sec"))
    assert len(ours["valid"]) > 5
    assert len(ours["train"]) > 60
    noise = [(row["start"], row["end"]) for row in rows if row["keyword"] == "_silence_"]
    assert noise == [(0, 1), (1, 2), (2, 2.5)] * 2 + [(0, 1)]
    assert "start" not in rows[-1] or rows[-1]["keyword"] == "_silence_"


def _numbers(splits: dict[str, set[tuple[Any, ...]]]) -> dict[str, set[tuple[Any, ...]]]:
    """Convert seconds to floats. pandas returns text if a column has blanks."""
    return {
        split: {(*values[:-2], *("" if v == "" else float(v) for v in values[-2:])) for values in rows}
        for split, rows in splits.items()
    }


@pytest.fixture
def voxceleb(tmp_path: Path, write: Write) -> SimpleNamespace:
    corpus, lines = tmp_path / "VoxCeleb1", []
    for number in (10001, 10002, 10270, 10309, 11251):
        for i, code in enumerate((1, 1, 2, 3)):
            name = f"id{number}/vid{i}/0000{i}.wav"
            write(corpus / ("test" if 10270 <= number < 10310 else "dev") / "wav" / name)
            lines.append(f"{code} {name}")
    pairs = [(1, 10270, 10270), (0, 10270, 10309), (0, 10309, 10270), (1, 10309, 10309)]
    trials = [f"{same} id{a}/vid0/00000.wav id{b}/vid3/00003.wav" for same, a, b in pairs]
    side = tmp_path / "side"
    text(side / "iden_split.txt", lines)
    text(side / "voxceleb1_test_v2.txt", trials)
    return SimpleNamespace(corpus=corpus, side=side)


def test_sid_reads_what_s3prl_reads(voxceleb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3prl.dataio.corpus.voxceleb1sid import VoxCeleb1SID

    usage = VoxCeleb1SID._get_standard_usage
    monkeypatch.setattr(VoxCeleb1SID, "_get_standard_usage", staticmethod(lambda root, _: usage(root, voxceleb.side)))
    rows = official_rows("sid", tmp_path, voxceleb.side)
    csvs = prepare("SuperbSID", tmp_path, dataset_root=str(voxceleb.corpus), n_jobs=1)
    ours = by_split(rows, "sid", "id", "label")
    assert ours == s3prls(csvs, "id", "label")
    assert {split: len(values) for split, values in ours.items()} == {"train": 10, "valid": 5, "test": 5}
    assert {(row["speaker"], row["label"]) for row in rows} >= {("id10002", "speaker_1"), ("id11251", "speaker_1250")}


def test_asv_trains_and_tries_what_s3prl_does(voxceleb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3prl.dataio.corpus.voxceleb1sv as corpus

    def local(path: Path, *_: Any, **__: Any) -> None:
        Path(path).write_bytes((voxceleb.side / Path(path).name).read_bytes())

    monkeypatch.setattr(corpus, "_download", local)
    rows, trials = official_rows("asv", tmp_path, voxceleb.side), official_trials(tmp_path, voxceleb.side)
    train, [tried] = prepare("SuperbASV", tmp_path, dataset_root=str(voxceleb.corpus))
    table, pairs = pandas.read_csv(train), pandas.read_csv(tried)
    ours = sorted((row["path"], row["speaker"]) for row in rows if row["splits"]["asv"] == "train")
    assert [path for path, _ in ours] == sorted(table.wav_path)
    ids = {row["path"]: row["id"] for row in rows}
    assert [ids[path] for path in table.wav_path] == list(table.id)
    numbers = dict(zip(table.wav_path, table.spk, strict=True))
    speakers = sorted({speaker for _, speaker in ours})
    assert [numbers[path] for path, _ in ours] == [speakers.index(speaker) for _, speaker in ours]
    assert trials == list(pairs[["label", "wav_path1", "wav_path2"]].itertuples(index=False, name=None))
    tested = {row["path"] for row in rows if row["splits"]["asv"] == "test"}
    assert {path for _, *both in trials for path in both} < tested
    assert not {row["speaker"] for row in rows if row["path"] in tested} & set(speakers)


def test_a_missing_list_of_voxceleb_is_named(voxceleb: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^iden_split.txt: not in .*robots.ox.ac.uk.*--side its folder$"):
        official_rows("sid", tmp_path)
    (voxceleb.side / "voxceleb1_test_v2.txt").unlink()
    with pytest.raises(UserError, match=r"^voxceleb1_test_v2.txt or veri_test2.txt: not in .*openslr.org/49"):
        official_trials(tmp_path, voxceleb.side)
    (voxceleb.corpus / "dev/wav/id10001/vid0/00000.wav").unlink()
    with pytest.raises(UserError, match=r"id10001/vid0/00000.wav: listed in .*iden_split.txt but missing \(1 in all\)"):
        official_rows("sid", tmp_path, voxceleb.side)


def test_sd_reads_the_kaldi_folders_as_s3prl(tmp_path: Path, write: Write) -> None:
    data = tmp_path / "data"
    for part in ("train", "dev", "test"):
        wave = tmp_path / "Libri2Mix/wav16k/max" / part / "mix_clean/a_b.wav"
        write(wave, 2.0)
        folder = data / part
        text(folder / "wav.scp", [f"{part}_a_b {wave}"])
        text(folder / "reco2dur", [f"{part}_a_b 2.0"])
        text(folder / "utt2spk", [f"{part}_1 19", f"{part}_2 84"])
        text(folder / "segments", [f"{part}_1 {part}_a_b 0.0 1.5", f"{part}_2 {part}_a_b 0.25 2.0"])
    rows = official_rows("sd", tmp_path)
    flat = [{**row, **segment} for row in rows for segment in row["segments"]]
    csvs = prepare("SuperbSD", tmp_path, data_dir=str(data))
    theirs = s3prls(csvs, "record_id", "duration", "speaker", "start_sec", "end_sec")
    ours = by_split(flat, "sd", "id", "seconds", "speaker", "start", "end")
    assert {s: {(*r[:3], int(r[3]), *r[4:]) for r in rows} for s, rows in ours.items()} == theirs
    elsewhere = text(data / "dev" / "wav.scp", ["dev_a_b /gone/Libri2Mix/wav16k/max/dev/mix_clean/a_b.wav"])
    assert official_rows("sd", tmp_path) == rows
    elsewhere.unlink()
    with pytest.raises(UserError, match=r"dev/wav.scp: no such file; a Kaldi folder has"):
        official_rows("sd", tmp_path)


def test_ic_reads_what_s3prl_reads(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(pandas.Series, "iteritems"):  # s3prl 0.4.18 wants pandas 1
        monkeypatch.setattr(pandas.Series, "iteritems", pandas.Series.items, raising=False)
    corpus, header = tmp_path / "fluent_speech_commands_dataset", ",path,speakerId,transcription,action,object,location"
    for number, split in enumerate(("train", "valid", "test")):
        lines = [header]
        for i, line in enumerate(
            ['"Turn the lights on, please",activate,lights,none', "Volume up,increase,volume,kitchen"]
        ):
            name = f"wavs/speakers/s{number}/{number}{i}.wav"
            write(corpus / name)
            lines.append(f"{i},{name},s{number},{line}")
        text(corpus / "data" / f"{split}_data.csv", lines)
    rows = official_rows("ic", tmp_path)
    csvs = prepare("SuperbIC", tmp_path, dataset_root=str(corpus))
    joined = [{**row, "labels": " ; ".join(row["slots"].values())} for row in rows]
    assert by_split(joined, "ic", "id", "labels") == _text_ids(s3prls(csvs, "id", "labels"))
    assert rows[0]["text"] == "Turn the lights on, please"
    (corpus / "wavs/speakers/s1/10.wav").unlink()
    with pytest.raises(UserError, match=r"10.wav: listed in .*valid_data.csv but missing"):
        official_rows("ic", tmp_path)


def _text_ids(splits: dict[str, set[tuple[Any, ...]]]) -> dict[str, set[tuple[Any, ...]]]:
    """Ids as their files are named; pandas read 00 as 0."""
    return {split: {(path, Path(path).stem, *rest) for path, _, *rest in rows} for split, rows in splits.items()}


def test_sf_reads_what_s3prl_reads(tmp_path: Path, write: Write) -> None:
    corpus, lines = tmp_path / "SNIPS", []
    sentences = [
        "BOS PLAY CAFÉ ÉLAN , NOW EOS\tO O B-album I-album O O PlayMusic",
        "BOS RATE IT FIVE EOS\tO O O B-rating RateBook",
    ]
    for split, speakers in (("train", ("Ivy", "Brian")), ("valid", ("Amy",)), ("test", ("Emma",))):
        for speaker in speakers:
            for i, sentence in enumerate(sentences):
                name = f"{speaker}-snips-{split}-{i}"
                write(corpus / split / f"{name}.wav")
                lines.append(f"{name} {sentence}")
    write(corpus / "train" / "Ivy-snips-train-9.wav")  # has no label
    listed = text(corpus / "all.iob.snips.txt", lines)
    rows = official_rows("sf", tmp_path)
    csvs = prepare("SuperbSF", tmp_path, dataset_root=str(corpus))
    assert by_split(rows, "sf", "id", "text", "iob", "intent") == s3prls(csvs, "id", "transcription", "iob", "intent")
    assert (rows[0]["text"].split()[1], rows[0]["iob"]) == ("CAFE", "O B-album I-album O")
    assert len(rows) == 6
    text(listed, [lines[0].replace("B-album I-album", "B-album"), *lines[1:]])
    with pytest.raises(UserError, match=r"all.iob.snips.txt:1: .*5 words and 4 tags"):
        official_rows("sf", tmp_path)


@pytest.fixture
def iemocap(tmp_path: Path, write: Write) -> SimpleNamespace:
    """Two speakers a session, every emotion, with SUPERB's lists as s3prl's own preprocessing makes them."""
    from s3prl.downstream.emotion import IEMOCAP_preprocess

    corpus = tmp_path / "IEMOCAP"
    for session in range(1, 6):
        for turn in ("impro01", "script01"):
            scene, lines = f"Ses0{session}F_{turn}", ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]"]
            for i, emotion in enumerate(("neu", "hap", "exc", "ang", "sad", "fru")):
                name = f"{scene}_F{i:03d}"
                write(corpus / f"Session{session}/sentences/wav/{scene}/{name}.wav")
                lines.append(f"[{i}.0 - {i}.5]\t{name}\t{emotion}\t[2.5, 2.5, 2.5]")
            text(corpus / f"Session{session}/dialog/EmoEvaluation/{scene}.txt", lines)
    side = tmp_path / "side"
    sessions = [f"Session{i}" for i in range(1, 6)]
    for session in sessions:
        (side / session).mkdir(parents=True)
        others = [other for other in sessions if other != session]
        IEMOCAP_preprocess.preprocess(str(corpus), others, str(side / session / "train_meta_data.json"))
        IEMOCAP_preprocess.preprocess(str(corpus), [session], str(side / session / "test_meta_data.json"))
    return SimpleNamespace(corpus=corpus, side=side)


def test_er_has_s3prls_five_folds(iemocap: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3prl.problem.common.superb_er as superb_er

    def local(path: Path, url: str, **_: Any) -> None:
        Path(path).write_bytes(iemocap.side.joinpath(*url.split("/")[-2:]).read_bytes())

    monkeypatch.setattr(superb_er, "download", local)
    rows = official_rows("er", tmp_path, iemocap.side)
    for fold in range(1, 6):
        (folder := tmp_path / f"fold{fold}").mkdir()
        csvs = prepare("SuperbER", folder, iemocap=str(iemocap.corpus), test_fold=fold - 1)
        ours = [{**row, "splits": {"er": row["fold_splits"][str(fold)]}} for row in rows]
        assert by_split(ours, "er", "id", "label") == s3prls(csvs, "id", "label")
        tested = {row["fold"] for row in ours if row["splits"]["er"] == "test"}
        assert tested == {fold}
    assert len(rows) == 50
    assert all(row["splits"]["er"] == row["fold_splits"]["1"] for row in rows)
    with pytest.raises(UserError, match=r"^Session1/train_meta_data.json or .*s3prl/iemocap_split"):
        official_rows("er", tmp_path)


def test_qbe_reads_the_lists_of_s3prl_and_the_ground_truth(tmp_path: Path, write: Write) -> None:
    from s3prl.dataio.corpus.quesst14 import Quesst14

    corpus, base = tmp_path / "quesst14Database", "quesst14Database"
    names = {"utterances": ["Audio/quesst14_00001", "Audio/quesst14_00002", "Audio/quesst14_00003"]}
    for part in ("dev", "eval"):
        names[part] = [f"{part}_queries/quesst14_{part}_000{i}" for i in range(2)]
        rttm = [
            ";; comment",
            f"LEXEME quesst14_00001 1 0.000 1.000 quesst14_{part}_0001 lex <NA> 1",
            f"LEXEME quesst14_00003 1 0.000 1.000 quesst14_{part}_0000 lex <NA> 1",
            f"LEXEME quesst14_00001 1 0.000 1.000 quesst14_{part}_0000 lex <NA> 1",
        ]
        text(corpus / f"scoring/groundtruth_quesst14_{part}/quesst14_{part}.rttm", rttm)
    for part, stems in names.items():
        for stem in stems:
            write(corpus / f"{stem}.wav")
        languages = ["nnenglish"] * (len(stems) - 1) + ["albanian" if part == "utterances" else "nnenglish"]
        lines = [f"{base}/{stem}.wav {language}" for stem, language in zip(stems, languages, strict=True)]
        text(corpus / f"scoring/language_key_{part}.lst", lines)
    rows, theirs = official_rows("qbe", tmp_path), Quesst14(str(corpus))
    for split, queries in (("valid", theirs.valid_queries), ("test", theirs.test_queries)):
        own = [row for row in rows if row["splits"]["qbe"] == split]
        assert [Path(row["path"]) for row in own if row["role"] == "query"] == queries
        assert [Path(row["path"]) for row in own if row["role"] == "document"] == theirs.docs
        part = "dev" if split == "valid" else "eval"
        held = [row["queries"] for row in own if row["role"] == "document"]
        assert held == [[f"quesst14_{part}_0000", f"quesst14_{part}_0001"], []]
    assert len({row["id"] for row in rows}) == len(rows) == 8
    (corpus / "scoring/groundtruth_quesst14_eval/quesst14_eval.rttm").unlink()
    with pytest.raises(UserError, match=r"quesst14_eval.rttm: no such file"):
        official_rows("qbe", tmp_path)


@pytest.mark.parametrize("task", ["pr", "asr", "ks", "qbe", "sid", "asv", "sd", "ic", "sf", "er"])
def test_a_root_without_the_corpus_is_one_clear_line(task: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        official_rows(task, tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(UserError):
        official_rows(task, tmp_path / "absent")


def test_unknown_tasks_and_empty_splits_are_refused(librispeech: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task st: no official corpus is known; give one of pr,asr"):
        official_rows("st", tmp_path)
    for path in [*(librispeech / "dev-clean").rglob("*.flac"), *(librispeech / "dev-clean").rglob("*.txt")]:
        path.unlink()
    with pytest.raises(UserError, match="the asr corpus has no valid utterance"):
        official_rows("asr", tmp_path)
