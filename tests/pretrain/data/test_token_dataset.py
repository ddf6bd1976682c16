"""The loader for other trainers: the order of the plan, exact resume, ranks and workers."""

import pickle
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from codecssl.pretrain.data import token_dataset as module
from codecssl.pretrain.data.token_dataset import TokenDataset
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.shards import Shards

Make = Callable[..., Path]
SMALL = {"batch_frames": 400, "crop_frames": 60}


def equal(left: list[Any], right: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(same(a[key], b[key]) for key in a) for a, b in zip(left, right, strict=True)
    )


def test_a_batch_holds_the_codes_of_its_pieces(make_shards: Make) -> None:
    folder = make_shards()
    shards, dataset = Shards(folder), TokenDataset([folder], **SMALL)
    for batch in islice(dataset, dataset.steps_per_epoch):
        codes = batch["codes"].numpy()
        assert codes.shape[0] == len(batch["frames"]) > 1
        assert codes.shape[2] == max(batch["frames"])
        for item, (utterance, start, frames) in enumerate(zip(batch["utterance"], batch["start"], batch["frames"])):
            piece = shards.codes(int(utterance), start=int(start), stop=int(start + frames))
            assert np.array_equal(codes[item, :, :frames], piece)
            assert not codes[item, :, frames:].any()


def test_an_epoch_has_every_utterance_and_the_next_another_order(make_shards: Make) -> None:
    folder = make_shards()
    dataset = TokenDataset([folder], **SMALL)
    count = dataset.steps_per_epoch
    batches = list(islice(dataset, 2 * count))
    epochs = [[int(u) for batch in batches if batch["epoch"] == e for u in batch["utterance"]] for e in (0, 1)]
    usable = set(np.flatnonzero(Shards(folder).frames >= 20).tolist())
    assert set(epochs[0]) == set(epochs[1]) == usable
    assert epochs[0] != epochs[1]


def test_ranks_divide_the_global_batches(make_shards: Make) -> None:
    folder = make_shards()
    whole = list(islice(TokenDataset([folder], **SMALL), 6))
    ranks = [list(islice(TokenDataset([folder], **SMALL, rank=rank, world_size=3), 6)) for rank in range(3)]
    for step, batch in enumerate(whole):
        parts = torch.cat([ranks[rank][step]["utterance"] for rank in range(3)])
        assert torch.equal(parts, batch["utterance"])
        assert min(len(ranks[rank][step]["frames"]) for rank in range(3)) > 0


def test_workers_change_nothing_and_a_resume_is_exact(make_shards: Make) -> None:
    """State after a batch that the loop has seen, while the workers have read further; other numbers of workers."""
    folder = make_shards()
    expected = list(TokenDataset([folder], **SMALL, steps=9))
    dataset = TokenDataset([folder], **SMALL, steps=9)
    seen = []
    for batch in DataLoader(dataset, batch_size=None, num_workers=2):
        seen.append(batch)
        if len(seen) == 4:
            break
    assert equal(seen, expected[:4])
    state = pickle.loads(pickle.dumps(dataset.state_dict(seen[-1])))
    for workers in (0, 3):
        other = TokenDataset([folder], **SMALL, steps=9)
        other.load_state_dict(state)
        assert equal(list(DataLoader(other, batch_size=None, num_workers=workers)), expected[4:])
    one = TokenDataset([folder], **SMALL, steps=9)
    assert equal(list(islice(one, 5)), expected[:5])
    again = TokenDataset([folder], **SMALL, steps=9)
    again.load_state_dict(one.state_dict())
    assert equal(list(again), expected[5:]), "without workers the dataset must know its position"


def test_a_stateful_loader_saves_each_workers_own_position(make_shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader such as torchdata's StatefulDataLoader calls state_dict and load_state_dict in its workers."""
    folder = make_shards()
    expected = list(TokenDataset([folder], **SMALL, steps=12))

    class Worker:
        id, num_workers = 1, 3

    monkeypatch.setattr(module, "get_worker_info", lambda: Worker)
    worker = TokenDataset([folder], **SMALL, steps=12)
    assert equal(list(islice(worker, 2)), [expected[1], expected[4]])
    other = TokenDataset([folder], **SMALL, steps=12)
    other.load_state_dict(worker.state_dict())
    assert equal(list(other), [expected[7], expected[10]])
    assert get_worker_info() is None


def test_the_state_of_other_data_or_another_order_is_refused(make_shards: Make) -> None:
    folder = make_shards()
    dataset = TokenDataset([folder], **SMALL)
    for other, key in (
        (TokenDataset([make_shards("more", seed=5)], **SMALL), "shards"),
        (TokenDataset([folder], **SMALL, seed=2), "seed"),
    ):
        with pytest.raises(UserError, match=f"state: saved with another {key}; use the shards and settings"):
            other.load_state_dict(dataset.state_dict())
    with pytest.raises(UserError, match="rank 2: must be from 0 to world_size - 1, which is 1"):
        TokenDataset([make_shards("third", seed=7)], **SMALL, rank=2, world_size=2)


def test_the_readmes_loop_trains(make_shards: Make, tmp_path: Path) -> None:
    """The example of pretrain/README.md, run on small shards: a plain PyTorch loop that resumes."""
    text = Path(module.__file__).parents[1].joinpath("README.md").read_text()
    [example] = re.findall(r"```python\n(# A plain PyTorch loop.*?)```", text, re.DOTALL)
    shards, state = make_shards(), tmp_path / "state.pt"
    example = example.replace('"shards"', repr(str(shards))).replace('"state.pt"', repr(str(state)))
    example = example.replace("20_000", "400").replace("steps=1_000", "steps=4").replace("768", "16")
    first: dict[str, Any] = {}
    exec(example, first)
    assert first["batch"]["step"] == 3
    assert torch.isfinite(first["loss"])
    second: dict[str, Any] = {}
    exec(example.replace("steps=4", "steps=6"), second)
    assert second["batch"]["step"] == 5, "the second run must resume after step 3"
    assert torch.load(state)["data"]["step"] == 6
