"""A model with a bottleneck, saved as a folder: base codes -> few codes -> states and answers."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.configs.load import from_dict
from codecssl.pretrain.config import ModelConfig
from codecssl.pretrain.engine.fp32_state import load_weights
from codecssl.pretrain.model.fairseq2_parts import AttentionBiasCache
from codecssl.pretrain.model.layers import ResidualEncoder
from codecssl.pretrain.model.model import CodecModel
from codecssl.pretrain.model.packing import pack, packed_layout, unpack
from codecssl.superb.task_codec.bottleneck import BitRate, Bottleneck, check_layer, later_states
from codecssl.superb.task_codec.heads import HEADS
from codecssl.superb.task_codec.rvq import RvqConfig
from codecssl.tokenize.codec import CodecCard
from codecssl.tokenize.common.errors import UserError

MODEL_TYPE, VERSION = "codecssl-machine", 1
"""Type and version in config.json. The entry point `machine` names the type too."""
WEIGHTS = "model.safetensors"


class QuantisedModel(nn.Module):
    """A frozen model, its bottleneck after layer L, and the task's head if there is one."""

    def __init__(self, model: CodecModel, layer: int, bottleneck: Bottleneck, head: Any, names: Sequence[str]) -> None:
        super().__init__()
        check_layer(model, layer)
        self.model = model.eval().requires_grad_(False)
        self.layer, self.bottleneck, self.head, self.names = layer, bottleneck, head, tuple(names)

    @property
    def pool(self) -> int:
        return self.bottleneck.pool

    @torch.no_grad()
    def codes(self, base: Tensor) -> Tensor:
        """Codes [R, T] of the base codec -> codes int64 [K, ceil(T / pool)]."""
        state = state_at(self.model, base[None].long(), [base.shape[1]], self.layer)
        return self.bottleneck.encode(state[0])

    @torch.no_grad()
    def extract(self, codes: Tensor, frames: Sequence[int]) -> list[Tensor]:
        """Codes [B, k, T'] of the first k codebooks -> the model's states L, L + 1, ..., each [B, T' * pool, D].

        `frames`: frames of each item.
        """
        return later_states(self.model, self.bottleneck.restore(codes), [n * self.pool for n in frames], self.layer)

    @torch.no_grad()
    def logits(self, codes: Tensor, frames: Sequence[int]) -> Tensor:
        """Logits of the task's head for codes [B, k, T'] (see `heads`). Raises UserError without a head."""
        if self.head is None:
            raise UserError("this codec was made with --task none: it has no head; make one with a --task")
        found: Tensor = self.head(self.extract(codes, frames), [n * self.pool for n in frames])
        return found

    def answers(self, codes: Tensor, frames: Sequence[int]) -> list[list[str]]:
        """Names of the labels of each utterance."""
        found = self.head.answers(self.logits(codes, frames), [n * self.pool for n in frames])
        return [[self.names[label] for label in row] for row in found]


@torch.no_grad()
def state_at(model: CodecModel, codes: Tensor, frames: Sequence[int], layer: int) -> Tensor:
    """State L [B, T, D] of `CodecModel.extract`, without the layers after it."""
    if isinstance(model.encoder, ResidualEncoder):
        return model.extract(codes, frames)[layer]
    layout = packed_layout(frames, codes.device)
    state, _ = model.front(pack(codes, layout), frames, dropout=False)
    cache = AttentionBiasCache()
    for module in model.encoder.layers[:layer]:  # type: ignore[index,union-attr]
        state = module(state, layout, cache)
    if layer == model.config.layers and model.encoder.layer_norm is not None:
        state = model.encoder.layer_norm(state)  # type: ignore[operator]
    return unpack(state, layout, codes.shape[2])


# ---------------------------------------------------------------- on disk


def save(quantised: QuantisedModel, folder: Path, bit_rate: BitRate, more: dict[str, Any]) -> None:
    """Write weights, then config.json, without which the folder is not a codec. `more`: the training record."""
    from safetensors.torch import save as to_bytes

    from codecssl.tokenize.common.files import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in quantised.named_parameters()}
    card = quantised.model.card
    head = None if quantised.head is None else {"kind": quantised.head.kind, "labels": list(quantised.names)}
    description = {
        "model_type": MODEL_TYPE,
        "version": VERSION,
        "sampling_rate": card.sample_rate,
        "layer": quantised.layer,
        "pool": quantised.pool,
        "rvq": dataclasses.asdict(quantised.bottleneck.rvq.config),
        "bits_per_second": bit_rate.bits_per_second,
        "head": head,
        "model": dataclasses.asdict(quantised.model.config),
        "codec": card.to_dict(),
        **more,
    }
    write_atomic(folder / WEIGHTS, to_bytes(weights))
    write_atomic(folder / "config.json", (json.dumps(description, indent=1) + "\n").encode())


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a codec that `save` wrote. UserError for another folder or a newer version."""
    try:
        description: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        description = {}
    if description.get("model_type") != MODEL_TYPE:
        raise UserError(f"{folder}: is not a codec of codecssl-superb task-codec (its config.json says otherwise)")
    if description["version"] != VERSION:
        raise UserError(f"{folder}: version {description['version']}, this version reads {VERSION}; make it again")
    return description


def load(folder: Path) -> QuantisedModel:
    """Load what `save` wrote, on the CPU, in evaluation mode, without gradients."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description = read_config(folder)
    model = CodecModel(from_dict(ModelConfig, description["model"]), CodecCard.from_dict(description["codec"]))
    config, found = RvqConfig(**description["rvq"]), description["head"]
    bottleneck = Bottleneck(model.config.dim, description["pool"], config)
    states = model.config.layers - description["layer"] + 1
    names = found["labels"] if found else []
    head = HEADS[found["kind"]](model.config.dim, states, len(names)) if found else None
    quantised = QuantisedModel(model, description["layer"], bottleneck, head, names)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}); make it again") from error
    load_weights(quantised, weights, folder)
    return quantised.eval().requires_grad_(False)
