"""Patches of s3prl's tasks, which fail on small corpora or without some tools. They complement import_patches.

Each patch states its reason. s3prl itself is not edited. `install` is called when a problem is built.
"""

from codecssl.superb.patches.import_patches import Patch


def _token_errors() -> None:
    """Define the error rate over references without tokens: 0 for empty hypotheses, else 1."""
    import s3prl.metric.common as common

    genuine = common.ter
    if hasattr(genuine, "defined_for_empty"):
        return

    def ter(hyps: list[str], refs: list[str]) -> float:
        if any(len(ref) for ref in refs):
            return float(genuine(hyps, refs))
        return float(any(len(hyp) for hyp in hyps))

    ter.defined_for_empty = True  # type: ignore[attr-defined]
    common.ter = ter


def _slot_edits() -> None:
    """Define F1 without slots in references and hypotheses as 1, as s3prl's own slot_type_f1 does."""
    import s3prl.metric.slot_filling as slots

    genuine = slots.slot_edit_f1
    if hasattr(genuine, "defined_for_empty"):
        return

    def slot_edit_f1(*arguments: object, **options: object) -> float:
        try:
            return float(genuine(*arguments, **options))
        except ZeroDivisionError:
            return 1.0

    slot_edit_f1.defined_for_empty = True  # type: ignore[attr-defined]
    slots.slot_edit_f1 = slot_edit_f1


def _diarisation_score() -> None:
    import s3prl.problem.diarization.util as util

    from codecssl.superb.patches.der import score_files

    util.score_with_dscore = score_files


def _memory_errors() -> None:
    import s3prl.problem.base as base

    base.ACCEPTABLE_ERRORS.clear()


def _restricted_pickle() -> None:
    from codecssl.superb.patches import restricted_pickle

    restricted_pickle.install()


PATCHES = (
    Patch(
        name="restricted_pickle",
        reason="a resumed run unpickles encoder.pkl and the task's arguments, which in a foreign folder may run code",
        apply=_restricted_pickle,
    ),
    Patch(
        name="token_errors",
        reason="character and word error rates divide by the number of reference tokens, which is zero where a "
        "small set of utterances has no slot",
        apply=_token_errors,
    ),
    Patch(
        name="slot_edits",
        reason="slot_edit_f1 divides by the number of slots, which is zero where no utterance of a log step has one",
        apply=_slot_edits,
    ),
    Patch(
        name="diarisation_score",
        reason="s3prl clones a git repository (dscore) to score diarisation; pyannote.metrics is a package",
        apply=_diarisation_score,
    ),
    Patch(
        name="memory_errors",
        reason="the training loop skips the batch after an out-of-memory error; it must be reported",
        apply=_memory_errors,
    ),
)


def install() -> None:
    """Apply every patch; idempotent."""
    for patch in PATCHES:
        patch.apply()
