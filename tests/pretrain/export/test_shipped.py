"""Models that ship with the package: by name they load, run, and can be continued."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from codecssl.pretrain.export.export import load_pretrained
from codecssl.pretrain.export.pretrained import from_pretrained
from codecssl.pretrain.export.shipped import FOLDER, model_folder, shipped_models
from codecssl.pretrain.labels.label import LabelConfig, label
from codecssl.superb.upstreams.names import parse
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.write_codes import write_shards


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_loads_by_name(name: str) -> None:
    model = from_pretrained(name)
    assert model.card.fingerprint == load_codec(model.card.name).card.fingerprint
    stored = load_file(FOLDER / name / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    for key, value in model.model.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[key].float())
    codes = torch.zeros(2, len(model.card.row_sizes), 30, dtype=torch.int64)
    mel = torch.zeros(2, model.model.mel_spec.bands, 30, dtype=torch.uint8) if model.model.mel_spec else None
    output = model(codes, mel=mel, output_hidden_states=True)
    assert len(output.hidden_states) == model.model.config.layers + 1
    assert np.isfinite(output.last_hidden_state.numpy()).all()
    assert parse(name).kind == "model"
    assert parse(name).identity()["sha256"]


def test_laptop_16khz_ships() -> None:
    assert "laptop_16khz" in shipped_models()
    size = sum(path.stat().st_size for path in (FOLDER / "laptop_16khz").iterdir())
    assert size < 9 << 20
    assert not math.isnan(load_pretrained("laptop_16khz").mask_vector.sum().item())


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder("laptop_16khz") == FOLDER / "laptop_16khz"
    Path("laptop_16khz").mkdir()
    assert model_folder("laptop_16khz") == Path("laptop_16khz")
    with pytest.raises(UserError, match="no readable config.json"):
        load_pretrained("laptop_16khz")


def test_label_takes_a_shipped_model_by_name(tmp_path: Path) -> None:
    """It opens: the error is about the data, which has no log-mel plane."""
    card = load_codec("tiny_16khz").card
    write_shards(tmp_path / "data", card, [("u", np.zeros((len(card.row_sizes), 40), np.uint16), {})])
    config = LabelConfig(
        source="laptop_16khz", data=(tmp_path / "data",), output=tmp_path / "labels", clusters=2, sample_frames=40
    )
    with pytest.raises(UserError, match="data: not the log-mel plane that the model reads"):
        label(config)


def test_listing_the_shipped_models_does_not_load_torch() -> None:
    code = "import sys, codecssl.pretrain.export.shipped as s; s.shipped_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
