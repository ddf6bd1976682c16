"""The patches: s3prl imports and its effects do what sox does."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from codecssl.superb import compat
from codecssl.tokenize.errors import UserError


def test_s3prl_imports_with_the_patches() -> None:
    """Its problems, its hub and the classic keyword task, with `install` called twice."""
    code = "from codecssl.superb import compat; compat.install(); compat.install()\n"
    code += "import s3prl.problem, s3prl.hub, s3prl.downstream.speech_commands.expert"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["torchaudio_backend", "torchaudio_sox_effects", "optional_packages"])
def test_each_patch_is_needed(name: str) -> None:
    """s3prl fails to import when one patch is left out."""
    code = (
        f"from codecssl.superb import compat; [p.apply() for p in compat.PATCHES if p.name != '{name}']\n"
        "import s3prl.upstream.mos_prediction.hubconf, s3prl.task.event_prediction, s3prl.dataio.dataset"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Error" in done.stderr


def test_namespace_in_a_checkpoint_loads(tmp_path: Path) -> None:
    import torch

    compat.install()
    torch.save({"Args": argparse.Namespace(upstream="fbank")}, tmp_path / "states.ckpt")
    assert torch.load(tmp_path / "states.ckpt")["Args"].upstream == "fbank"


def test_effects_are_what_the_keyword_task_asks_for() -> None:
    """channels 1, rate 16000, gain -3: the mean of the channels, resampled, times 10^(-3/20)."""
    import numpy as np
    import soxr
    import torch

    time = np.arange(8000) / 8000
    left, right = np.sin(2 * np.pi * 300 * time), np.sin(2 * np.pi * 500 * time)
    wav = torch.from_numpy(np.stack([left, right])).float()
    out, rate = compat.apply_effects(wav, 8000, [["channels", "1"], ["rate", "16000"], ["gain", "-3.0"]])
    expected = soxr.resample((left + right) / 2, 8000, 16000) * 0.70795
    assert rate == 16000
    assert out.shape == (1, 16000)
    assert np.abs(out[0].numpy() - expected)[200:-200].max() < 2e-3


def test_an_unknown_effect_is_refused() -> None:
    import torch

    with pytest.raises(UserError, match=r"sox effect silence 1 0\.1 0\.1%"):
        compat.apply_effects(torch.zeros(1, 10), 16000, [["silence", "1", "0.1", "0.1%"]])


def test_an_absent_package_says_so_when_used() -> None:
    absent = compat._Absent("sed_eval")
    with pytest.raises(ModuleNotFoundError, match="pip install sed_eval"):
        absent.SegmentBasedMetrics()
