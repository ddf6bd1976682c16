"""Training a bottleneck: stage A without labels, stage B with the task's own loss; the model stays as it is.

    stage A: distance of the later layers' states to those of the model as it is + the quantizer's losses
    stage B: the head's loss on the states after the bottleneck + the quantizer's losses

All that is drawn is drawn by (seed, stage, step), so that a run that goes on is the run that was not stopped.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.pretrain.model import CodecModel
from codecssl.superb.bottleneck import Bottleneck, frame_mask, later_states
from codecssl.superb.compress_data import Examples
from codecssl.superb.compress_settings import TrainConfig
from codecssl.superb.compress_source import Source, batch
from codecssl.superb.heads import errors
from codecssl.superb.rvq import masked_square, quantizer_dropout
from codecssl.tokenize.errors import UserError

STAGES = ("head", "a", "b")
VQ_WEIGHT = {"none": 0.2, "ctc": 0.2, "class": 0.005}
"""Of commitment and codebook loss in stage B, by the head's kind, as published (arXiv 2507.12701)."""
LEAST_USES = 1.0
"""Of an entry between two looks; one used less is dead."""


def distillation(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean over layers of the squared distance of layer-normed states [B, T, D], over the frames of mask [B, T]."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([masked_square(_normed(s), _normed(t), mask) for s, t in pairs]).mean()


def _normed(state: Tensor) -> Tensor:
    return F.layer_norm(state, state.shape[-1:])


class Training:
    """A bottleneck and a head in training; `state` is all that goes on elsewhere.

    source: states L, L + 1, ... of the model as it is.
    """

    def __init__(
        self, model: CodecModel, layer: int, bottleneck: Bottleneck, head: Any, found: Examples, source: Source,
        config: TrainConfig,
    ) -> None:  # fmt: skip
        self.model, self.layer, self.bottleneck, self.head = model, layer, bottleneck, head
        self.found, self.source, self.config = found, source, config
        self.vq_weight = VQ_WEIGHT[found.kind]
        self.stage, self.step, self.fitted = 0, 0, False
        self.best: dict[str, Any] = {}
        self.dead: list[int] = [0] * bottleneck.rvq.config.num_codebooks
        self.revived = 0
        self.report: dict[str, Any] = {}
        self.optimizer = self._optimizer()

    # ------------------------------------------------------------ the run

    def steps_of(self, stage: int) -> int:
        if self.head is None and STAGES[stage] != "a":
            return 0
        return int(getattr(self.config, f"{STAGES[stage]}_steps"))

    def run(self, log: Callable[[dict[str, Any]], None], save: Callable[[], None], save_seconds: float = 60.0) -> None:
        """Go on to the end. `log` takes a row about every 50 steps; `save` is called as time passes."""
        if not self.fitted:
            self._fit()
        last = time.monotonic()
        while self.stage < len(STAGES):
            while self.step < self.steps_of(self.stage):
                self._one(log)
                if time.monotonic() - last > save_seconds:
                    save()
                    last = time.monotonic()
            self._end_stage()
            save()

    def _one(self, log: Callable[[dict[str, Any]], None]) -> None:
        config, steps = self.config, self.steps_of(self.stage)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - self.step / steps)
        row = getattr(self, f"_step_{STAGES[self.stage]}")(self._draw())
        self.step += 1
        row |= self._look(steps)
        if self.step % 50 == 0 or self.step == steps or len(row) > 4:
            log({"stage": STAGES[self.stage], "step": self.step, "steps": steps, **row})

    def _look(self, steps: int) -> dict[str, Any]:
        """What is done now and then: dead entries, validation."""
        row: dict[str, Any] = {}
        if STAGES[self.stage] != "head" and self.step % self.config.revive_steps == 0:
            row["dead"] = self._revive(self.step < 0.8 * steps)
        if self.head is not None and STAGES[self.stage] != "a":
            every = max(1, steps // self.config.evaluations)
            if self.step % every == 0 or self.step == steps:
                row["valid_error"] = self._validate()
        return row

    def _draw(self) -> list[int]:
        rows = self.found.parts["train"]
        random = np.random.default_rng([self.config.seed, self.stage, self.step])
        return [rows[i] for i in random.choice(len(rows), min(self.config.batch_size, len(rows)), replace=False)]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(((self.config.seed * 3 + self.stage) << 32) + self.step)

    # ------------------------------------------------------------ the stages

    def _fit(self) -> None:
        random, frames, taken = np.random.default_rng(self.config.seed), 0, []
        for index in random.permutation(self.found.parts["train"]).tolist():
            taken.append(index)
            frames += len(self.source(index)[0])
            if frames >= self.config.fit_frames:
                break
        states, lengths = batch(lambda index: self.source(index)[:1], taken)
        self.bottleneck.fit(states[0], lengths, self._generator())
        self.fitted = True

    def _step_head(self, rows: list[int]) -> dict[str, Any]:
        states, frames = batch(self.source, rows)
        loss = self.head.loss(self.head(states, frames), frames, [self.found.labels[i] for i in rows])
        return self._update({"loss": loss})

    def _step_a(self, rows: list[int]) -> dict[str, Any]:
        teacher, frames = batch(self.source, rows)
        later, _, vq = self._through(teacher[0], frames)
        mask = frame_mask(frames, teacher[0].shape[1], teacher[0].device)
        first = 1 if len(teacher) > 1 else 0  # the layers after L, where there are any
        cut = [state[:, : mask.shape[1]] for state in later]
        distance = distillation(cut[first:], teacher[first:], mask)
        return self._update({"loss": distance + self.config.vq_weight_a * vq, "distance": distance, "vq": vq})

    def _step_b(self, rows: list[int]) -> dict[str, Any]:
        teacher, frames = batch(lambda index: self.source(index)[:1], rows)
        later, lengths, vq = self._through(teacher[0], frames)
        loss = self.head.loss(self.head(later, lengths), lengths, [self.found.labels[i] for i in rows])
        return self._update({"loss": loss + self.vq_weight * vq, "task": loss, "vq": vq})

    def _through(self, state: Tensor, frames: list[int]) -> tuple[list[Tensor], list[int], Tensor]:
        """State L [B, T, D] -> the states after the bottleneck, their frames, and the quantizer's losses."""
        bottleneck, config = self.bottleneck.train(), self.config
        pooled, real = bottleneck.pooled(state, frames)
        num_codebooks = bottleneck.rvq.config.num_codebooks
        kept = quantizer_dropout(len(frames), num_codebooks, config.quantizer_dropout, self._generator())
        found = bottleneck.rvq(pooled, real, kept.to(state.device))
        self._pooled = pooled, real
        lengths = [-(-n // bottleneck.pool) * bottleneck.pool for n in frames]
        later = later_states(self.model, bottleneck.expand(found.features), lengths, self.layer)
        return later, lengths, found.commitment + found.codebook

    def _update(self, losses: dict[str, Tensor]) -> dict[str, Any]:
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 5.0)
        self.optimizer.step()
        return {name: round(float(value.detach()), 6) for name, value in losses.items()}

    def _revive(self, wanted: bool) -> list[int]:
        if wanted:
            self.dead = self.bottleneck.rvq.revive(*self._pooled, LEAST_USES, self._generator())
            self.revived += sum(self.dead)
        else:
            self.dead = [int((book.uses < LEAST_USES).sum()) for book in self.bottleneck.rvq.books]
        return self.dead

    # ------------------------------------------------------------ choosing

    @torch.no_grad()
    def _validate(self) -> float:
        source = self.source if STAGES[self.stage] == "head" else self._bottled
        rate = error_rate(self.head, source, self.found, "valid", self.config.batch_size)
        if not self.best or rate <= self.best["error"]:
            self.best = {"error": rate, "modules": _copy(self._modules())}
        return round(rate, 5)

    def _bottled(self, index: int) -> list[Tensor]:
        """States after the bottleneck, all codebooks kept."""
        state = self.source(index)[0][None]
        pooled, _ = self.bottleneck.pooled(state, [state.shape[1]])
        rvq = self.bottleneck.rvq
        expanded = self.bottleneck.expand(rvq.dequantise(rvq.encode(pooled)))
        return [s[0] for s in later_states(self.model, expanded, [expanded.shape[1]], self.layer)]

    def _end_stage(self) -> None:
        name = STAGES[self.stage]
        if self.best:
            _load(self._modules(), self.best["modules"])
            self.report[f"valid_error_{name}"] = self.best["error"]
            self.best = {}
        if name == "head" and self.head is not None:
            self.reference = _copy({"head": self.head})
        self.stage, self.step = self.stage + 1, 0
        if self.stage < len(STAGES):
            self.optimizer = self._optimizer()

    def _modules(self) -> dict[str, nn.Module]:
        found = {"bottleneck": self.bottleneck} if STAGES[min(self.stage, 2)] != "head" else {}
        return found | ({"head": self.head} if self.head is not None else {})

    def _optimizer(self) -> torch.optim.Optimizer:
        modules = {"head": [self.head], "a": [self.bottleneck], "b": [self.bottleneck, self.head]}[STAGES[self.stage]]
        parameters = [p for module in modules if module is not None for p in module.parameters()]
        return torch.optim.AdamW(parameters or [nn.Parameter(torch.zeros(1))], self.config.learning_rate)

    # ------------------------------------------------------------ going on

    def state(self) -> dict[str, Any]:
        head = None if self.head is None else self.head.state_dict()
        plain = ("stage", "step", "fitted", "best", "dead", "revived", "report")
        return {name: getattr(self, name) for name in plain} | {
            "bottleneck": self.bottleneck.state_dict(),
            "head": head,
            "optimizer": self.optimizer.state_dict(),
            "reference": getattr(self, "reference", None),
        }

    def load(self, state: dict[str, Any]) -> None:
        for name in ("stage", "step", "fitted", "best", "dead", "revived", "report"):
            setattr(self, name, state[name])
        self.bottleneck.load_state_dict(state["bottleneck"])
        if self.head is not None:
            self.head.load_state_dict(state["head"])
        if state["reference"] is not None:
            self.reference = state["reference"]
        if self.stage < len(STAGES):
            self.optimizer = self._optimizer()
            self.optimizer.load_state_dict(state["optimizer"])


def _copy(modules: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    return {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()}


def _load(modules: dict[str, nn.Module], states: dict[str, dict[str, Tensor]]) -> None:
    for name, module in modules.items():
        module.load_state_dict(states[name])


@torch.no_grad()
def error_rate(head: Any, source: Source, found: Examples, part: str, batch_size: int = 16) -> float:
    """Wrong answers as a share of the labels: 1 - accuracy of classes, phone error rate of CTC."""
    wrong = labels = 0
    rows = found.parts[part]
    for first in range(0, len(rows), batch_size):
        chosen = rows[first : first + batch_size]
        states, frames = batch(source, chosen)
        edits, count = errors(head.answers(head(states, frames), frames), [found.labels[i] for i in chosen])
        wrong, labels = wrong + edits, labels + count
    return wrong / max(labels, 1)


def train_head(head: Any, source: Source, found: Examples, config: TrainConfig) -> float:
    """A head alone, on any states; the best of the validation part is kept. Returns that part's error rate."""
    optimizer = torch.optim.AdamW(head.parameters(), config.learning_rate)
    every, best = max(1, config.head_steps // config.evaluations), None
    rows = found.parts["train"]
    for step in range(config.head_steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.head_steps)
        random = np.random.default_rng([config.seed, 0, step])
        chosen = [rows[i] for i in random.choice(len(rows), min(config.batch_size, len(rows)), replace=False)]
        states, frames = batch(source, chosen)
        optimizer.zero_grad(set_to_none=True)
        head.loss(head(states, frames), frames, [found.labels[i] for i in chosen]).backward()
        optimizer.step()
        if (step + 1) % every == 0:
            rate = error_rate(head, source, found, "valid", config.batch_size)
            if best is None or rate <= best[0]:
                best = rate, _copy({"head": head})
    if best is None:
        return error_rate(head, source, found, "valid", config.batch_size)
    _load({"head": head}, best[1])
    return best[0]


def save_state(path: Path, identity: str, state: dict[str, Any]) -> None:
    """Whole or not there."""
    from codecssl.tokenize.writer import atomic_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save({"identity": identity, "training": state}, file)


def load_state(path: Path, identity: str) -> dict[str, Any] | None:
    """What `save_state` wrote, or None. UserError for a run with other settings."""
    if not path.is_file():
        return None
    found = torch.load(path, weights_only=True)
    if found["identity"] != identity:
        raise UserError(f"{path.parent.parent}: was begun with other settings or data; give them or another --output")
    training: dict[str, Any] = found["training"]
    return training
