"""The training loop: steps, rows of metrics, validations, checkpoints, and a checkpoint before every exit."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.hashed_random import hashed
from codecssl.pretrain.data.loader import Batch, Loader
from codecssl.pretrain.engine import checkpoint
from codecssl.pretrain.engine.distributed import ProcessGroup
from codecssl.pretrain.engine.engine import after_update, backward, take_step
from codecssl.pretrain.monitor.sanity_checks import collapse, training_flops
from codecssl.pretrain.monitor.step_profiler import Tracer
from codecssl.pretrain.monitor.telemetry import MetricsRow, Telemetry, clock, machine_row
from codecssl.pretrain.objectives.objective import Scores, merged, summary
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.process import StopSignal, Watchdog
from codecssl.tokenize.common.retry import patiently

_DROPOUT = 200  # key of a stream of random numbers
_ESTIMATED = 5  # steps from which the duration of a run is estimated, before its first row


class MetricsWindow:
    """Measurements since the last row of metrics. The losses are part of a checkpoint; the timings are not."""

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self.losses = list(losses)
        """Losses of whole global batches, one per step."""
        self._parts: list[Tensor] = []  # this rank's losses, still on the device: most steps do not synchronise
        self.frames, self.steps, self.waited, self.flops = 0, 0, 0.0, 0.0
        self.started = time.perf_counter()

    def add(self, loss: Tensor, batches: list[Batch], waited: float, flops: float) -> None:
        self._parts.append(loss.detach().double())
        self.steps += 1
        self.frames += sum(sum(batch.frames) for batch in batches)
        self.waited += waited
        self.flops += flops

    def settle(self, group: ProcessGroup) -> list[float]:
        """Return the losses, summed over the ranks. The sum is per step and may therefore be done at any time."""
        if self._parts:
            self.losses += group.total(torch.stack(self._parts)).tolist()
            self._parts = []
        return self.losses


class Training:
    """State of the training loop: engine, data, process group and telemetry. The same on every rank."""

    def __init__(
        self, config: RunConfig, output: Path, engine: Any, train: Loader, valid: Loader | None,
        telemetry: Telemetry, group: ProcessGroup, stop: StopSignal, watch: Watchdog, tracer: Tracer | None = None,
    ) -> None:  # fmt: skip
        self.config, self.output, self.engine, self.train, self.valid = config, output, engine, train, valid
        self.telemetry, self.group, self.stop, self.watch, self.tracer = telemetry, group, stop, watch, tracer
        self.window, self.saved = MetricsWindow(), 0

    def to_the_end(self, state: dict[str, Any]) -> None:
        """Run every step after the saved one, with rows of metrics, validations and checkpoints at their intervals."""
        log, self.saved, last = self.config.log, int(state["step"]), self.config.optim.steps
        if self.saved >= last:
            self.telemetry.say(f"{self.output}: all {last} steps are done")
            return
        self.window = MetricsWindow(state["losses"])
        began, warm = self.saved, 0.0
        for done, (waited, parts) in enumerate(self._batches(self.saved, last), start=self.saved + 1):
            if done == began + 2:  # the first step of a start is slow
                warm = time.perf_counter()
            self._step(done, parts, waited, due=done % log.log_every == 0 or done == last)
            paused = time.perf_counter()
            if done == began + _ESTIMATED and log.log_every > _ESTIMATED:
                left = (last - done) * (paused - warm) / (_ESTIMATED - 1)
                self.telemetry.say(f"step {done:>6} | estimated time for the other {last - done} steps: {clock(left)}")
            if self.valid and (done % log.valid_every == 0 or done == last):
                self._log(self.validate(done))
                self._draw()
            if done % log.checkpoint_every == 0 or done == last:
                self._save(done)
            self.window.started += time.perf_counter() - paused
            if self.tracer:
                self.tracer.step()
        self._draw()

    def update(
        self, step: int, parts: list[Batch], *, detailed: bool
    ) -> tuple[Tensor, list[Scores], list[Scores], float | None]:
        """Do one optimizer step on this rank's micro-batches of step (0, 1, ...).

        Returns this rank's part of the loss, its scores at masked frames, its scores at visible frames if they are part
        of the loss, and the norm of the whole gradient. detailed: also count accuracy and usage in the scores.
        """
        # Dropout and layerdrop are seeded again at every step. A resumed run therefore needs no generator state.
        torch.manual_seed(int(hashed(self.config.seed, _DROPOUT, step, self.group.rank)[0] >> np.uint64(1)))
        total, norm = torch.zeros((), device=self.engine.device), None
        masked: list[Scores] = []
        visible: list[Scores] = []
        with self.group.hearing():
            for batch in parts:
                loss = self.engine(batch.to(self.engine.device), detailed=detailed)
                backward(self.engine, loss.total)
                total = total + loss.total.detach()
                masked.append(loss.masked)
                visible += [loss.visible] if loss.visible else []
                norm = take_step(self.engine, want_norm=detailed)
            after_update(self.engine, step + 1)
        return total, masked, visible, norm

    @torch.no_grad()
    def validate(self, step: int) -> MetricsRow:
        """Return a row of metrics on the held-out utterances.

        Every validation uses the same pieces and masks, and all codebooks. The batches are divided among the ranks.
        """
        assert self.valid is not None
        module = self.engine.module.eval()
        masked, visible = [], []
        batches = self.valid.plan.steps_per_epoch
        for turn in range(0, batches, self.group.world_size):
            index = turn + self.group.rank
            self._report(f"reading the validation data after step {step}")
            read, error = self._tried(partial(self.valid.step, min(index, batches - 1)))
            if (trouble := self.group.poll(error)[0]) is not None:
                self._abandon(step, trouble)
            for batch in read or []:  # ZeRO 3 needs all ranks in every forward pass
                self._report(f"validating after step {step}")
                with self.group.hearing():
                    loss = module(batch.to(self.engine.device), detailed=True, score_visible=True)
                masked.append(packed(loss.masked) * (index < batches))
                visible.append(packed(loss.visible) * (index < batches))
        module.train()
        means, others = (
            summary(unpacked(self.group.total(torch.stack(part).sum(0)), module.sizes)) for part in (masked, visible)
        )
        return {
            "split": "valid",
            "step": step,
            "loss": module.weighted(means, others),
            **means,
            **_of_visible(others),
        }

    def _batches(self, first: int, last: int) -> Iterator[tuple[float, list[Batch]]]:
        """Yield the seconds spent waiting for the data of each step, and its micro-batches.

        Between steps the ranks agree whether to continue. After a read error on any rank, or a signal to any rank, they
        save a checkpoint and stop.
        """
        data = self.config.data
        source = self.train.steps(first, last, workers=data.workers, prefetch=data.prefetch)
        for done in range(first, last):
            self.watch.report(f"waiting for the data of step {done + 1}")
            started = time.perf_counter()
            parts, error = self._tried(lambda: next(source))
            waited = time.perf_counter() - started
            self._report(f"waiting for the other ranks before step {done + 1}")
            if error is None and self.telemetry.unheard:
                error = UserError("standard output was closed by its reader; run the same command again to continue")
            trouble, stopped = self.group.poll(error, stop=self.stop.asked is not None)
            if trouble is not None:
                self._abandon(done, trouble)
            if stopped:
                self._leave(done)
            yield waited, parts or []

    def _tried(self, read: Callable[[], list[Batch]]) -> tuple[list[Batch] | None, UserError | None]:
        """Return (result of the read, its error)."""
        try:
            return read(), None
        except UserError as error:
            return None, error

    def _step(self, done: int, parts: list[Batch], waited: float, *, due: bool) -> None:
        self._report(f"in step {done}")
        lr = self.engine.get_lr()[0]
        loss, masked, visible, norm = self.update(done - 1, parts, detailed=due)
        self.window.add(loss, parts, waited, training_flops(self.engine.module, parts))
        bad_norm = norm is not None and not np.isfinite(norm)
        if due or bad_norm:
            self._losses_are_finite(done)
        if bad_norm:
            self._not_finite(done, f"the gradient's norm is {norm}")
        if due:
            self._row(done, parts, masked, visible, lr=lr, grad_norm=norm)
            self.window = MetricsWindow()

    def _row(
        self, done: int, parts: list[Batch], masked_scores: list[Scores], visible_scores: list[Scores],
        *, lr: float, grad_norm: float | None,
    ) -> None:  # fmt: skip
        window, group = self.window, self.group
        seconds = max(time.perf_counter() - window.started, 1e-9)
        counts = [(sum(part.frames), len(part.masked), part.mask.numel()) for part in parts]
        frames, masked, padded, total_frames, flops = group.total(
            torch.tensor([*map(sum, zip(*counts, strict=True)), window.frames, window.flops], dtype=torch.float64)
        ).tolist()
        machine = machine_row(flops / seconds / group.world_size, self.config.engine.precision)
        waited, machine["memory_gib"] = group.largest(window.waited, machine["memory_gib"])
        means = self._means(masked_scores)
        if visible_scores:
            means |= _of_visible(self._means(visible_scores))
        row: MetricsRow = {
            "split": "train",
            "step": done,
            "epoch": done / self.train.plan.steps_per_epoch,
            "loss": sum(window.losses) / len(window.losses),
            "lr": lr,
            "grad_norm": grad_norm,
            **means,
            "masked_percent": 100.0 * masked / frames,
            "padding_percent": 100.0 - 100.0 * frames / padded,
            "frames": int(frames),
            "ranks": group.world_size,
            "frames_per_second": total_frames / seconds,
            "audio_hours_per_hour": total_frames / seconds / float(self.train.corpus.card.frame_rate),
            "step_seconds": seconds / window.steps,
            "data_wait_percent": 100.0 * waited / seconds,
            "seconds_left": (self.config.optim.steps - done) * seconds / window.steps,
            **machine,
        }
        self._log(row)
        if warning := collapse(done, self.config.optim.steps, row["predicted_perplexity"], row["target_perplexity"]):
            self.telemetry.warn(warning)

    def _means(self, scores: list[Scores]) -> dict[str, list[float]]:
        """Return the metrics of the whole global batch, from the scores of all ranks."""
        return summary(unpacked(self.group.total(packed(merged(scores))), self.engine.module.sizes))

    def _save(self, done: int) -> None:
        self._report(f"saving step {done}")
        self._losses_are_finite(done)
        with self.group.hearing():
            saved = checkpoint.collect(self.engine, {"step": done, "losses": self.window.losses})
        folder, keep = self.output / "checkpoints", self.config.log.keep_checkpoints
        retry = self.config.log.retry_seconds
        self.group.once(lambda: checkpoint.save(saved, folder, keep=keep, retry_seconds=retry))
        self.saved = done

    def _abandon(self, done: int, error: UserError) -> NoReturn:
        """Save, unless just saved, and stop all ranks with the error."""
        try:
            if done != self.saved:
                self._save(done)
        except UserError as other:
            raise type(error)(f"{error}; step {done} could not be saved either: {other}") from other
        self.group.fail(type(error)(f"{error}; step {done} is saved") if done else error)

    def _leave(self, done: int) -> NoReturn:
        """Save, unless just saved, and exit with PREEMPTED, or as after Ctrl-C."""
        if done != self.saved:
            self._save(done)
        signal = self.stop.asked or "a signal to another rank"
        self.telemetry.say(f"stopped by {signal} after step {done}; the same command resumes from there")
        self.group.leave(self.stop.exit_code)

    def _log(self, row: MetricsRow) -> None:
        self.group.once(lambda: self.telemetry.log(row))

    def _draw(self) -> None:
        seconds = self.config.log.retry_seconds
        self.group.once(lambda: patiently(self.telemetry.draw, self.output / "curves.png", seconds=seconds))

    def _report(self, doing: str) -> None:
        self.watch.report(doing, waits_for_others=self.group.world_size > 1)

    def _losses_are_finite(self, done: int) -> None:
        losses = self.window.settle(self.group)
        for step, loss in enumerate(losses, start=done + 1 - len(losses)):
            if not np.isfinite(loss):
                self._not_finite(step, f"the loss is {loss}")

    def _not_finite(self, step: int, what: str) -> NoReturn:
        optim = self.config.optim
        self.group.fail(
            UserError(
                f"step {step}: {what}; lower optim.lr (now {optim.lr}) or optim.clip_norm (now {optim.clip_norm}), and"
                " start again: the last checkpoint is from before"
            )
        )


def _of_visible(means: dict[str, list[float]]) -> dict[str, list[float]]:
    """Select the metrics at visible frames that are part of a row."""
    return {f"visible_{key}": means[key] for key in ("cross_entropy", "accuracy")}


def packed(scores: Scores) -> Tensor:
    """Pack detailed scores into one vector, float64 on the CPU, for the sum over ranks."""
    assert scores.correct is not None
    parts = [scores.cross_entropy.detach(), scores.correct, *(scores.predicted or []), *(scores.target or [])]
    return torch.cat([torch.tensor([scores.frames], dtype=torch.float64), *(part.cpu().double() for part in parts)])


def unpacked(vector: Tensor, sizes: Sequence[int]) -> Scores:
    """Unpack scores from a sum of `packed` vectors. sizes: classes of each stream, [S]."""
    frames, entropy, correct, predicted, target = vector.split([1, len(sizes), len(sizes), sum(sizes), sum(sizes)])
    return Scores(int(frames), entropy, correct, list(predicted.split(list(sizes))), list(target.split(list(sizes))))
