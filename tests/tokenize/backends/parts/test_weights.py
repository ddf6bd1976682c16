"""Weights from the disk, from the hub when it answers, and from neither."""

import hashlib

import pytest
import torch

from codecssl.tokenize.backends.parts import weights
from codecssl.tokenize.common.errors import UserError


class Model:
    """Stands for a class of transformers whose weights only the hub has; notes how it was asked."""

    asked: list

    @classmethod
    def from_pretrained(cls, source, output_loading_info, local_files_only=False):
        cls.asked.append("disk" if local_files_only else "hub")
        if local_files_only:
            raise OSError("not in the cache")
        return cls(), {"missing_keys": []}

    def float(self):
        return self

    def eval(self):
        return self

    def requires_grad_(self, grad):
        return self


@pytest.fixture(autouse=True)
def model():
    Model.asked = []
    return Model


def test_a_hub_that_does_not_answer_is_not_asked_for_files(model):
    """Each request of a file is tried for most of a minute."""
    with pytest.raises(UserError, match="no weights at someone/codec; get them by"):
        weights.load_pretrained("mimi", model, "someone/codec")
    assert model.asked == ["disk"]


def test_a_hub_that_answers_is_asked_after_the_disk(model, monkeypatch):
    monkeypatch.setattr(weights, "ask_hub", lambda repository: None)
    assert isinstance(weights.load_pretrained("mimi", model, "someone/codec"), model)
    assert model.asked == ["disk", "hub"]


def test_of_a_folder_the_hub_knows_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "ask_hub", lambda repository: pytest.fail("asked"))
    with pytest.raises(UserError, match="no weights at"):
        weights.load_pretrained("mimi", model, str(tmp_path))
    assert model.asked == ["disk"]


@pytest.mark.parametrize("good", [True, False])
def test_a_url_with_its_sha256_is_checked(tmp_path, good):
    (tmp_path / "weights.bin").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights" if good else b"other").hexdigest()
    url = f"{(tmp_path / 'weights.bin').as_uri()}#sha256={digest}"
    if good:
        assert weights.download(url).read_bytes() == b"weights"
    else:
        with pytest.raises(UserError, match=f"its sha256 is .*, not {digest}"):
            weights.download(url)
        assert not weights.downloaded(url).exists()
    assert weights.downloaded(url).name == "weights.bin"


@pytest.mark.parametrize("names", [[], ["a.pt", "b.pt"]])
def test_a_folder_without_a_single_checkpoint_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds 2 of \*.pt; give one" if names else r"no \*.pt in it"):
        weights.find_weights("mimi", str(tmp_path), "someone/codec", "a.pt", "*.pt")


def test_tensors_of_nested_dictionaries_and_of_lightning(tmp_path):
    path, tensor = tmp_path / "x.ckpt", torch.ones(2)
    torch.save({"state_dict": {"a.b": tensor, "c": {"d": tensor}, "e": 1}, "epoch": tensor}, path)
    assert sorted(weights.read_tensors(path, "mimi")) == ["a.b", "c.d"]
