"""The export for transformers: the same numbers where codecssl, fairseq2 and deepspeed are not installed."""

import json
import os
import re
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from codecssl.pretrain.cli import main
from codecssl.pretrain.export.pretrained import from_pretrained
from codecssl.pretrain.export.shipped import model_folder
from codecssl.pretrain.export.transformers_format import export_transformers
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import mel_plane
from codecssl.tokenize.registry import load_codec

BLOCKED = ("codecssl", "fairseq2", "fairseq2n", "deepspeed")

SCRIPT = """
import importlib, sys

BLOCKED = {blocked!r}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name, name=name)

for name in BLOCKED:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(name + " can be imported: the test would prove nothing")
sys.meta_path.insert(0, Refuse())

import numpy as np, torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    given = np.load(folder + "/../given.npz")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    codes = [given["codes0"], torch.from_numpy(given["codes1"])]
    planes = {{}}
    if config.input != "codes":
        waves = [given["wave0"], given["wave1"]]
        batch = extractor(None if config.input == "mel" else codes, raw_speech=waves, sampling_rate=16000)
        planes["mel"] = batch["mel"].numpy()
    else:
        batch = extractor(codes)
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    states = torch.stack(output.hidden_states).numpy()
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    np.savez(folder + "/../found.npz", states=states, mask=batch["attention_mask"].numpy(), **planes)
    model.save_pretrained(folder + "/../again")
    again = AutoModel.from_pretrained(folder + "/../again", trust_remote_code=True).eval()
    assert torch.equal(again(**batch).last_hidden_state, output.last_hidden_state)
    try:
        extractor([np.full_like(given["codes0"], 5000)], mel=[np.zeros((24, 1))])
    except ValueError as error:
        assert "\\n" not in str(error), error
    else:
        assert config.input == "mel", "codes out of range must be refused"
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees every installed package but those in BLOCKED."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root / "venv", with_pip=False)
    view = next((root / "venv" / "lib").glob("python*")) / "site-packages"
    for installed in Path(torch.__file__).parents[1].iterdir():
        name = installed.name.lower().lstrip("_")
        if not name.startswith((*BLOCKED, "editable__")) and installed.suffix != ".pth":
            target = view / installed.name
            if not target.exists():
                target.symlink_to(installed)
    return root / "venv" / "bin" / "python"


MODELS = [
    {"input": "codes", "norm": "post", "positions": "conv"},
    {"input": "codes", "norm": "pre", "positions": "rotary", "activation": "relu", "conv_kernel": 15},
    {"input": "both", "norm": "residual", "positions": "sinusoidal", "tie_ffn": True},
    {"input": "both", "norm": "pre", "positions": "sinusoidal", "fusion": "concat"},
    {"input": "mel", "norm": "residual", "positions": "conv", "conv_kernel": 15},
]


def test_the_same_numbers_without_codecssl(export_of: Callable[..., Path], bare_python: Path, tmp_path: Path) -> None:
    """Models of both families and the shipped model, with padded batches."""
    random, codec = np.random.default_rng(0), load_codec("tiny_16khz")
    folders = [*(export_of(codec.card, **settings) for settings in MODELS), "laptop_16khz"]
    waves = [0.1 * random.standard_normal(n).astype(np.float32) for n in (9_999, 16_000)]
    codes = [encoded.codes.numpy() for encoded in codec.encode([torch.from_numpy(wave) for wave in waves])]
    outputs = []
    for number, folder in enumerate(folders):
        outputs.append(tmp_path / f"out{number}" / "exported")
        export_transformers(folder, outputs[-1])
        given = {f"codes{i}": c for i, c in enumerate(codes)} | {f"wave{i}": w for i, w in enumerate(waves)}
        np.savez(outputs[-1].parent / "given.npz", **given)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(blocked=BLOCKED))
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(bare_python), "-W", "ignore", str(script), *map(str, outputs)], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for folder, output in zip(folders, outputs, strict=True):
        model, found = from_pretrained(folder), np.load(output.parent / "found.npz")
        assert found["mask"].sum(1).tolist() == [32, 50]
        for i, (wave, own) in enumerate(zip(waves, codes, strict=True)):
            mel = None
            if model.mel_spec is not None:
                plane = mel_plane(model.mel_spec, wave).T
                assert np.array_equal(found["mel"][i][:, : plane.shape[1]], plane)
                mel = torch.from_numpy(plane.copy())[None]
            expected = model(torch.from_numpy(own)[None], mel=mel, output_hidden_states=True).hidden_states
            states = np.stack([layer[0].numpy() for layer in expected])
            assert found["states"][:, i, : states.shape[1]].shape == states.shape
            assert np.abs(found["states"][:, i, : states.shape[1]] - states).max() < 1e-5, folder


def test_the_card_holds_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import ModelCard

    output = tmp_path / "model"
    arguments = ["export", "laptop_16khz", "--output", str(output), "--format", "transformers"]
    assert main(arguments) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    card = ModelCard.load(output / "README.md")
    assert card.data.license is None
    assert card.data.datasets is None
    assert {"tiny_16khz", "codec2vec", "codecssl"} <= set(card.data.tags)
    assert card.data.metrics == ["accuracy"]
    [result] = card.data.eval_results
    own = (model_folder("laptop_16khz") / "README.md").read_text()
    [accuracy] = re.findall(r"^\| valid \| \d+ \| [\d.]+ \| ([\d.]+) \|", own, re.MULTILINE)
    assert result.metric_value == float(accuracy)
    assert "AutoModel.from_pretrained" in card.text
    assert "codecssl.pretrain.export.pretrained" not in card.text
    assert "## Data" in card.text
    assert main([*arguments, "--half", "--license", "mit", "--dataset", "owner/name"]) == 0
    header = yaml.safe_load((output / "README.md").read_text().split("---")[1])
    assert (header["license"], header["datasets"]) == ("mit", ["owner/name"])
    assert json.loads((output / "config.json").read_text())["model_type"] == "codecssl"


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(UserError, match="is not empty and no earlier export"):
        export_transformers("laptop_16khz", tmp_path / "full")
    with pytest.raises(UserError, match="is not an exported model"):
        export_transformers(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert main(["export", "laptop_16khz", "--output", str(tmp_path / "out"), "--license", "mit"]) == 1
    assert "add --format transformers" in capsys.readouterr().err


def test_a_run_is_exported_too(tmp_path: Path) -> None:
    run = Path(__file__).parents[2] / "data" / "v1" / "run"
    export_transformers(run, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["codebook_sizes"] == [16, 8]
