"""torch.compile takes each encoder layer as one graph."""

import pytest
import torch

from codecssl.pretrain.config import ModelConfig
from codecssl.pretrain.model.fairseq2_parts import AttentionBiasCache
from codecssl.pretrain.model.layers import make_encoder
from codecssl.pretrain.model.packing import packed_layout


@pytest.mark.parametrize("frames", [[20, 20], [20, 13]], ids=["equal", "different"])
@pytest.mark.parametrize(("norm", "positions"), [("post", "conv"), ("pre", "rotary"), ("residual", "sinusoidal")])
def test_a_layer_has_no_graph_break(norm: str, positions: str, frames: list[int]) -> None:
    config = ModelConfig(dim=16, layers=1, heads=2, ffn_dim=24, conv_groups=4, norm=norm, positions=positions)  # type: ignore[arg-type]
    [layer] = make_encoder(config).layers
    layout, cache = packed_layout(frames, torch.device("cpu")), AttentionBiasCache()
    x = torch.randn(sum(frames), 16)
    torch._dynamo.reset()
    arguments = (x, x, layout, cache) if norm == "residual" else (x, layout, cache)
    found = torch._dynamo.explain(layer)(*arguments)
    assert (found.graph_count, found.graph_break_count) == (1, 0), [str(each.reason) for each in found.break_reasons]
