"""The training loop: a config and an output folder in, a trained run folder out."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codecssl.pretrain import checkpoint, rundir
from codecssl.pretrain.build import build
from codecssl.pretrain.chance import hashed
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data import open_data
from codecssl.pretrain.engine import join_ranks, start_engine, take_step
from codecssl.pretrain.loader import Batch, Loader
from codecssl.pretrain.objective import Scores, merged, summary
from codecssl.pretrain.report import check_targets, collapse, data_report, model_report, training_flops
from codecssl.pretrain.targets import make_target
from codecssl.pretrain.telemetry import Row, Telemetry, machine_row
from codecssl.slurm.job import Ranks
from codecssl.tokenize.errors import UserError

_DROPOUT, _VALID = 200, 201  # streams of random numbers


def run(config: RunConfig, output: Path) -> None:
    """Train as the config says, from the newest checkpoint in `output` if there is one, to the last step."""
    ranks = join_ranks()
    train, valid, held_out = open_data(config, ranks)
    perplexities = check_targets(train, make_target(config.objective, train.corpus.card, train.corpus.label_sizes))
    rundir.claim(
        output,
        config,
        {
            "codec": train.corpus.card.to_dict(),
            "train": train.corpus.fingerprints,
            "valid": held_out.fingerprints if config.data.valid_dirs else [],
        },
    )
    found = checkpoint.newest(output / "checkpoints")
    objective = build(config, train.corpus, from_codec=found is None)
    engine = start_engine(objective, config)
    state: dict[str, Any] = checkpoint.load(engine, found) if found else {"step": 0, "window": {}}
    telemetry = Telemetry(output, step=state["step"])
    try:
        telemetry.say(model_report(objective, train.corpus.card, engine.device))
        telemetry.say(data_report(train, valid, config, perplexities))
        Training(config, output, engine, train, valid, telemetry, ranks).to_the_end(state)
    finally:
        telemetry.close()


class Window:
    """Running sums since the last training row; the loss is part of a checkpoint, the clocks are not."""

    def __init__(self, loss: float = 0.0, steps: int = 0) -> None:
        self.loss: Tensor | float = loss
        self.steps = steps
        self.frames, self.timed_steps, self.waited, self.flops = 0, 0, 0.0, 0.0
        self.started = time.perf_counter()

    def add(self, loss: Tensor, batches: list[Batch], waited: float, flops: float) -> None:
        self.loss = self.loss + loss.detach().double()  # stays on the device: most steps do not wait for it
        self.steps += 1
        self.timed_steps += 1
        self.frames += sum(sum(batch.frames) for batch in batches)
        self.waited += waited
        self.flops += flops

    def mean_loss(self) -> float:
        return float(self.loss) / self.steps

    def state(self) -> dict[str, Any]:
        return {"loss": float(self.loss), "steps": self.steps}


@dataclass
class Training:
    """The loop's own state: what is trained, on what, and who is told."""

    config: RunConfig
    output: Path
    engine: Any
    train: Loader
    valid: Loader | None
    telemetry: Telemetry
    ranks: Ranks

    def to_the_end(self, state: dict[str, Any]) -> None:
        """Every step after the saved one: update, and at its times a row, a validation, a checkpoint."""
        log, first, last = self.config.log, int(state["step"]), self.config.optim.steps
        if first == last:
            self.telemetry.say(f"{self.output}: all {last} steps are done")
            return
        data = self.config.data
        batches = self.train.steps(first, last, workers=data.workers, prefetch=data.prefetch)
        window = Window(**state["window"])
        for done, (waited, parts) in enumerate(_timed(batches), start=first + 1):
            due = done % log.log_every == 0 or done == last
            lr = self.engine.get_lr()[0]
            loss, scores, norm = self.update(done - 1, parts, detailed=due)
            window.add(loss, parts, waited, training_flops(self.engine.module, parts))
            if due:
                self._row(done, window, parts, scores, lr=lr, grad_norm=norm)
                window = Window()
            paused = time.perf_counter()
            if self.valid and (done % log.valid_every == 0 or done == last):
                self.telemetry.log(self.validate(done))
                self.telemetry.draw()
            if done % log.checkpoint_every == 0 or done == last:
                self._save(done, window)
            window.started += time.perf_counter() - paused
        self.telemetry.draw()

    def update(self, step: int, parts: list[Batch], *, detailed: bool) -> tuple[Tensor, list[Scores], float | None]:
        """One optimizer step on the micro-batches of step (0, 1, ...).

        Returns the loss, the scores at masked frames (counted in detail, if asked) and the gradient's norm.
        """
        # Dropout and layerdrop start afresh every step, so that a resumed run needs no generator's state.
        torch.manual_seed(int(hashed(self.config.seed, _DROPOUT, step, self.ranks.rank)[0] >> np.uint64(1)))
        total, scores, norm = torch.zeros((), device=self.engine.device), [], None
        for batch in parts:
            loss = self.engine(batch.to(self.engine.device), detailed=detailed)
            # The parts of the loss add up already: no division by the number of micro-batches.
            self.engine.backward(loss.total, scale_wrt_gas=False)
            total = total + loss.total.detach()
            scores.append(loss.masked)
            norm = take_step(self.engine, want_norm=detailed)
        self.engine.module.after_update(step + 1)
        return total, scores, norm

    @torch.no_grad()
    def validate(self, step: int) -> Row:
        """A row of the held-out utterances: the same pieces and masks each time, all codebooks."""
        assert self.valid is not None
        module = self.engine.module.eval()
        losses = []
        for index in range(self.valid.plan.steps_per_epoch):
            for batch in self.valid.step(index):
                losses.append(module(batch.to(self.engine.device), detailed=True, score_visible=True))
        module.train()
        masked = summary(merged([loss.masked for loss in losses]))
        visible = summary(merged([loss.visible for loss in losses if loss.visible is not None]))
        return {
            "split": "valid",
            "step": step,
            "loss": module.weighted(masked, visible),
            **masked,
            "visible_cross_entropy": visible["cross_entropy"],
            "visible_accuracy": visible["accuracy"],
        }

    def _row(
        self,
        done: int,
        window: Window,
        parts: list[Batch],
        scores: list[Scores],
        *,
        lr: float,
        grad_norm: float | None,
    ) -> None:
        loss = window.mean_loss()
        self._must_be_finite(done, loss)
        seconds = max(time.perf_counter() - window.started, 1e-9)
        frames = sum(sum(part.frames) for part in parts)
        row: Row = {
            "split": "train",
            "step": done,
            "epoch": done / self.train.plan.steps_per_epoch,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            **summary(merged(scores)),
            "masked_percent": 100.0 * sum(int(part.mask.sum()) for part in parts) / frames,
            "padding_percent": 100.0 - 100.0 * frames / sum(part.mask.numel() for part in parts),
            "frames": frames,
            "frames_per_second": window.frames / seconds,
            "audio_hours_per_hour": window.frames / seconds / float(self.train.corpus.card.frame_rate),
            "step_seconds": seconds / window.timed_steps,
            "data_wait_percent": 100.0 * window.waited / seconds,
            "seconds_left": (self.config.optim.steps - done) * seconds / window.timed_steps,
            **machine_row(window.flops / seconds, self.config.engine.precision),
        }
        self.telemetry.log(row)
        if warning := collapse(done, self.config.optim.steps, row["predicted_perplexity"]):
            self.telemetry.warn(warning)

    def _save(self, done: int, window: Window) -> None:
        self._must_be_finite(done, float(window.loss))
        state = {"step": done, "window": window.state()}
        checkpoint.save(self.engine, self.output / "checkpoints", state, keep=self.config.log.keep_checkpoints)

    def _must_be_finite(self, done: int, loss: float) -> None:
        if not np.isfinite(loss):
            raise UserError(
                f"step {done}: the loss is {loss}; lower optim.lr (now {self.config.optim.lr}) or"
                " optim.clip_norm, and start again: the last checkpoint is from before"
            )


def _timed(batches: Iterable[list[Batch]]) -> Iterator[tuple[float, list[Batch]]]:
    """Each item with the seconds that it was waited for."""
    source = iter(batches)
    while True:
        started = time.perf_counter()
        try:
            item = next(source)
        except StopIteration:
            return
        yield time.perf_counter() - started, item
