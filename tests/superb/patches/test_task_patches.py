"""Each patch changes what it names and nothing else."""

import pytest

from codecssl.superb.patches import import_patches, task_patches


@pytest.fixture(autouse=True)
def _installed() -> None:
    import_patches.install()
    task_patches.install()
    task_patches.install()


def test_error_rates_of_empty_references() -> None:
    from s3prl.metric import cer, wer
    from s3prl.metric.slot_filling import slot_value_cer

    assert cer([], []) == 0
    assert cer(["", ""], ["", ""]) == 0
    assert cer(["a"], [""]) == 1
    assert cer(["ab", "c"], ["ad", ""]) == 1.0  # as without the patch: 2 errors of 2 letters
    assert wer(["a b"], ["a c"]) == 0.5
    assert slot_value_cer(["play jazz"], ["play jazz"]) == 0


def test_slot_metrics_equal_those_of_s3prl_if_there_are_slots() -> None:
    """Two slots, one correct. By hand: two letters of eight wrong, one true positive, one false, one missed."""
    from s3prl.metric import slot_filling

    reference = ["play B-genre jazz E-genre by B-name anne E-name"]
    heard = ["play B-genre jazz E-genre by B-name ante E-name"]
    assert slot_filling.slot_type_f1(heard, reference) == 1
    assert slot_filling.slot_value_cer(heard, reference) == pytest.approx(1 / 8)
    assert slot_filling.slot_edit_f1_full(heard, reference) == pytest.approx(2 / 4)
    assert slot_filling.slot_edit_f1_full(["play jazz"], ["play jazz"]) == 1
    assert slot_filling.slot_edit_f1_part(["play B-a x E-a"], ["play x"]) == 1  # counts the reference's slots only
    assert slot_filling.slot_edit_f1_full(["play B-a x E-a"], ["play x"]) == 0


def test_without_the_patches_s3prl_divides_by_zero() -> None:
    import importlib

    import s3prl.metric.common as common
    import s3prl.metric.slot_filling as slots

    source = {module: importlib.util.find_spec(module.__name__) for module in (common, slots)}
    genuine = {}
    for module, spec in source.items():
        assert spec is not None
        assert spec.loader is not None
        fresh = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fresh)
        genuine[module] = fresh
    with pytest.raises(ZeroDivisionError):
        genuine[common].cer([], [])
    with pytest.raises(ZeroDivisionError):
        genuine[slots].slot_edit_f1_full(["a"], ["a"])


def test_diarisation_is_scored_without_a_clone() -> None:
    import s3prl.problem.diarization.util as util

    from codecssl.superb.patches.der import score_files

    assert util.score_with_dscore is score_files


def test_memory_errors_are_not_caught() -> None:
    import s3prl.problem.base as base

    assert base.ACCEPTABLE_ERRORS == []
