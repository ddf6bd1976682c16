"""Transformer encoders built from fairseq2's modules: its own (post- and pre-norm), and ResiDual, which it lacks."""

from typing import Any

import torch
from torch import Tensor, nn

from codecssl.pretrain.config import ModelConfig
from codecssl.pretrain.model.attention import DotProductAttention
from codecssl.pretrain.model.dropout import replace_dropout
from codecssl.pretrain.model.fairseq2_parts import (
    AttentionBiasCache,
    BatchLayout,
    Linear,
    RotaryEncoder,
    StandardFeedForwardNetwork,
    StandardLayerNorm,
    StandardMultiheadAttention,
    StandardTransformerEncoder,
    StandardTransformerEncoderLayer,
    TransformerEncoder,
    TransformerNormOrder,
    Wav2Vec2PositionEncoder,
    init_bert_projection,
    unsharded,
)
from codecssl.pretrain.model.packing import from_grid, to_grid


def make_encoder(config: ModelConfig) -> TransformerEncoder:
    """Build the Transformer layers of a model: hidden states [N, D] of a packed batch -> [N, D]."""
    encoder = ResidualEncoder(config) if config.norm == "residual" else _standard_encoder(config)
    replace_dropout(encoder)
    return encoder


def _standard_encoder(config: ModelConfig) -> TransformerEncoder:
    rotary = _rotary(config)
    order = TransformerNormOrder.PRE if config.norm == "pre" else TransformerNormOrder.POST
    layers = [
        StandardTransformerEncoderLayer(
            _attention(config, rotary),
            StandardLayerNorm(config.dim, bias=True),
            _feed_forward(config),
            StandardLayerNorm(config.dim, bias=True),
            norm_order=order,
            dropout_p=config.dropout,
        )
        for _ in range(config.layers)
    ]
    final = StandardLayerNorm(config.dim, bias=True) if config.norm == "pre" else None
    return StandardTransformerEncoder(layers, final, layer_drop_p=config.layerdrop)


class ResidualEncoder(TransformerEncoder):
    """ResiDual (Xie et al. 2023, arXiv 2304.14802, section 3.1), as in EnCodecMAE.

    Two streams are initialised to the input: x0 = LN(x0 + f(x0)) after every block f, and x1 = x1 + f(x0), without
    norm. The output is x0 + LN(x1). Layer hooks receive x0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rotary = _rotary(config)
        shared = _feed_forward(config) if config.tie_ffn else None
        self.layers = nn.ModuleList(
            ResidualLayer(config, rotary, shared, owner=index == 0) for index in range(config.layers)
        )
        self.layer_norm = StandardLayerNorm(config.dim, bias=True)

    def forward(self, seqs: Tensor, seqs_layout: BatchLayout) -> Tensor:
        x0 = x1 = seqs
        cache = AttentionBiasCache()
        for index, layer in enumerate(self.layers):
            x0, x1 = layer(x0, x1, seqs_layout, cache)
            for hook in self._layer_hooks.values():
                if not hook(index, x0, seqs_layout, len(self.layers)):
                    break
        output: Tensor = x0 + self.layer_norm(x1)
        return output


class ResidualLayer(nn.Module):
    """Attention and feed-forward over the two streams. A shared feed-forward block is owned by one layer."""

    def __init__(
        self, config: ModelConfig, rotary: RotaryEncoder | None, shared: nn.Module | None, *, owner: bool
    ) -> None:
        super().__init__()
        self.self_attn = _attention(config, rotary)
        self.self_attn_layer_norm = StandardLayerNorm(config.dim, bias=True)
        self.ffn_layer_norm = StandardLayerNorm(config.dim, bias=True)
        self.dropout = nn.Dropout(config.dropout)
        self._borrowed: tuple[nn.Module, ...] = ()
        if shared is None or owner:
            self.own_ffn = _feed_forward(config) if shared is None else shared
        else:
            self._borrowed = (shared,)  # in a tuple: its weights are saved and trained once

    @property
    def ffn(self) -> nn.Module:
        return self._borrowed[0] if self._borrowed else self.own_ffn

    def forward(self, x0: Tensor, x1: Tensor, layout: BatchLayout, cache: AttentionBiasCache) -> tuple[Tensor, Tensor]:
        attended = self.self_attn(x0, layout, keys=x0, keys_layout=layout, values=x0, bias_cache=cache)
        x0, x1 = self._add(x0, x1, attended, self.self_attn_layer_norm)
        return self._add(x0, x1, self.ffn(x0), self.ffn_layer_norm)

    def _add(self, x0: Tensor, x1: Tensor, output: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        output = self.dropout(output)
        return norm(x0 + output), x1 + output


class ConvPositions(Wav2Vec2PositionEncoder):  # type: ignore[misc]  # final; a wrapper would rename its weights
    """wav2vec 2.0's grouped convolution over each item of a packed batch, with zeros before and after the item."""

    def forward(self, seqs: Tensor, seqs_layout: BatchLayout, *, state_bag: Any = None) -> Tensor:
        """[N, D] -> [N, D]"""
        grid = to_grid(seqs, seqs_layout)
        return from_grid(super().forward(grid, BatchLayout(grid.shape[:2], None, device=seqs.device)), seqs_layout)


class SinusoidalPositions(nn.Module):
    """Adds sinusoids (Vaswani et al. 2017, section 3.5) times a learned scalar, as EnCodecMAE does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(1))  # DeepSpeed requires a dimension

    def forward(self, x: Tensor, layout: BatchLayout) -> Tensor:
        """[N, D] -> [N, D]"""
        table = sinusoids(layout.max_seq_len, self.dim, x.device).to(x.dtype)
        return x + self.scale * table.index_select(0, layout.position_indices)


def sinusoids(frames: int, dim: int, device: torch.device) -> Tensor:
    """Return float32 [frames, dim]: sin(t / 10000^(2i/dim)) in column 2i, cos in column 2i + 1."""
    rate = torch.exp(torch.arange(0, dim, 2, device=device) * (-torch.log(torch.tensor(10_000.0)).item() / dim))
    angle = torch.arange(frames, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :dim]


def init_xavier_projection(projection: Linear) -> None:
    """Initialise a projection uniformly with Glorot's deviation, and its bias to zero."""
    nn.init.xavier_uniform_(projection.weight)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


_INITS = {"bert": init_bert_projection, "xavier": init_xavier_projection}
"""The names of `ModelConfig.layer_init`."""


def _rotary(config: ModelConfig) -> RotaryEncoder | None:
    """Build the rotary encoder, whose table all layers share."""
    if config.positions != "rotary":
        return None
    return RotaryEncoder(config.dim // config.heads, config.rotary_max_frames)


def _attention(config: ModelConfig, rotary: RotaryEncoder | None) -> StandardMultiheadAttention:
    return StandardMultiheadAttention(
        config.dim,
        config.heads,
        DotProductAttention(config.attention_dropout),
        qkv_proj_init_fn=_INITS[config.layer_init],
        pos_encoder=rotary,
        output_proj_init_fn=_INITS[config.layer_init],
        **unsharded(),
    )


def _feed_forward(config: ModelConfig) -> StandardFeedForwardNetwork:
    return StandardFeedForwardNetwork(
        config.dim,
        config.ffn_dim,
        bias=True,
        inner_activation=nn.GELU() if config.activation == "gelu" else nn.ReLU(),
        inner_dropout_p=config.activation_dropout,
        proj_init_fn=_INITS[config.layer_init],
        **unsharded(),
    )
