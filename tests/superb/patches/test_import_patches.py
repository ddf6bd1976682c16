"""The patches: each one is needed, and with all of them s3prl imports and runs (the effects: test_effects.py)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from codecssl.superb.patches import import_patches


def test_s3prl_imports_with_the_patches() -> None:
    """s3prl's problems, its hub and the classic keyword task import after two calls of `install`."""
    code = "from codecssl.superb.patches import import_patches as compat; compat.install(); compat.install()\n"
    code += "import s3prl.problem, s3prl.hub, s3prl.downstream.speech_commands.expert"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


NEEDED = {
    "torchaudio_backend": "import s3prl.dataio.dataset",
    "torchaudio_sox_effects": "import s3prl.downstream.sv_voxceleb1.dataset, s3prl.downstream.quesst14_dtw.dataset",
    "torchaudio_info": "from s3prl.util.audio_info import get_audio_info as info\n"
    "assert info(['a.wav'], ['a'], '.', num_workers=1)[0]['num_frames'] == 800",
    "torchaudio_load": "import torchaudio; wav, rate = torchaudio.load('a.wav')\n"
    "assert wav.shape == (1, 800) and rate == 16000 and torchaudio.load('a.wav', 10, 20)[0].shape == (1, 20)",
    "optional_packages": "import s3prl.task.event_prediction, s3prl.downstream.speech_commands.expert",
    "safe_globals": "import argparse, torch; torch.save(argparse.Namespace(a=1), 'a.pt'); torch.load('a.pt')",
}


FORKS = """
import json, os, sys, traceback
import librosa, torch, torchaudio
from codecssl.superb.patches import import_patches as compat
ends = {}
for name, code in json.loads(sys.argv[1]):
    if os.fork() == 0:
        [patch.apply() for patch in compat.PATCHES if patch.name != name]
        try:
            exec(code)
        except Exception as error:
            os.write(1, f"{name}: {type(error).__name__}: {error}\\n".encode())
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Errors of s3prl with all patches (key "") and with one of them left out."""
    folder = tmp_path_factory.mktemp("patches")
    soundfile.write(folder / "a.wav", np.zeros(800), 16_000)
    codes = [("", "\n".join(NEEDED.values())), *NEEDED.items()]
    command = [sys.executable, "-W", "ignore", "-c", FORKS, json.dumps(codes)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    lines = (line.partition(": ") for line in done.stdout.splitlines() if ": " in line)
    return {name: error for name, _, error in lines}


def test_with_all_patches_s3prl_runs(failures: dict[str, str]) -> None:
    assert "" not in failures


@pytest.mark.parametrize("name", NEEDED)
def test_each_patch_is_needed(name: str, failures: dict[str, str]) -> None:
    if name == "torchaudio_load" and name not in failures:
        pytest.skip("torchcodec finds an ffmpeg here: the patch steps aside")
    assert "Error" in failures[name]


def test_every_patch_has_its_reason_and_its_proof() -> None:
    assert {patch.name for patch in import_patches.PATCHES} >= set(NEEDED)
    assert all(len(patch.reason) > 40 for patch in import_patches.PATCHES)


def test_a_patch_keeps_existing_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchaudio that still has these functions keeps them."""
    import torchaudio

    import_patches.install()
    own = {"info": lambda path: None, "set_audio_backend": lambda name: None}
    for name, function in own.items():
        monkeypatch.setattr(torchaudio, name, function, raising=False)
    import_patches.install()
    assert all(getattr(torchaudio, name) is function for name, function in own.items())


def test_load_raises_errors_unrelated_to_ffmpeg(tmp_path: Path) -> None:
    import torchaudio

    import_patches.install()
    (tmp_path / "a.wav").write_text("a letter")
    with pytest.raises((RuntimeError, OSError)):
        torchaudio.load(str(tmp_path / "a.wav"))


def test_using_an_absent_package_names_it() -> None:
    absent = import_patches._Absent("sed_eval")
    with pytest.raises(ModuleNotFoundError, match="pip install sed_eval"):
        absent.SegmentBasedMetrics()
