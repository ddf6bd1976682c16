"""Weights from the disk, from the hub when it answers, and from neither."""

import pytest

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
