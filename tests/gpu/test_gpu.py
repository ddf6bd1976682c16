"""The checks of `make gpu`: on a GPU if there is one, and at tiny sizes on the CPU."""

import json
from pathlib import Path

import gpu_checks
import pytest
import torch
from gpu_checks import CHECKS, Setting, run_check


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: torch sees none")
@pytest.mark.parametrize("name", CHECKS)
def test_on_the_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    rows = run_check(name, Setting("cuda", False, tmp_path))["rows"]
    assert rows
    assert not [row for row in rows if not row.get("ok", True)]


def test_every_check_runs_on_the_cpu_at_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert gpu_checks.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [check["check"] for check in found["checks"]] == list(CHECKS)
    rows = {check["check"]: check["rows"] for check in found["checks"]}
    assert all(rows.values())
    assert [row["what"] for row in rows["codecs"]] == ["tiny_16khz", "dac_16khz"]
    assert {row["what"] for row in rows["steps"]} >= {"codec2vec_base_codes, bf16", "encodecmae_base, fp32"}
    assert {"tiny, DeepSpeed", "tiny, DeepSpeed, compiled"} <= {row["what"] for row in rows["speed"]}
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# make gpu: all ok")
    assert all(f"## {name}" in text for name in CHECKS)


def test_a_check_that_raises_or_fails_is_not_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(setting: Setting) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setitem(CHECKS, "codecs", raises)  # type: ignore[arg-type]
    monkeypatch.setitem(CHECKS, "steps", lambda setting: iter([{"what": "x", "ok": False}]))
    monkeypatch.setitem(CHECKS, "speed", lambda setting: iter([{"what": "y", "figure": 1}]))
    for only, code in (("codecs", 1), ("steps", 1), ("speed", 0)):
        arguments = ["--device", "cpu", "--tiny", "--output", str(tmp_path), "--only", only]
        assert gpu_checks.main(arguments) == code
    assert json.loads((tmp_path / "gpu.json").read_text())["ok"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_missing_gpu_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_checks.main(["--output", str(tmp_path)]) == 1
    assert "error: --device cuda: torch sees no GPU; on a CPU: make gpu DEVICE=cpu" in capsys.readouterr().err
