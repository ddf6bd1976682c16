"""Counts of SUPERB's official data, against which a full run is compared.

A run on part of a corpus is no SUPERB result. Sources of the numbers: the Hugging Face card of s3prl/superb for
asr, pr, ks, sid, ic and er (utterances and labels), PaddleSpeech's summary of VoxCeleb1 for asv (speakers,
utterances, trial lists), LibriSpeech (Panayotov et al. 2015) for the speakers of asr and pr, Fluent Speech Commands
(Lugosch et al. 2019) for those of ic, and the mixtures listed in LibriMix's metadata/Libri2Mix (repository
JorisCos/LibriMix) for sd: the card's 13,901, 3,014 and 3,002 are pieces of 20 s. sf has the sentences listed in
data/nlu_annotation of aws-samples/aws-lex-noisy-spoken-language-understanding (13,084, 700 and 700), spoken by the 8,
4 and 4 voices of s3prl's superb_sf.py. QUESST14 has 12,492 documents, 560 development and 555 evaluation queries in six
languages (the Hugging Face card of Codec-SUPERB/quesst14). No source at hand counts its English part, which qbe uses,
so its documents and queries have lower bounds only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from codecssl.superb.corpora.audio_snips import SNIPS_SPEAKERS
from codecssl.superb.rows import ManifestRow


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Official numbers of one split; None is not compared."""

    utterances: int | None = None
    speakers: int | None = None
    at_least: int | None = None


_LIBRISPEECH = {
    "train": Counts(utterances=28_539, speakers=251),
    "valid": Counts(utterances=2_703, speakers=40),
    "test": Counts(utterances=2_620, speakers=40),
}
SPLITS: dict[str, dict[str, Counts]] = {
    "asr": _LIBRISPEECH,
    "pr": _LIBRISPEECH,
    "ks": {  # files; the 6 files of background noise in train and valid are not counted
        "train": Counts(utterances=51_088),
        "valid": Counts(utterances=6_798),
        "test": Counts(utterances=3_081),
    },
    "sid": {
        "train": Counts(utterances=138_361, speakers=1_251),
        "valid": Counts(utterances=6_904, speakers=1_251),
        "test": Counts(utterances=8_251, speakers=1_251),
    },
    "asv": {
        "train": Counts(utterances=148_642, speakers=1_211),
        "test": Counts(utterances=4_874, speakers=40),
    },
    "sd": {
        "train": Counts(utterances=13_900),
        "valid": Counts(utterances=3_000),
        "test": Counts(utterances=3_000),
    },
    "ic": {
        "train": Counts(utterances=23_132, speakers=77),
        "valid": Counts(utterances=3_118, speakers=10),
        "test": Counts(utterances=3_793, speakers=10),
    },
    "sf": {
        "train": Counts(utterances=104_672, speakers=8),
        "valid": Counts(utterances=2_800, speakers=4),
        "test": Counts(utterances=2_800, speakers=4),
    },
    "qbe": {"valid": Counts(at_least=2_000), "test": Counts(at_least=2_000)},
}
SESSIONS = {1: 1_085, 2: 1_023, 3: 1_151, 4: 1_031, 5: 1_241}
"""Utterances of IEMOCAP's four classes in each session, for er."""
TRIALS = (37_720, 37_611)
"""Trials of Vox1-O, for asv: of voxceleb1_test_v2.txt, which s3prl reads, and of VoxCeleb's cleaned veri_test2.txt."""
LABELS: dict[str, dict[str, int]] = {
    "ks": {"keyword": 12},
    "ic": {"action": 6, "object": 14, "location": 4},
    "er": {"label": 4},
    "sid": {"label": 1_251},
}
"""Number of labels in each label column."""


def deviations(task: str, rows: Sequence[ManifestRow], trials: int | None = None) -> list[str]:
    """Return each count of a task that is not the official one, in words. Empty for the official data.

    trials: number of trials, for asv.
    """
    found = []
    for split, counts in SPLITS.get(task, {}).items():
        own = [row for row in rows if row["splits"][task] == split]
        found += _split_deviations(task, split, counts, own)
    if task == "er":
        folds = [row["fold"] for row in rows]
        found += [_said(f"session {fold}", folds.count(fold), n, "utterances") for fold, n in SESSIONS.items()]
    if task == "asv" and trials is not None and trials not in TRIALS:
        found.append(_said("the list", trials, TRIALS[0], "trials"))
    for column, count in LABELS.get(task, {}).items():
        found.append(_said(column, len(_labels(rows, column)), count, "labels"))
    return [text for text in found if text]


def _split_deviations(task: str, split: str, counts: Counts, rows: Sequence[ManifestRow]) -> list[str]:
    if task == "ks" and split != "test":
        rows = [row for row in rows if "start" not in row]
    files = len({row["path"] for row in rows})
    if counts.at_least is not None:
        return [] if files >= counts.at_least else [f"{split} has {files:,} files, not at least {counts.at_least:,}"]
    assert counts.utterances is not None
    found = [_said(split, files, counts.utterances, "files")]
    if counts.speakers is not None:
        speakers = {row["speaker"] for row in rows}
        text = _said(split, len(speakers), counts.speakers, "speakers")
        lacking = [name for name in SNIPS_SPEAKERS[split] if name not in speakers] if task == "sf" else []
        found.append(f"{text} (none of {', '.join(lacking)})" if text and lacking else text)
    return found


def _labels(rows: Iterable[ManifestRow], column: str) -> set[Any]:
    return {row["slots"][column] if "slots" in row else row[column] for row in rows}


def _said(where: str, number: int, official: int, what: str) -> str:
    return "" if number == official else f"{where} has {number:,} {what}, not {official:,}"
