"""Entry point of a pretraining run: from a config and an output folder to a trained run folder."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from codecssl.pretrain import run_folder
from codecssl.pretrain.auto_batch import device_name, fit_batch
from codecssl.pretrain.build import build
from codecssl.pretrain.config import RunConfig
from codecssl.pretrain.data.corpus import TokenCorpus
from codecssl.pretrain.data.loader import Loader
from codecssl.pretrain.data.open_data import open_data
from codecssl.pretrain.engine import checkpoint
from codecssl.pretrain.engine.checkpoint import Saved
from codecssl.pretrain.engine.distributed import ProcessGroup, join_ranks
from codecssl.pretrain.engine.engine import start_engine, zero_stage
from codecssl.pretrain.engine.fp32_state import load_weights
from codecssl.pretrain.frame_rate import at_frame_rate
from codecssl.pretrain.monitor.reference_curves import curve_key, find, verdict
from codecssl.pretrain.monitor.sanity_checks import check_targets, data_report, model_report
from codecssl.pretrain.monitor.step_profiler import Tracer
from codecssl.pretrain.monitor.telemetry import MetricsRow, Telemetry
from codecssl.pretrain.objectives.objective import Objective
from codecssl.pretrain.objectives.targets import make_target
from codecssl.pretrain.training import Training
from codecssl.tokenize.common.process import StopSignal, Watchdog
from codecssl.tokenize.common.remote import is_remote
from codecssl.tokenize.common.retry import patiently

_STUCK = "the same command resumes from the newest checkpoint (log.stall_minutes sets how long to wait)"


def run(config: RunConfig, output: Path, *, profile: bool = False, stop: StopSignal | None = None) -> None:
    """Train to the last step, starting from the newest checkpoint in `output` if there is one.

    Every process of the run must call it. profile: also trace some steps into output/profile. stop: handler that has
    recorded signals since before this call. For errors that the user can fix, rank 0 raises UserError and the other
    ranks raise SystemExit. Raises SystemExit(PREEMPTED) after SIGTERM or SIGUSR2.
    """
    group = join_ranks()
    train, valid, held_out = group.together(lambda: _open(config, output, group))
    config = at_frame_rate(config, train.corpus.card.frame_rate)
    chosen = ""
    if config.data.auto_batch:
        config, chosen = fit_batch(config, train.corpus, output, group)
        train, valid, held_out = group.together(lambda: open_data(config, group.ranks))
    targets = group.once(lambda: _check(config, train))
    with ExitStack() as stack:
        group.once(lambda: stack.enter_context(run_folder.alone(output)))
        found, warnings, changes = group.once(lambda: _claim(config, output, train, held_out, group))
        objective, saved = group.together(lambda: _objective(config, train.corpus, found))
        state = saved.state
        telemetry = (
            Telemetry(output, step=saved.step, retry_seconds=config.log.retry_seconds) if group.first else Mute()
        )
        stack.callback(telemetry.close)
        for warning in warnings:
            telemetry.warn(warning)
        for change in changes:
            telemetry.say(f"config: {change}")
        telemetry.say(model_report(objective, train.corpus.card, group.device))
        telemetry.say(data_report(train, valid, config, targets))
        if chosen:
            telemetry.say(chosen)
        telemetry.say(_engine_report(config, group, found))
        curve = find(curve_key(config, train.corpus.card.weights_sha256, train.plan.frames_per_epoch))
        telemetry.expected = curve.losses if curve else {}
        with group.hearing():
            engine = start_engine(objective, config, step=saved.step, moments=saved.moments)
        del saved  # the engine owns two thirds of it now; the rest is not needed
        stop = stop or stack.enter_context(StopSignal())
        beat = output / "ranks" / f"{group.rank:05d}.json"
        watch = stack.enter_context(Watchdog(config.log.stall_minutes, rank=group.rank, hint=_STUCK, beat=beat))
        tracer = stack.enter_context(Tracer(output / "profile")) if profile and group.first else None
        if tracer and config.optim.steps - int(state["step"]) < Tracer.STEPS:
            telemetry.warn(f"--profile: no trace, it needs {Tracer.STEPS} steps and fewer are left; raise optim.steps")
        Training(config, output, engine, train, valid, telemetry, group, stop, watch, tracer).to_the_end(state)
        rows = [(row["step"], row["loss"]) for row in telemetry.rows if row["split"] == "valid"]
        if curve and (line := verdict(curve, rows)):
            telemetry.say(line)


class Mute(Telemetry):
    """Telemetry of the ranks other than 0, without output."""

    def __init__(self) -> None:
        self.rows, self.expected, self.unheard = [], {}, False

    def say(self, text: str) -> None:
        pass

    def log(self, row: MetricsRow) -> None:
        pass

    warn = say

    def draw(self) -> None:
        pass

    close = draw


def _check(config: RunConfig, train: Loader) -> list[Tensor]:
    """Check the targets and return their histograms over whole global batches."""
    whole = Loader(train.corpus, train.plan, config.mask, config.objective, seed=config.seed)
    return check_targets(whole, make_target(config.objective, train.corpus.card, train.corpus.label_sizes))


def _open(config: RunConfig, output: Path, group: ProcessGroup) -> tuple[Loader, Loader | None, TokenCorpus]:
    """Open the data. On a resume, wait for folders that existed at the last start."""
    if run_folder.has_begun(output):
        before = run_folder.read_config(output).data
        data, known = config.data, {*before.dirs, *before.labels, *before.valid_dirs, *before.valid_labels}
        for folder in (*data.dirs, *data.labels, *data.valid_dirs, *data.valid_labels):
            if folder in known and not is_remote(folder):
                patiently((Path(folder) / "dataset.json").stat, folder, seconds=config.log.retry_seconds)
    return open_data(config, group.ranks)


def _claim(
    config: RunConfig, output: Path, train: Loader, held_out: TokenCorpus, group: ProcessGroup
) -> tuple[Path | None, list[str], list[str]]:
    """Claim the folder for this run. Return the checkpoint to resume from, warnings, and changes of the config."""
    valid = held_out.fingerprints if config.data.valid_dirs else []
    data: dict[str, Any] = {"codec": train.corpus.card.to_dict(), "train": train.corpus.fingerprints, "valid": valid}
    data["ranks"] = {"world_size": group.world_size, "device": device_name(group.device)}
    if (mel := train.corpus.require_mel(config.model.input)) is not None:
        data["mel"] = mel.to_dict()
    found, corrupt = checkpoint.newest_intact(output / "checkpoints")
    changes = run_folder.claim(output, config, data, step=int(checkpoint.read_state(found)["step"]) if found else 0)
    warnings = [
        f"{path.name}: {checkpoint.damage(path)} is corrupt; the run resumes from {found and found.name}, and it is now"
        f" {checkpoint.set_aside(path).name}"
        for path in corrupt
    ]
    return found, [*warnings, *_left_out(config, train.corpus)], changes


def _left_out(config: RunConfig, corpus: TokenCorpus) -> list[str]:
    """Return a warning if utterances are too short. At a low frame rate of the codec there may be many of them."""
    least = config.data.min_frames
    left_out = corpus.frames[corpus.frames < least]
    if not len(left_out):
        return []
    rate = float(corpus.card.frame_rate)
    return [
        f"data.min_seconds {least / rate:.2f} ({least} frames at {rate:g} a second) leaves out {len(left_out)} of"
        f" {len(corpus)} utterances, {left_out.sum() / rate:.1f} s of audio; lower it, and mask.span_seconds to at most"
        " half of it, to train on them"
    ]


def _objective(config: RunConfig, corpus: TokenCorpus, found: Path | None) -> tuple[Objective, Saved]:
    """Build the objective, and load the checkpoint's state if there is one."""
    objective = build(config, corpus, fresh=found is None)
    if found is None:
        return objective, Saved({"step": 0, "losses": []})
    saved = checkpoint.load(found)
    load_weights(objective, saved.weights, found)
    objective.load_extra_state(saved.extra)
    return objective, saved


def _engine_report(config: RunConfig, group: ProcessGroup, found: Path | None) -> str:
    engine = config.engine
    return (
        f"engine: {group.world_size} process(es), {engine.accumulation} micro-batch(es) each, {engine.precision},"
        f" ZeRO stage {zero_stage(config)}; " + (f"resumes from {found.name}" if found else "starts at step 0")
    )
