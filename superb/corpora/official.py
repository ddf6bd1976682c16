"""SUPERB's corpora as rows of a manifest, read from the folders that their archives unpack to.

Nothing is downloaded and no file is written. `root` holds the corpora next to each other, or is one
corpus; `side` is a folder with the small lists that come from elsewhere:

| task | corpus | folder | side files |
|---|---|---|---|
| asr | LibriSpeech | LibriSpeech/{train-clean-100,dev-clean,test-clean} | |
| pr | LibriSpeech | the same | librispeech-lexicon-200k-g2p.txt, librispeech-lexicon-allothers-g2p.txt |
| ks | Speech Commands v0.01 | speech_commands_v0.01, speech_commands_test_set_v0.01 | |
| qbe | QUESST14 | quesst14Database (English queries and documents) | |
| sid | VoxCeleb1 | VoxCeleb1/{dev,test}/wav | iden_split.txt |
| asv | VoxCeleb1 | the same | iden_split.txt, voxceleb1_test_v2.txt or veri_test2.txt |
| sd | Libri2Mix | Libri2Mix/wav16k/max | {train,dev,test}/{wav.scp,segments,utt2spk,reco2dur} |
| ic | Fluent Speech Commands | fluent_speech_commands_dataset | |
| sf | Audio SNIPS | SNIPS/{train,valid,test} | all.iob.snips.txt |
| er | IEMOCAP | IEMOCAP/Session1 to Session5 | Session1 to Session5/{train,test}_meta_data.json |
"""

from collections.abc import Callable
from pathlib import Path

from codecssl.superb.corpora import (
    audio_snips,
    fluent,
    iemocap,
    libri2mix,
    librispeech,
    quesst14,
    speech_commands,
    voxceleb1,
)
from codecssl.superb.corpora.place import Place
from codecssl.superb.rows import ManifestRow, TrialLine
from codecssl.tokenize.common.errors import UserError

READERS: dict[str, Callable[[Place], list[ManifestRow]]] = {
    "pr": librispeech.pr_rows,
    "asr": librispeech.asr_rows,
    "ks": speech_commands.ks_rows,
    "qbe": quesst14.qbe_rows,
    "sid": voxceleb1.sid_rows,
    "asv": voxceleb1.asv_rows,
    "sd": libri2mix.sd_rows,
    "ic": fluent.ic_rows,
    "sf": audio_snips.sf_rows,
    "er": iemocap.er_rows,
}
WITHOUT = {"asv": {"valid"}, "qbe": {"train"}}
"""Task -> splits that SUPERB does not have."""


def official_rows(task: str, root: Path, side: Path | None = None) -> list[ManifestRow]:
    """Return the rows of one task, in the schema of sample_corpus.md, with absolute paths and SUPERB's splits.

    `id` is that of s3prl, unique within a split. Raises UserError for missing files, with their source.
    """
    if task not in READERS:
        raise UserError(f"task {task}: no official corpus is known; give one of {','.join(READERS)}")
    rows = READERS[task](Place(root=Path(root), side=side))
    for split in {"train", "valid", "test"} - WITHOUT.get(task, set()):
        if not any(row["splits"][task] == split for row in rows):
            raise UserError(f"data {root}: the {task} corpus has no {split} utterance; unpack it again")
    return rows


def official_trials(root: Path, side: Path | None = None) -> list[TrialLine]:
    """SUPERB's verification trials: (1 for the same speaker or 0, path, path), paths as in `official_rows`."""
    return voxceleb1.asv_trials(Place(root=Path(root), side=side))
