"""The leaderboard's zip against the files of s3prl's classic tasks. test_run.py checks the answers themselves."""

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from codecssl.superb import results, tasks
from codecssl.superb.cli import main
from codecssl.superb.corpora.corpus import Example
from codecssl.superb.patches import import_patches
from codecssl.superb.reporting import predictions
from codecssl.superb.reporting.submission import write_zip
from codecssl.superb.runner import qbe
from codecssl.tokenize.common.errors import UserError


def example(name: str, path: str) -> Example:
    return Example(id=f"utt:{name}", path=Path(path), columns={})


CLASSIC: dict[str, tuple[str, str, list[str], list[Any]]] = {
    "ks": ("speech_commands", "predict", ["/r/_silence_/noise.wav", "/r/yes/1_nohash_0.wav"], ["_silence_", "no"]),
    "sid": ("voxceleb1", "predict_speaker", ["/r/wav/id10003/vid/00007.wav"], ["id10020"]),
    "ic": ("fluent_commands", "predict", ["/r/wavs/speakers/x/ab-cd.wav"], [["bring", "juice", "none"]]),
    "er": ("emotion", "predict", ["/r/Session2/sentences/wav/Ses02F_a/Ses02F_a_F000.wav"], ["hap"]),
    "pr": ("ctc", "hypothesis", ["/r/test-clean/1/2/1-2-0003.flac"], ["AH0 B IY1"]),
    "sf": ("ctc", "hypothesis", ["/r/test/Brian-snips-test-7.wav"], ["PLAY B-artist QUEENE-artist"]),
    "asr": ("asr", "pred_words", ["/r/test-clean/1/2/1-2-0003.flac"], ["A BEE"]),
}
"""task: classic task of s3prl, its record of answers, files, answers."""


def classic_names(task: str, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names that s3prl's own datasets derive from the paths."""
    import torchaudio
    from s3prl.downstream.asr.dataset import SequenceDataset
    from s3prl.downstream.ctc.data import collect_audio_batch
    from s3prl.downstream.emotion.dataset import IEMOCAPDataset
    from s3prl.downstream.fluent_commands.dataset import FluentCommandsDataset
    from s3prl.downstream.speech_commands import dataset as commands
    from s3prl.downstream.voxceleb1 import dataset as voxceleb

    wave = (torch.zeros(1, 1600), 16_000)
    monkeypatch.setattr(torchaudio, "load", lambda *arguments, **options: wave)
    monkeypatch.setattr(commands, "apply_effects_file", lambda *arguments: wave)

    def made(kind: Any, **attributes: Any) -> Any:
        found = object.__new__(kind)
        vars(found).update(attributes)
        return found

    if task == "ks":
        data = made(commands.SpeechCommandsTestingDataset, data=[("no", p) for p in paths], class2index={"no": 1})
    elif task == "sid":
        data = made(voxceleb.SpeakerClassifiDataset, dataset=paths, label=[0] * len(paths), max_timestep=None)
    elif task == "ic":
        frame = SimpleNamespace(loc=[_Row(path=p, action=0, object=0, location=0) for p in paths])
        same = {slot: [0] for slot in ("action", "object", "location")}
        data = made(FluentCommandsDataset, df=frame, base_path="/", Sy_intent=same)
    elif task == "er":
        meta = [{"path": p, "label": "hap"} for p in paths]
        resampler = torch.nn.Identity()
        data = made(
            IEMOCAPDataset, data_dir="/", meta_data=meta, class_dict={"hap": 1}, pre_load=False, resampler=resampler
        )
    elif task == "asr":
        words = {Path(p).stem: torch.zeros(1) for p in paths}
        return list(made(SequenceDataset, X=[paths], Y=words, libri_root="/", sample_rate=16_000)[0][2])
    else:
        return [collect_audio_batch([(p, [0])], "test")[2][0] for p in paths]
    return [data[i][2] for i in range(len(paths))]


class _Row(dict[str, Any]):
    """The parts of a pandas row that s3prl uses."""

    @property
    def path(self) -> Any:
        return self["path"]


@pytest.mark.parametrize("task", CLASSIC)
def test_the_files_equal_those_of_s3prls_classic_task(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3prl's datasets name the utterances, and its experts write the file."""
    import importlib

    import_patches.install()
    kind, record, paths, answers = CLASSIC[task]
    expert = importlib.import_module(f"s3prl.downstream.{kind}.expert").DownstreamExpert
    names = classic_names(task, paths, tmp_path, monkeypatch)
    reported = [answer.split() for answer in answers] if task == "asr" else answers
    records = {record: reported, "filename": names, "filenames": names, "truth": reported, "truth_speaker": reported}
    records |= {"loss": [0.0], "acc": [1.0], "intent_loss": [0.0], "groundtruth": reported, "target_words": reported}
    records |= {"pred_tokens": [], "target_tokens": []}
    stub = SimpleNamespace(expdir=str(tmp_path), fold="fold2", metrics=["per"], best_score=0, decoder=None)
    stub.save_best_on, stub.metric_higher_better = "dev", False
    stub._get_task_name, stub._compute_metrics = lambda: "", lambda *arguments: (0, 0)
    silent = SimpleNamespace(add_scalar=lambda *arguments, **options: None)
    expert.log_records(stub, "test", records, logger=silent, global_step=1, batch_ids=[], total_batch_num=1)
    (theirs,) = [path for path in tmp_path.glob("test*") if "predict" in path.name or "hyp" in path.name]

    run = tmp_path / "run"
    ours = {"sid": ["speaker_19"]}.get(task, answers)
    tested = [example(f"u{i}", path) for i, path in enumerate(paths)]
    kept = {f"utt:u{i}": answer for i, answer in enumerate(ours)}
    results.write_json(run / "evaluate" / "valid_best" / "test" / "answers.json", kept)
    predictions.write_predictions(run, task, tested, {"values": {}}, fold=2, stride=320)
    (made,) = run.glob("predict/*/*")
    assert made.read_text() == theirs.read_text() != ""
    folder = "er_fold2_public" if task == "er" else f"{task}_public"
    suffix = {"ic": "csv", "pr": "ark", "asr": "ark", "sf": "ark"}.get(task, "txt")
    assert made.relative_to(run).as_posix() == f"predict/{folder}/predict.{suffix}"


def test_detections_are_those_of_s3prl(tmp_path: Path) -> None:
    """The same bytes but for the order of documents, which there is that of finished processes."""
    import_patches.install()
    from s3prl.downstream.quesst14_dtw.expert import DownstreamExpert

    draw = torch.Generator().manual_seed(0)
    clips = [torch.randn(length, 8, generator=draw) for length in (12, 7, 40, 25, 31, 18)]
    rules = {"step_pattern": "asymmetric", "minmax_norm": True, "subsequence": True, "dist_method": "cosine"}
    settings = {"max_workers": 1, "feature_normalization": True, "silence_frame": None, "datarc": {}, "dtwrc": rules}
    expert = DownstreamExpert(8, settings, str(tmp_path))
    expert.test_dataset = SimpleNamespace(n_queries=2)
    expert.log_records("dev", {"features": clips, "audio_names": [f"c{i}" for i in range(6)]})
    frames = torch.cat(clips)
    normed = [((clip - frames.mean(0)) / frames.std(0)).numpy() for clip in clips]
    names = [Path(f"/r/Audio/c{i}.wav") for i in range(6)]
    predictions.write_detections(tmp_path, names[:2], names[2:], qbe.scores(normed[:2], normed[2:]))
    theirs, ours = tmp_path / "benchmark.stdlist.xml", tmp_path / "predict" / "qbe_public" / "benchmark.stdlist.xml"
    assert sorted(ours.read_text().splitlines()) == sorted(theirs.read_text().splitlines())
    assert [element.get("termid") for element in ElementTree.parse(ours).getroot()] == ["c0", "c1"]


def test_trials_are_named_as_in_s3prls_classic_task(tmp_path: Path) -> None:
    import_patches.install()
    from s3prl.downstream.sv_voxceleb1.expert import DownstreamExpert

    one, other = "/r/test/wav/id10270/a.b/00001.wav", "/r/test/wav/id10271/c/00002.wav"
    stub = SimpleNamespace(
        expdir=str(tmp_path), best_score=0, test_dataset=SimpleNamespace(pair_table=[("1", one, other)])
    )
    stub.score_fn, stub.eval_metric = torch.nn.CosineSimilarity(dim=-1), lambda *arguments: (0.0,)
    records = {"scores": [], "pair_names": [], "labels": [], one: torch.ones(2), other: torch.ones(2)}
    silent = SimpleNamespace(add_scalar=lambda *arguments, **options: None)
    DownstreamExpert.log_records(stub, "test", records, logger=silent, global_step=1)
    theirs = (tmp_path / "test_predict.txt").read_text().split(" ")[0]
    assert theirs == f"{predictions.name_of('asv', Path(one))}_{predictions.name_of('asv', Path(other))}"


def finished(output: Path, task: str, name: str = "/m/tiny", **changes: Any) -> Path:
    """A finished full run on official corpora, as far as the report and the zip ask."""
    budget = {k: v for k, v in vars(tasks.BUDGETS["full"]).items() if k != "learning_rates"}
    upstream = {"name": name, "kind": "model", "argument": name, "sha256": "1"}
    row: dict[str, Any] = {
        "upstream": upstream, "manifest_sha256": None, "not_official": [], "data": "superb", "task": task,
        "budget": budget, "seed": 0,
        "value": 0.5, "valid": 0.5, "values": {tasks.TASKS[task].metric: 0.5}, "metric": tasks.TASKS[task].metric,
        "best_step": 50, "chance": None, "layer_weights": None, "curves": {}, "learning_rate": 1e-3, "steps": 1,
        "batch": 1, "official_steps": 1, "utterances": {"train": 1, "valid": 1, "test": 1}, "seconds": 1.0,
        "versions": {"s3prl": "0.4.18", "torch": "2.9.1"}, **changes,
    }  # fmt: skip
    number = len(list(output.rglob("result.json")))
    folder = output / "runs" / "m_tiny" / task / str(number)
    results.write_json(folder / "result.json", {**row, "folder": folder.relative_to(output).as_posix()})
    name = f"er_fold{changes.get('fold')}_public" if task == "er" else f"{task}_public"
    results.write_text(folder / "predict" / name / "predict.txt", f"{task} {number}\n")
    return folder


def test_the_winners_of_the_lowest_seed_are_packed(tmp_path: Path, capsys: Any) -> None:
    finished(tmp_path, "ks", valid=0.4)
    finished(tmp_path, "ks", valid=0.6, learning_rate=1e-4)
    finished(tmp_path, "ks", valid=0.9, seed=1)
    for fold in range(1, 6):
        finished(tmp_path, "er", fold=fold)
    finished(tmp_path, "sid", name="/m/other")
    command = ["report", str(tmp_path), "--zip", str(tmp_path / "predict.zip")]
    assert main([*command, "--of", "tiny"]) == 0
    assert "no finished run of: pr, asr, qbe, sid, asv, sd, ic, sf" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "predict.zip") as packed:
        texts = {name: packed.read(name).decode() for name in packed.namelist()}
    folds = {f"predict/er_fold{fold}_public/predict.txt": f"er {2 + fold}\n" for fold in range(1, 6)}
    assert texts == {"predict/ks_public/predict.txt": "ks 1\n", **folds}
    before = (tmp_path / "predict.zip").read_bytes()
    write_zip([tmp_path], tmp_path / "predict.zip", "tiny")
    assert (tmp_path / "predict.zip").read_bytes() == before
    assert main(command) == 1
    assert capsys.readouterr().err == "error: --of: give one of other, tiny; a zip holds one upstream\n"


def test_an_incomplete_submission_is_a_one_line_error_without_a_zip(tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(UserError) as stopped:
            write_zip([folder], tmp_path / "predict.zip")
        assert not (tmp_path / "predict.zip").exists()
        assert "\n" not in str(stopped.value)
        return str(stopped.value)

    finished(tmp_path / "a", "ks", manifest_sha256="0")
    finished(tmp_path / "a", "ks", budget={**vars(tasks.BUDGETS["quick"]), "learning_rates": []})
    assert "no run of --budget full on SUPERB's own corpora" in refusal(tmp_path / "a")
    finished(tmp_path / "p", "qbe", not_official=["valid has 4 files, not at least 2,000"])
    assert "Not SUPERB: not the official data: qbe: valid has 4 files" in refusal(tmp_path / "p")
    finished(tmp_path / "b", "er", fold=1)
    finished(tmp_path / "b", "er", fold=4)
    assert "er of tiny lacks the folds 2, 3, 5" in refusal(tmp_path / "b")
    for path in (finished(tmp_path / "c", "ks", seed=3) / "predict").rglob("*.txt"):
        path.unlink()
    assert "the run of ks, learning rate 0.001, seed 3, kept no predictions" in refusal(tmp_path / "c")
    finished(tmp_path / "d", "ks")
    finished(tmp_path / "d", "ks", data="another")
    assert "full runs on several corpora (another, superb)" in refusal(tmp_path / "d")


def test_of_without_a_zip_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["report", str(tmp_path), "--of", "tiny"]) == 1
    assert capsys.readouterr().err == "error: --of tiny: needs --zip FILE\n"


def test_links_and_paths_out_of_the_folder_are_not_packed(tmp_path: Path) -> None:
    (tmp_path / "secret" / "predict").mkdir(parents=True)
    (tmp_path / "secret" / "predict" / "key.txt").write_text("secret")
    linked = finished(tmp_path / "a", "ks") / "predict" / "ks_public" / "more.txt"
    linked.symlink_to(tmp_path / "secret" / "predict" / "key.txt")
    upwards = finished(tmp_path / "b", "ks")
    row = json.loads((upwards / "result.json").read_text())
    (upwards / "result.json").write_text(json.dumps({**row, "folder": "../secret"}))
    for folder in ("a", "b"):
        with pytest.raises(UserError, match="a link to .*/secret/predict.*, outside of"):
            write_zip([tmp_path / folder], tmp_path / "predict.zip")
        assert not (tmp_path / "predict.zip").exists()
