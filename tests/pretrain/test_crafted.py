"""Crafted run folders, exported models and labels: a command that reads one succeeds or ends with one line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crafted import change_bytes, change_text, fuzzed
from hypothesis import given
from hypothesis import strategies as st

from codecssl.pretrain.data.corpus import TokenCorpus
from codecssl.pretrain.export.export import export, load_pretrained
from codecssl.pretrain.monitor import status
from codecssl.tokenize.common.errors import UserError


def use(read: Callable[[], Any]) -> bool:
    """Return True if `read` succeeds, False after a UserError of one line. Any other error fails the test."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


RUN = "config.yaml data.json versions.json metrics.jsonl ranks/00000.json".split()  # noqa: SIM905
CHECKPOINT = "whole.json state.json".split()  # noqa: SIM905


@fuzzed(40)
@given(st.data())
def test_any_record_of_a_run(trained: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("c") / "run"
    shutil.copytree(trained / "run", folder)
    newest = max((folder / "checkpoints").glob("step-*"))
    path = data.draw(st.sampled_from([folder / name for name in RUN] + [newest / name for name in CHECKPOINT]))
    change = change_text if path.suffix == ".json" else change_bytes
    path.write_bytes(change(path.read_bytes(), data))
    use(lambda: status.lines(folder, status.status(folder)))
    use(lambda: export(folder, folder.parent / "model"))
    shutil.rmtree(folder.parent)


@fuzzed(40)
@given(st.data())
def test_any_value_of_an_exported_model(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("c") / "model"
    shutil.copytree(trained / "model", folder)
    path = folder / data.draw(st.sampled_from(["config.json", "config.json", "config.json", "model.safetensors"]))
    change = change_text if path.suffix == ".json" else change_bytes
    path.write_bytes(change(path.read_bytes(), data))
    loaded = use(lambda: load_pretrained(folder))
    assert not loaded or path.name == "config.json", "the sha256 of the weights is compared"
    shutil.rmtree(folder.parent)


@fuzzed(25)
@given(st.data())
def test_any_file_of_labels(trained: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("c") / "labels"
    shutil.copytree(trained / "labels", folder)
    names = "dataset.json dataset.json index.npy blocks.npy shards/00000.tar shards/00000.json".split()  # noqa: SIM905
    path = folder / data.draw(st.sampled_from(names))
    change = change_text if path.name == "dataset.json" else change_bytes
    path.write_bytes(change(path.read_bytes(), data))

    def read() -> None:
        corpus = TokenCorpus([trained / "shards"], labels=[folder])
        for index in range(len(corpus)):
            corpus.labels(index, 0, int(corpus.frames[index]))

    use(read)
    shutil.rmtree(folder.parent)
