"""--codec-weights: a model whose codec's weights have moved is of use in every command that needs the codec."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from codecssl.pretrain.cli import main as pretrain
from codecssl.superb.cli import main as superb
from codecssl.superb.commands import run as run_command
from codecssl.tokenize.backends import tiny_16khz
from codecssl.tokenize.registry import load_codec
from codecssl.tokenize.write_codes import write_shards

SHIPPED = Path(tiny_16khz.__file__).with_suffix(".safetensors")
SMALL = "--optim.steps 1 --model.dim 16 --model.heads 2 --model.ffn_dim 16 --model.layers 1 --data.valid_fraction 0"


@pytest.fixture
def moved(tmp_path: Path, corpus: Path, export_model: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, shards and a corpus in tmp_path, whose codec's weights have since moved to the path returned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before, after = tmp_path / "before" / "mine.safetensors", tmp_path / "after.safetensors"
    before.parent.mkdir()
    shutil.copy(SHIPPED, before)
    codec = load_codec(f"tiny_16khz@{before}")
    (tmp_path / "model").mkdir()
    export_model(codec, tmp_path / "model")
    random = np.random.default_rng(0)
    codes = random.integers(0, 1024, (40, codec.card.num_codebooks, 60)).astype(np.uint16)
    rows = ((f"u{i}", item, {"word": "ab"[i % 2]}) for i, item in enumerate(codes))
    write_shards(tmp_path / "shards", codec.card, rows)
    (tmp_path / "audio").mkdir()
    lines = []
    for i in range(8):
        soundfile.write(tmp_path / "audio" / f"{i}.wav", 0.1 * random.standard_normal(4000), 16_000)
        lines.append(json.dumps({"path": f"{i}.wav", "word": "ab"[i % 2], "task": "w"}) + "\n")
    (tmp_path / "audio" / "manifest.jsonl").write_text("".join(lines))
    (tmp_path / "probes.yaml").write_text("w: {label: word, task: w}\n")
    (tmp_path / "corpus").symlink_to(corpus)
    before.rename(after)
    return after


COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "run": (superb, "run --upstream model --tasks sd --data corpus --output out"),
    "cache": (superb, "cache --upstream model --tasks sd --data corpus --output out"),
    "embed": (superb, "embed audio --upstream model --output out"),
    "probe": (
        superb,
        "probe --upstream model --data audio/manifest.jsonl --probes probes.yaml --folds 3 --seeds 0 --output out",
    ),
    "task-codec": (
        superb,
        "task-codec --upstream model --layer 1 --data audio --output out --a-steps 1 --b-steps 1 --head-steps 1",
    ),
    "label": (pretrain, "label latents --clusters 4 --sample-frames 100 --data shards --output out"),
    "pretrain": (pretrain, f"run codec2vec_tiny_codes --data shards --output out {SMALL}"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_error_names_the_option_and_the_option_helps(
    name: str, moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_command, "_do", lambda *_: {})  # the audio is encoded before, for all runs
    main, words = COMMANDS[name]
    assert main(words.split()) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: codec tiny_16khz: ")
    assert line.endswith("; where they have moved, give --codec-weights PATH")
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"another codec's")
    assert main([*words.split(), "--codec-weights", str(other), "--codec-weights", str(moved)]) == 0


def test_weights_of_another_codec_are_named(moved: Path, tmp_path: Path, capsys: Any) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"another codec's")
    words = ["embed", str(tmp_path / "audio"), "--upstream", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    assert superb([*words, "--codec-weights", str(other)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"--codec-weights {other}: " in line
    with pytest.raises(SystemExit) as stop:
        superb([*words, "--codec-weights", str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err
