"""Train a bottleneck and its head; the model is frozen.

    head: the task's loss on the unmodified states. The quantizer is initialized from the directions that this head uses
    stage A: without labels, distance of later layers' states to those of the unmodified model + the quantizer's losses
    stage B: the task's loss on the states after the bottleneck + the distance to the answers of the head on the
        unmodified states + the quantizer's losses

Every head is trained by the same procedure, whatever its input: the same steps and batches in `head` and in `b`, and
the best weights on the validation part. All random choices are determined by (seed, stage, step). A resumed run is
therefore identical to an uninterrupted one.
"""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codecssl.pretrain.model.lengths import lengths_to_mask
from codecssl.pretrain.model.model import CodecModel
from codecssl.superb.task_codec.bottleneck import Bottleneck, later_states
from codecssl.superb.task_codec.config import BottleneckTrainConfig
from codecssl.superb.task_codec.examples import Examples
from codecssl.superb.task_codec.head_training import (
    STAGES,
    Best,
    Summaries,
    draw,
    error_rate,
    evaluates,
    lr_at,
    steps_of,
    update,
)
from codecssl.superb.task_codec.rvq import masked_square, quantizer_dropout
from codecssl.superb.task_codec.states import Source, batch, quantised
from codecssl.tokenize.common.errors import UserError

VQ_WEIGHT = {"none": 0.2, "ctc": 0.2, "class": 0.005}
"""Weight of commitment and codebook loss in stage B by kind of head, as published (arXiv 2507.12701)."""
LEAST_USES = 1.0
"""An entry with fewer uses between two searches is dead."""


def distillation(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Squared distance of layer-normed states [B, T, D], mean over layers and the frames of mask [B, T]."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([masked_square(_normed(s), _normed(t), mask) for s, t in pairs]).mean()


def _normed(state: Tensor) -> Tensor:
    return F.layer_norm(state, state.shape[-1:])


class BottleneckTraining:
    """Training of a bottleneck and a head, which resumes from `state`.

    head: trained on the unmodified states (`train_head`), or None. source: states L, L + 1, ... of the model.
    """

    def __init__(
        self, model: CodecModel, layer: int, bottleneck: Bottleneck, head: Any, found: Examples, source: Source,
        config: BottleneckTrainConfig,
    ) -> None:  # fmt: skip
        self.model, self.layer, self.bottleneck = model, layer, bottleneck
        self.head, self.teacher = copy.deepcopy(head), head
        self.found, self.source, self.config = found, source, config
        self.stage, self.step, self.fitted = STAGES.index("a"), 0, False
        self.best = Best()
        self.dead: list[int] = [0] * bottleneck.rvq.config.num_codebooks
        self.revived = 0
        self.optimizer = self._optimizer()

    # ------------------------------------------------------------ the run

    def steps(self) -> int:
        """Steps of the current stage. Without a head there is no stage B."""
        return 0 if STAGES[self.stage] == "b" and self.head is None else steps_of(self.config, self.stage)

    def run(self, log: Callable[[dict[str, Any]], None], save: Callable[[], None], save_seconds: float = 60.0) -> None:
        """Train to the end. `log` gets a row about every 50 steps.

        `save` is called every `save_seconds` and after each stage.
        """
        if not self.fitted:
            self.fit()
        last = time.monotonic()
        while self.stage < len(STAGES):
            while self.step < self.steps():
                self._one(log)
                if time.monotonic() - last > save_seconds:
                    save()
                    last = time.monotonic()
            self._end_stage()
            save()

    def _one(self, log: Callable[[dict[str, Any]], None]) -> None:
        config, steps = self.config, self.steps()
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(config, self.stage, self.step)
        losses = getattr(self, f"_losses_{STAGES[self.stage]}")(draw(self.found, config, self.stage, self.step))
        update(self.optimizer, losses["loss"])
        self.step += 1
        more: dict[str, Any] = {}
        if self.step % config.revive_steps == 0:
            more["dead"] = self._revive(self.step < 0.8 * steps)
        if STAGES[self.stage] == "b" and evaluates(config, self.stage, self.step):
            more["valid_error"] = round(self._validate(), 5)
        if self.step % 50 == 0 or self.step == steps or more:
            row = {name: round(float(value.detach()), 6) for name, value in losses.items()}
            log({"stage": STAGES[self.stage], "step": self.step, "steps": steps, **row, **more})

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(((self.config.seed * 3 + self.stage) << 32) + self.step)

    # ------------------------------------------------------------ the stages

    def fit(self) -> None:
        """Initialize the bottleneck from utterances of the training part."""
        random, frames, taken = np.random.default_rng(self.config.seed), 0, []
        for index in random.permutation(self.found.parts["train"]).tolist():
            taken.append(index)
            frames += len(self.source(index)[0])
            if frames >= self.config.fit_frames:
                break
        states, lengths = batch(lambda index: self.source(index)[:1], taken)
        wanted = None if self.teacher is None else self.teacher.directions()
        self.bottleneck.fit(states[0], lengths, self._generator(), wanted)
        self.fitted = True

    def _losses_a(self, rows: list[int]) -> dict[str, Tensor]:
        teacher, frames = batch(self.source, rows)
        later, _, vq = self._through(teacher[0], frames)
        mask = lengths_to_mask(frames, teacher[0].shape[1], teacher[0].device)
        first = 1 if len(teacher) > 1 else 0  # the layers after L, if any
        cut = [state[:, : mask.shape[1]] for state in later]
        distance = distillation(cut[first:], teacher[first:], mask)
        return {"loss": distance + self.config.vq_weight_a * vq, "distance": distance, "vq": vq}

    def _losses_b(self, rows: list[int]) -> dict[str, Tensor]:
        states, frames = batch(self.source, rows)
        with torch.no_grad():
            answers = self.teacher(states, frames)
        later, lengths, vq = self._through(states[0], frames)
        logits = self.head(later, lengths)
        task = self.head.loss(logits, lengths, [self.found.labels[i] for i in rows])
        distance = self.head.divergence(logits, answers, frames)
        loss = task + self.config.answers_weight * distance + VQ_WEIGHT[self.found.kind] * vq
        return {"loss": loss, "task": task, "distance": distance, "vq": vq}

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

    def _revive(self, wanted: bool) -> list[int]:
        if wanted:
            self.dead = self.bottleneck.rvq.revive(*self._pooled, LEAST_USES, self._generator())
            self.revived += sum(self.dead)
        else:
            self.dead = [int((book.uses < LEAST_USES).sum()) for book in self.bottleneck.rvq.books]
        return self.dead

    # ------------------------------------------------------------ model selection

    def summaries(self, count: int | None = None) -> Summaries:
        """Head summaries after the current bottleneck, of its first `count` codebooks."""
        return Summaries(self.head, quantised(self.model, self.layer, self.bottleneck, self.source, count))

    def _validate(self) -> float:
        error = error_rate(self.head, self.summaries(), self.found, "valid")
        self.best.offer(error, self._modules())
        return error

    def _end_stage(self) -> None:
        self.best.restore(self._modules())
        self.stage, self.step = self.stage + 1, 0
        if self.stage < len(STAGES):
            self.optimizer = self._optimizer()
            if self.steps():
                self._validate()  # the initial weights may be the best

    def _modules(self) -> dict[str, nn.Module]:
        return {"bottleneck": self.bottleneck} | ({"head": self.head} if self.head is not None else {})

    def _optimizer(self) -> torch.optim.Optimizer:
        modules = [self.bottleneck] if STAGES[self.stage] == "a" else self._modules().values()
        parameters = [p for module in modules for p in module.parameters()]
        return torch.optim.AdamW(parameters, weight_decay=self.config.weight_decay)

    # ------------------------------------------------------------ resuming

    def state(self) -> dict[str, Any]:
        """Training state for `load`."""
        plain = {name: getattr(self, name) for name in PLAIN}
        weights = {name: module.state_dict() for name, module in self._modules().items()}
        return plain | {"best": self.best.state, "weights": weights, "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from the result of `state`."""
        for name in PLAIN:
            setattr(self, name, state[name])
        self.best = Best(state["best"])
        for name, module in self._modules().items():
            module.load_state_dict(state["weights"][name])
        if self.stage < len(STAGES):
            self.optimizer = self._optimizer()
            self.optimizer.load_state_dict(state["optimizer"])


PLAIN = ("stage", "step", "fitted", "dead", "revived")


def save_state(path: Path, identity: str, state: dict[str, Any]) -> None:
    """Write the training state atomically."""
    from codecssl.tokenize.common.files import atomic_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save({"identity": identity, "training": state}, file)


def load_state(path: Path, identity: str) -> dict[str, Any] | None:
    """Load what `save_state` wrote; None without a file. Raises UserError for a run with other settings."""
    if not path.is_file():
        return None
    found = torch.load(path, weights_only=True)
    if found["identity"] != identity:
        raise UserError(f"{path.parent.parent}: was begun with other settings or data; give them or another --output")
    training: dict[str, Any] = found["training"]
    return training
