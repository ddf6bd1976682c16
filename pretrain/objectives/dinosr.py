"""Online clustering: DinoSR (Liu et al. 2023, arXiv 2305.10005), and SpidR's variant of it.

A teacher, the moving average of the student's Transformer, sees the unmasked input. The outputs of its top layers'
feed-forward blocks, before the residual, are normalised over time and clustered during training. At masked frames the
student predicts the cluster of each of these layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from codecssl.pretrain.config import OnlineConfig
from codecssl.pretrain.data.loader import Batch
from codecssl.pretrain.model.fairseq2_parts import Linear, init_bert_projection
from codecssl.pretrain.model.layer_outputs import layer_outputs
from codecssl.pretrain.model.layers import make_encoder
from codecssl.pretrain.model.model import CodecModel
from codecssl.pretrain.model.packing import from_grid, to_grid
from codecssl.pretrain.objectives.objective import (
    Loss,
    Objective,
    Scores,
    codebook_weights,
    parameters,
    score,
)

_EPSILON = 1e-5


class OnlineClusters(Objective):
    """Codec2Vec's online target. The streams are the clustered layers, from the lowest to the last.

    steps: number of steps of the whole run, for the teacher's schedule.
    """

    def __init__(self, model: CodecModel, config: OnlineConfig, steps: int) -> None:
        super().__init__()
        dim = model.config.dim
        self.model, self.config, self.steps = model, config, steps
        self.sizes = (config.clusters,) * config.top_layers
        self.gamma = codebook_weights("uniform", config.top_layers)
        self.heads = nn.ModuleList(
            Linear(dim, config.clusters, bias=True, init_fn=init_bert_projection) for _ in self.sizes
        )
        # In fp32 and out of the engine's reach: see `Objective`.
        codewords = _normed(torch.randn(config.top_layers, config.clusters, dim), dim=1)
        self._extra = {"sums": codewords, "counts": torch.ones(config.top_layers, config.clusters)}
        self._average = {name: p.detach().float().clone() for name, p in model.encoder.named_parameters()}
        self._teacher: tuple[Any, ...] = ()
        self._seen = {key: torch.zeros_like(value) for key, value in self._extra.items()}

    def head_parameters(self) -> int:
        return parameters(self.heads)

    # ------------------------------------------------------------ loss

    def forward(self, batch: Batch, *, detailed: bool = False, score_visible: bool = False) -> Loss:
        features = self.teacher_features(batch)
        states = self._student(batch)
        masked = self._score(states, features, batch.masked, detailed)
        total = (self.gamma.to(masked.cross_entropy.device) * masked.cross_entropy).sum() / batch.masked_total
        visible = None
        if score_visible:
            visible = self._score(states, features, batch.visible, detailed)
        if self.training:
            self._gather([feature.index_select(0, batch.masked) for feature in features])
        return Loss(total, masked, visible)

    def _student(self, batch: Batch) -> list[Tensor]:
        """Return the hidden states [N, D] for the head of each stream."""
        if self.config.variant == "dinosr":
            return [self.model(batch.codes, batch.frames, batch.mask, batch.kept, batch.mel)] * len(self.sizes)
        first, layout = self.model.front(batch.codes, batch.frames, batch.mask, batch.kept, batch.mel)
        *outputs, _ = layer_outputs(self.model.encoder, first, layout)
        return outputs[-len(self.sizes) :]

    def _score(self, states: Sequence[Tensor], features: Sequence[Tensor], where: Tensor, detailed: bool) -> Scores:
        labels = torch.stack(
            [self.assign(k, feature.index_select(0, where)) for k, feature in enumerate(features)], dim=1
        )
        logits = [head(state.index_select(0, where)) for head, state in zip(self.heads, states, strict=True)]
        return score(torch.cat(logits, dim=1), labels, self.sizes, detailed)

    # ------------------------------------------------------------ targets

    @torch.no_grad()
    def teacher_features(self, batch: Batch) -> list[Tensor]:
        """Return float32 [N, D] per stream: the teacher's feed-forward outputs, normalised over each item's frames.

        Modules before the layers (tables, positions, a post-norm model's first norm) are the student's own.
        """
        teacher = self._made_teacher()
        x, layout = self.model.front(batch.codes, batch.frames, mel=batch.mel, dropout=False)
        with _outputs_of([layer.ffn for layer in teacher.layers][-len(self.sizes) :]) as outputs:
            teacher(x, layout)
        valid = to_grid(torch.ones_like(outputs[0][:, :1], dtype=torch.float32), layout)
        grids = (to_grid(output.float(), layout) for output in outputs)
        return [from_grid(_normed(grid, dim=1, where=valid), layout) for grid in grids]

    def assign(self, stream: int, features: Tensor) -> Tensor:
        """Return the index [N] of the nearest codeword of features [N, D], by Euclidean distance."""
        codewords = self._extra["sums"][stream] / self._extra["counts"][stream][:, None]
        distance = codewords.pow(2).sum(1) - 2.0 * features @ codewords.t()
        return distance.argmin(1)

    def _gather(self, features: Sequence[Tensor]) -> None:
        """Accumulate this micro-batch's features for the update of the codewords."""
        for stream, own in enumerate(features):
            labels = self.assign(stream, own)
            self._seen["sums"][stream].index_add_(0, labels, own)
            self._seen["counts"][stream].index_add_(0, labels, torch.ones_like(own[:, 0]))

    # ------------------------------------------------------------ averages

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Update the used codewords, equally on all ranks, then the teacher (DinoSR, sections 3.2 and 3.3)."""
        seen, decay = self._seen, self.config.codebook_decay
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            for value in seen.values():
                torch.distributed.all_reduce(value)
        used = seen["counts"] > 0
        for key, where in (("sums", used[:, :, None]), ("counts", used)):
            moved = decay * self._extra[key] + (1.0 - decay) * seen[key]
            self._extra[key] = torch.where(where, moved, self._extra[key])
            seen[key].zero_()
        if (keep := self.teacher_decay(step)) < 1.0:
            for name, parameter in self.model.encoder.named_parameters():
                self._average[name].lerp_(parameter.detach().float(), 1.0 - keep)
            self._refresh()

    def teacher_decay(self, step: int) -> float:
        """Return the teacher's decay at update `step`; 1 leaves the teacher unchanged."""
        config, steps = self.config, self.steps
        if config.variant == "spidr":
            from math import exp

            return 1.0 - (1.0 - config.ema_start) * exp(-step / config.spidr_timescale)
        if step > config.freeze_fraction * steps:
            return 1.0
        risen = min(1.0, step / max(1.0, config.ema_fraction * steps))
        return config.ema_start + risen * (config.ema_end - config.ema_start)

    def _made_teacher(self) -> Any:
        if not self._teacher:  # a tuple: not a module's child, so that no engine casts or trains it
            with torch.random.fork_rng(devices=[]):  # its first weights are drawn; dropout's numbers must not shift
                teacher = make_encoder(self.model.config).eval().requires_grad_(False)
            self._teacher = (teacher.to(next(iter(self._average.values())).device),)
            self._refresh()
        return self._teacher[0]

    def _refresh(self) -> None:
        """Copy the fp32 average into the teacher, which computes in the student's precision."""
        student = dict(self.model.encoder.named_parameters())
        for name, parameter in self._made_teacher().named_parameters():
            parameter.data = self._average[name].to(student[name].dtype)

    # ------------------------------------------------------------ state

    def place(self, device: torch.device) -> None:
        self._extra, self._average, self._seen = (
            {key: value.to(device) for key, value in state.items()}
            for state in (self._extra, self._average, self._seen)
        )
        self._teacher = ()

    def extra_state(self) -> dict[str, Tensor]:
        return {**self._extra, **{f"teacher.{name}": value for name, value in self._average.items()}}

    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        for key, value in self._extra.items():
            value.copy_(state[key])
        for name, value in self._average.items():
            value.copy_(state[f"teacher.{name}"])
        self._teacher = ()


@contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of the modules while the context is open, in their order."""
    outputs: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda *call: outputs.append(call[2])) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _normed(x: Tensor, *, dim: int, where: Tensor | None = None) -> Tensor:
    """Normalise to zero mean and unit variance along `dim`, over the positions true in `where`; others become 0."""
    weight = torch.ones_like(x[..., :1]) if where is None else where.to(x.dtype)
    count = weight.sum(dim, keepdim=True).clamp(min=1.0)
    centred = (x - (x * weight).sum(dim, keepdim=True) / count) * weight
    return centred / (centred.pow(2).sum(dim, keepdim=True) / count + _EPSILON).sqrt()
