"""NaN features are zeros to a head, and are counted; many end the run."""

from typing import Any

import pytest
import torch

from codecssl.superb.upstreams.finite_guard import Guarded
from codecssl.tokenize.common.errors import UserError


class Fragile(torch.nn.Module):
    """NaN in one frame of one layer for a silent wave, infinite for a loud one."""

    def get_downsample_rates(self, key: str) -> int:
        return 10

    def forward(self, wavs: list[torch.Tensor]) -> dict[str, Any]:
        first = torch.ones(len(wavs), 4, 2)
        second = torch.ones(len(wavs), 4, 2)
        for i, wav in enumerate(wavs):
            second[i, 3, 0] = float("nan") if not wav.any() else float("inf") if wav.max() > 1 else 2.0
        return {"hidden_states": [first, second]}


def test_broken_waves_are_emptied_and_counted_once() -> None:
    guard = Guarded(Fragile())
    waves = [torch.zeros(40), torch.full((40,), 0.5), torch.full((40,), 2.0)]
    for _ in range(2):
        states = guard(waves)["hidden_states"]
        assert all(torch.isfinite(state).all() for state in states)
        assert all((state[[0, 2]] == 0).all() for state in states)
        assert states[1][1, 3].tolist() == [2.0, 1.0]
    assert guard.count("x", 100) == 2
    assert guard.get_downsample_rates("hidden_states") == 10
    assert guard.count("x", 3) == 2
    guard([torch.full((40,), 2.0 + i) for i in range(4)])
    assert guard.count("x", 100) == 5
    guard([torch.full((40,), 7.0)])
    with pytest.raises(UserError, match="upstream x: NaN or infinite features for 6 waves of 100 utterances"):
        guard.count("x", 100)
