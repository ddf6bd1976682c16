"""Test-set predictions of a run in the file formats of SUPERB's leaderboard (submission.py packs them).

The folders are those of s3prl's packer (s3prl/submit/submit.py at 0.4.18, in its repository and not in the package).
The packer reads the prediction files of s3prl's classic tasks (s3prl/downstream, `log_records` of each expert). The
datasets of these tasks name the utterances.

    RUN/predict/ks_public/predict.txt                             one line per file: its name and its class
    {sid,er_fold1..5}_public/predict.txt  ic_public/predict.csv   the same; for ic three slots, separated by commas
    {pr,asr,asr_lm,sf}_public/predict.ark                         name, then the recognised text
    sv_public/predict.txt                                         asv: NAME_NAME and the cosine of the pair
    qbe_public/benchmark.stdlist.xml                              score of each document for each query
    sd_public/frame_shift                                         samples at 16 kHz per frame
    sd_public/scoring/predictions/RECORDING.h5                    T_hat: the probabilities [frames, 2 speakers]
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb import results
from codecssl.superb.corpora.corpus import Example
from codecssl.superb.rows import ResultRow

FOLDER = "predict"
ANSWERS, ANSWERS_LM = "answers.json", "answers_lm.json"
DETECTED = 2.0
"""Deviations above a query's mean score at which s3prl's quesst14_dtw counts a document as found."""


def keep_answers(task: Any) -> Any:
    """Make an s3prl task write its test answers to answers.json in the folder of its metrics.

    The file is an object that maps utterances to answers. For verification it is a list of the trials' scores.
    """
    genuine = task.reduction

    def reduction(mode: str, cached: list[dict[str, Any]], _dump_dir: Any = None) -> Any:
        answers = _answers(task, cached) if mode == "test" and _dump_dir is not None else None
        if answers is not None:
            results.write_json(Path(_dump_dir) / ANSWERS, answers)
        return genuine(mode, cached, _dump_dir=_dump_dir)

    task.reduction = reduction
    return task


def _answers(task: Any, cached: list[dict[str, Any]]) -> Any:
    import torch

    found = task.parse_cached_results(cached)
    if "spk_embedding" in found:
        voices = torch.stack(found["spk_embedding"])
        place = {name: i for i, name in enumerate(found["unique_name"])}
        pairs = torch.tensor([[place[one], place[other]] for _, one, other in task.trials])
        return torch.cosine_similarity(voices[pairs[:, 0]], voices[pairs[:, 1]]).tolist()
    if "prediction" in found and "unique_name" in found:
        names = [str(name) for names in found["unique_name"] for name in np.atleast_1d(names)]
        return dict(zip(names, found["prediction"], strict=True))
    return None  # diarisation stores its probabilities in files


def write_predictions(
    folder: Path, task: str, tested: Sequence[Example], found: ResultRow, *, fold: int | None, stride: int
) -> None:
    """Write RUN/predict of a trained run.

    `found`: the run's outcome. `fold`: the tested fold of er. `stride`: the upstream's samples per frame, used by the
    frame labels of sd.
    """
    if task == "sd":
        _diarised(folder, tested, stride)
    elif task == "asv":
        _verified(folder, found["best_step"])
    else:
        name = f"er_fold{fold or 1}_public" if task == "er" else f"{task}_public"
        dump = folder / "evaluate" / "valid_best" / "test"
        _labelled(folder / FOLDER / name, task, tested, results.read_json(dump / ANSWERS))
        if task == "asr" and "wer_lm" in found["values"]:
            _labelled(folder / FOLDER / "asr_lm_public", task, tested, results.read_json(dump / ANSWERS_LM))


def _labelled(folder: Path, task: str, tested: Sequence[Example], answers: dict[str, Any]) -> None:
    suffix = {"ic": "csv", "pr": "ark", "asr": "ark", "sf": "ark"}.get(task, "txt")
    named = [(name_of(task, e.path), _answer_text(task, answers[e.id])) for e in tested if e.id in answers]
    between = "," if suffix == "csv" else " "
    results.write_text(folder / f"predict.{suffix}", "".join(f"{name}{between}{text}\n" for name, text in named))


def name_of(task: str, path: Path) -> str:
    """Name of a test utterance in s3prl's classic dataset of the task: id10001-VIDEO-00001, yes-FILE.wav, ..."""
    if task in ("sid", "asv"):
        return "-".join(path.parts[-3:]).split(".")[0]
    if task == "ks":
        return "-".join(path.parts[-2:])
    return path.name.split(".")[0]


def _answer_text(task: str, answer: Any) -> str:
    if task == "ic":
        return ",".join(answer)
    if task == "sid" and answer.startswith("speaker_"):  # official corpus: s3prl's label -> the corpus's name
        return f"id{int(answer.removeprefix('speaker_')) + 10001}"
    return str(answer)


def _verified(folder: Path, step: int) -> None:
    """Write the scores of the selected checkpoint and delete those of the others."""
    tested = folder / "evaluate" / "test_trial"
    scores = results.read_json(tested / f"step_{step}" / ANSWERS)
    with (folder / "test_trial.csv").open(encoding="utf-8", newline="") as file:
        trials = [
            tuple(name_of("asv", Path(row[key])) for key in ("wav_path1", "wav_path2")) for row in csv.DictReader(file)
        ]
    lines = [f"{one}_{other} {score}\n" for (one, other), score in zip(trials, scores, strict=True)]
    results.write_text(folder / FOLDER / "sv_public" / "predict.txt", "".join(lines))
    for path in tested.glob(f"step_*/{ANSWERS}"):
        path.unlink()


def _diarised(folder: Path, tested: Sequence[Example], stride: int) -> None:
    import h5py
    import torch

    found = folder / "evaluate" / "valid_best" / "test" / "prediction"
    results.write_text(folder / FOLDER / "sd_public" / "frame_shift", f"{stride}\n")
    target = folder / FOLDER / "sd_public" / "scoring" / "predictions"
    target.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(tested):
        if (path := found / f"rec{number:06d}.pt").is_file():
            name = example.id.removeprefix("utt:").replace("/", "-")
            with h5py.File(target / f"{name}.h5", "w") as file:
                file.create_dataset("T_hat", data=torch.load(path, weights_only=True).numpy())


def write_detections(folder: Path, queries: Sequence[Path], documents: Sequence[Path], scores: Any) -> None:
    """Write RUN/predict of a search: scores [queries, documents] as s3prl's list of detections in NIST's format."""
    from lxml import etree

    about = {"indexing_time": "1.00", "language": "english", "index_size": "1", "system_id": "benchmark"}
    root = etree.Element("stdlist", termlist_filename="benchmark.stdlist.xml", **about)
    for query, row in zip(queries, scores, strict=True):
        names = {"termid": name_of("qbe", query), "term_search_time": "1.0", "oov_term_count": "1"}
        term = etree.SubElement(root, "detected_termlist", names)
        for document, score in zip(documents, row, strict=True):
            place = {"file": name_of("qbe", document), "channel": "1", "tbeg": "0.000", "dur": "0.00"}
            decision = "YES" if score > DETECTED else "NO"
            etree.SubElement(term, "term", {**place, "score": f"{score:.4f}", "decision": decision})
    text = etree.tostring(root, encoding="unicode", pretty_print=True)
    results.write_text(folder / FOLDER / "qbe_public" / "benchmark.stdlist.xml", text)
