"""The encoder: codes in, hidden states out.

    codes [K, N] -> one embedding table per codebook, summed -> LayerNorm -> Linear -> (masked frames
    replaced by one learned vector) -> positions -> Transformer layers [N, D]

`model.input` adds a log-mel plane, or replaces the codes by it (EnCodecMAE's mel256-ec):

    mel [bands, N] -> Linear, added to the projected codes before the masked frames are replaced

A batch is packed: its N frames are those of all items, one item after the other, without padding.

Architecture: Codec2Vec (arXiv 2511.16639), which is HuBERT's encoder on top of code embeddings. The layers are
fairseq2's.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.pretrain.config import ModelConfig
from codecssl.pretrain.model.dropout import Dropout
from codecssl.pretrain.model.fairseq2_parts import BatchLayout, Linear, StandardLayerNorm
from codecssl.pretrain.model.layer_outputs import layer_outputs
from codecssl.pretrain.model.layers import ConvPositions, SinusoidalPositions, make_encoder
from codecssl.pretrain.model.packing import pack, packed_layout, unpack
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.mel import MelSpec


class CodeEmbedding(nn.Module):
    """Sum of one embedding per codebook. The rows of codebook k start at `offset[k]` of one flat table."""

    offset: Tensor

    def __init__(self, codebook_sizes: Sequence[int], latent_dim: int) -> None:
        super().__init__()
        self.rows = sum(codebook_sizes)
        # An additional row, always zero and without gradient, represents dropped codebooks.
        self.weight = nn.Parameter(torch.zeros(self.rows + 1, latent_dim))
        starts = torch.tensor([0, *codebook_sizes[:-1]]).cumsum(0)
        self.register_buffer("offset", starts[:, None], persistent=False)  # [K, 1]

    def load_tables(self, tables: Sequence[Tensor]) -> None:
        """Initialise the first columns from R tables [V_k, width] of a codec."""
        flat = torch.cat([table.detach().float().cpu() for table in tables])
        if len(flat) != self.rows or flat.shape[1] > self.weight.shape[1]:
            raise UserError(
                f"codec embeddings: {tuple(flat.shape)}, the model has {self.rows, self.weight.shape[1]};"
                " use the codec that wrote the shards, and a model.embedding_dim of its tables' width or more"
            )
        with torch.no_grad():
            self.weight[:-1, flat.shape[1] :] *= flat.square().mean().sqrt()  # noise with the tables' RMS
            self.weight[:-1, : flat.shape[1]] = flat

    def forward(self, codes: Tensor, kept: Tensor | None = None) -> Tensor:
        """int64 codes [K, N], kept codes bool [K, N] -> [N, latent_dim]."""
        rows = codes + self.offset
        if kept is not None:
            rows = rows.masked_fill(~kept, self.rows)
        return F.embedding_bag(rows.t().contiguous(), self.weight, mode="sum", padding_idx=self.rows)


class MelProjection(nn.Module):
    """Projection of stored log-mel values to the width of the layers: a fixed scale, then a linear layer.

    There is no normalisation per utterance. The features therefore retain its level and channel.
    """

    CENTER, SPREAD = 80.0, 48.0
    """Approximate mean and standard deviation of stored values of speech. 48 steps are 2.3 decades of power."""

    def __init__(self, bands: int, dim: int) -> None:
        super().__init__()
        self.linear = Linear(bands, dim, bias=True)

    def forward(self, mel: Tensor) -> Tensor:
        """uint8 [bands, N] -> [N, D]"""
        projected: Tensor = self.linear(self.scaled(mel).to(self.linear.weight.dtype))
        return projected

    @classmethod
    def scaled(cls, mel: Tensor) -> Tensor:
        """uint8 [bands, N] -> float32 [N, bands], mean about 0 and deviation about 1"""
        return (mel.t().float() - cls.CENTER) / cls.SPREAD


class CodecModel(nn.Module):
    """The pretrained model, without the heads of pretraining.

    mel: specification of the log-mel plane that it reads; required if `config.input` is mel or both.
    """

    def __init__(self, config: ModelConfig, card: CodecCard, mel: MelSpec | None = None) -> None:
        super().__init__()
        if (mel is None) != (config.input == "codes"):
            raise UserError(f"model.input: {config.input}, {'without a' if mel is None else 'with a'} log-mel plane")
        self.config, self.card, self.mel_spec = config, card, mel
        part = config.dim // 2 if config.fusion == "concat" else config.dim
        if config.input != "mel":
            width = config.embedding_dim or card.latent_dim
            self.embedding = CodeEmbedding(card.row_sizes, width)
            self.embedding.weight.requires_grad_(not config.freeze_embedding)
            self.input_norm = StandardLayerNorm(width, bias=True)
            # torch's default initialisation, as in HuBERT's post_extract_proj, not BERT's small weights. A small input
            # to the residual stream, and with it the speaker, is masked by the layers (LOG.md, 2026-11-21).
            self.projection = Linear(width, part, bias=True)
        if mel is not None:
            self.mel_projection = MelProjection(mel.bands, part)
        if config.freeze_front:
            self.requires_grad_(False)
        self.mask_vector = nn.Parameter(torch.empty(config.dim).uniform_())  # as HuBERT's mask_emb
        self.positions: nn.Module | None = None
        if config.positions == "conv":
            self.positions = ConvPositions(config.dim, config.conv_kernel, config.conv_groups)
        elif config.positions == "sinusoidal":
            self.positions = SinusoidalPositions(config.dim)
        self.encoder_norm = StandardLayerNorm(config.dim, bias=True) if config.norm == "post" else None
        self.input_dropout = Dropout(config.input_dropout)
        self.encoder = make_encoder(config)

    def forward(
        self,
        codes: Tensor,
        frames: Sequence[int],
        mask: Tensor | None = None,
        kept: Tensor | None = None,
        mel: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states [N, D] from codes int64 [K, N] and the frames of each item, N in all.

        mask: masked frames bool [N]. kept: kept codes bool [K, N]. mel: uint8 [bands, N].
        """
        x, layout = self.front(codes, frames, mask, kept, mel)
        return self.encoder(x, layout)

    def front(
        self,
        codes: Tensor,
        frames: Sequence[int],
        mask: Tensor | None = None,
        kept: Tensor | None = None,
        mel: Tensor | None = None,
        *,
        dropout: bool = True,
    ) -> tuple[Tensor, BatchLayout]:
        """Return the input [N, D] of the first layer, from the arguments of `forward`, and the layers' layout."""
        layout = self._layout(frames, codes.device)
        x = self._front(codes, layout, mask, kept, mel)
        return self.input_dropout(x) if dropout else x, layout

    @torch.no_grad()
    def extract(self, codes: Tensor, frames: Sequence[int], mel: Tensor | None = None) -> list[Tensor]:
        """Return the input of the first layer, then each layer's output: L + 1 tensors [B, T, D].

        codes: int64 [B, K, T], with padding. mel: uint8 [B, bands, T], for models that read it. In a pre-norm model the
        last output is after the final norm. There is no mask and no dropout. Outputs are zero in the padding. The model
        is in evaluation mode afterwards.
        """
        if self.training:
            self.eval()
        layout, width = self._layout(frames, codes.device), codes.shape[2]
        if mel is not None:
            self._check_mel(mel, mel.shape[1:], width)
            mel = pack(mel, layout)
        first = self._front(pack(codes, layout), layout, None, None, mel)
        *outputs, _, last = layer_outputs(self.encoder, first, layout)
        return [unpack(state, layout, width) for state in (first, *outputs, last)]

    def front_parameters(self) -> int:
        """Return the number of weights of the projections before the layers, which cost one product per frame."""
        parts = [getattr(self, name, None) for name in ("projection", "mel_projection")]
        return sum(p.numel() for part in parts if part is not None for p in part.parameters())

    def _embedded(self, codes: Tensor, kept: Tensor | None, mel: Tensor | None) -> Tensor:
        """Project codes, mel, or both to [N, D]. Both are summed or concatenated."""
        if self.config.input == "codes":
            x: Tensor = self.projection(self.input_norm(self.embedding(codes, kept)))
            return x
        self._check_mel(mel, None if mel is None else mel.shape, codes.shape[1])
        x = self.mel_projection(mel)
        if self.config.input == "mel":
            return x
        embedded = self.projection(self.input_norm(self.embedding(codes, kept)))
        return torch.cat([embedded, x], dim=1) if self.config.fusion == "concat" else x + embedded

    def _check_mel(self, mel: Tensor | None, shape: tuple[int, ...] | None, frames: int) -> None:
        """Raise UserError if there is no log-mel plane, or one of another [bands, frames] than the codes'."""
        bands = 0 if self.mel_spec is None else self.mel_spec.bands
        if mel is None or (bands and shape != (bands, frames)):
            found = "none" if mel is None else f"shape {tuple(mel.shape)}"
            raise UserError(
                f"mel: {found}, a model with model.input {self.config.input} needs uint8 [..., {bands}, {frames}]"
            )

    def _layout(self, frames: Sequence[int], device: torch.device) -> BatchLayout:
        config = self.config
        if config.positions == "rotary" and max(frames) > config.rotary_max_frames:
            raise UserError(
                f"input: {max(frames)} frames, but this model's model.rotary_max_frames is"
                f" {config.rotary_max_frames}; cut the input"
            )
        return packed_layout(frames, device)

    def _front(
        self, codes: Tensor, layout: BatchLayout, mask: Tensor | None, kept: Tensor | None, mel: Tensor | None
    ) -> Tensor:
        """Compute the input of the first layer, [N, D]."""
        x = self._embedded(codes, kept, mel)
        if mask is not None:
            x = torch.where(mask[:, None], self.mask_vector.to(x.dtype), x)
        if self.positions is not None:
            with _right_convolution(x, self.config):
                x = self.positions(x, layout)
        if self.encoder_norm is not None:
            x = self.encoder_norm(x)
        return x


def _right_convolution(x: Tensor, config: ModelConfig) -> AbstractContextManager[None]:
    """Turn oneDNN off for a grouped convolution in bf16 on a CPU with fewer than 16 channels a group.

    Its result is wrong there (torch 2.9.1, relative error 1.0 to 1.2; gradients are right). The model's smallest
    shipped config has 16 channels a group.
    """
    half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    wrong = config.positions == "conv" and x.device.type == "cpu" and half and config.dim < 16 * config.conv_groups
    return torch.backends.mkldnn.flags(enabled=False) if wrong else nullcontext()


def untrained(
    config: ModelConfig,
    card: CodecCard,
    tables: Sequence[Tensor] | None,
    seed: int,
    mel: MelSpec | None = None,
) -> CodecModel:
    """Build an untrained model with weights from `seed`, and code embeddings from the codec's `tables`, or noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CodecModel(config, card, mel)
        if config.input == "mel":
            return model
        nn.init.normal_(model.embedding.weight[:-1].data)
        if tables is not None:
            model.embedding.load_tables(tables)
    return model
