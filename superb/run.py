"""Run SUPERB tasks: each (upstream, task, learning rate) in its own folder; what is finished is skipped."""

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from codecssl.superb import compat, results
from codecssl.superb.expert import Shelf, Upstream
from codecssl.superb.tasks import TASKS, Budget, Corpus, chance, make_problem, official_config, write_csvs
from codecssl.tokenize.errors import UserError

HUB_NAME = "codecssl_frozen"  # under which a run's upstream stands in s3prl's hub


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how to run; nothing here changes a result beyond rounding."""

    device: str = "cpu"
    num_workers: int = 0  # of s3prl's data loaders
    feature_cache_gib: float = 2.0  # memory per process for hidden states
    threads: int | None = None  # per process; None is torch's own choice


@dataclass(frozen=True, kw_only=True)
class Run:
    """One result to be had. `learning_rate` None is the task's official one."""

    upstream: Upstream
    task: str
    learning_rate: float | None
    budget: Budget
    seed: int
    data: str  # the corpus's name in tables
    root: Path
    output: Path

    def identity(self) -> dict[str, Any]:
        """What the result depends on; a run with another identity is another folder."""
        manifest = hashlib.sha256((self.root / "manifest.jsonl").read_bytes()).hexdigest()
        settings: dict[str, Any] = {"task": self.task, "learning_rate": self.learning_rate, "seed": self.seed}
        settings["budget"] = {k: v for k, v in asdict(self.budget).items() if k != "learning_rates"}
        return {
            "upstream": self.upstream.identity(),
            "manifest_sha256": manifest,
            "data": self.data,
            **settings,
        }

    @functools.cached_property
    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:8]
        rate = f"lr{self.learning_rate:g}" if self.learning_rate is not None else "lr"
        upstream = "".join(c if c.isalnum() or c in "-_@." else "_" for c in self.upstream.name.strip("/"))[-60:]
        return self.output / "runs" / upstream / self.task / f"{self.budget.name}-{rate}-seed{self.seed}-{digest}"

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()


def run_all(
    runs: Sequence[Run], machine: Machine, *, jobs: int = 1, report: Callable[[Run, Any], None]
) -> dict[str, Exception]:
    """Run what is not finished, `jobs` at a time; results.jsonl is written after each.

    `report(run, outcome)` is called once per run with its row or with the exception that ended it. Returns
    the failures by folder: one that fails doesn't stop the others.
    """
    failures: dict[str, Exception] = {}
    for run, outcome in _outcomes([run for run in runs if not run.finished], machine, jobs):
        if isinstance(outcome, Exception):
            failures[str(run.folder)] = outcome
        results.publish(run.output)
        report(run, outcome)
    return failures


def _outcomes(runs: Sequence[Run], machine: Machine, jobs: int) -> Iterator[tuple[Run, Any]]:
    """Runs of one upstream and task stay in one process: the second one finds the features of the first."""
    if jobs == 1:
        for run in runs:
            yield run, _attempt(run, machine)
        return
    units: dict[tuple[Upstream, str], list[Run]] = {}
    for run in runs:
        units.setdefault((run.upstream, run.task), []).append(run)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # CUDA and threads can't be forked
        futures = {pool.submit(_attempt_all, unit, machine): unit for unit in units.values()}
        try:
            for future in as_completed(futures):
                unit, died = futures[future], future.exception()
                yield from zip(unit, [died] * len(unit) if died else future.result(), strict=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _attempt_all(runs: Sequence[Run], machine: Machine) -> list[Any]:
    return [_attempt(run, machine) for run in runs]


def _attempt(run: Run, machine: Machine) -> Any:
    """The row, or the error, whose traceback goes to run.log."""
    try:
        return run_one(run, machine)
    except UserError as error:
        return error
    except Exception as error:
        with (run.folder / "run.log").open("a") as log:
            traceback.print_exc(file=log)
        return RuntimeError(f"{type(error).__name__}: {error}")  # others may not survive the way between processes


def run_one(run: Run, machine: Machine) -> results.Row:
    """Train and test one task's head on one upstream, in this process; returns the row of result.json.

    An unfinished run goes on from s3prl's last whole checkpoint. Everything s3prl prints goes to run.log.
    """
    start = time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)
    with _into_log(run.folder / "run.log"):
        _prepare_process(machine)
        task, splits = TASKS[run.task], Corpus(run.root).examples(TASKS[run.task])
        config = configure(run, machine)
        _drop_torn_checkpoints(run.folder / "train")
        _stand_in_hub(run, machine)
        make_problem(task, write_csvs(task, splits, run.folder)).run(**config)
    train = config["train"]
    row = {
        **run.identity(),
        **outcome(run.folder, task.metric),
        "metric": task.metric,
        "chance": chance(splits),
        "utterances": {split: len(examples) for split, examples in splits.items()},
        "classes": len({e.label for e in splits["train"]}),
        "learning_rate": config["build_optimizer"]["conf"]["lr"],
        "steps": train["total_steps"],
        "official_steps": official_config(task)["train"]["total_steps"],
        "batch": config["build_batch_sampler"]["train"]["batch_size"] * train["gradient_accumulate"],
        "machine": asdict(machine),
        "versions": _versions(),
        "seconds": round(time.monotonic() - start, 2),
    }
    for checkpoint in (run.folder / "train").glob("step_*"):
        shutil.rmtree(checkpoint)
    results.write_json(run.folder / "result.json", row)
    return row


def configure(run: Run, machine: Machine) -> dict[str, Any]:
    """s3prl's official configuration with this run's paths, upstream, seed, rate and scaled steps."""
    config, budget = official_config(TASKS[run.task]), run.budget
    config["target_dir"], config["cache_dir"] = str(run.folder), str(run.folder / "cache")
    config["device"], config["num_workers"] = machine.device, machine.num_workers
    config["prepare_data"] = {}
    config["build_upstream"] = {"name": HUB_NAME}
    config["build_batch_sampler"]["train"]["seed"] = 12345678 + run.seed  # s3prl's own default at seed 0
    train = config["train"] = {**config["train"], "seed": run.seed}
    if run.learning_rate is not None:
        config["build_optimizer"]["conf"]["lr"] = run.learning_rate
    if budget.divisor > 1:
        train["total_steps"] = budget.steps(train["total_steps"])
        train["eval_step"] = train["save_step"] = train["total_steps"] // budget.evaluations
        train["log_step"] = max(1, train["total_steps"] // 20)
    return config


def outcome(folder: Path, metric: str) -> results.Row:
    """What s3prl left: the best validation checkpoint's test metric, curves, layer weights."""
    import torch
    import yaml

    best = folder / "train" / "valid_best"
    test = yaml.safe_load((folder / "evaluate" / "valid_best" / "test" / "result.yaml").read_text())
    stats = yaml.safe_load((best / "training_stats.yaml").read_text())
    weights = torch.load(best / "model" / "state_dict.pt", map_location="cpu").get("featurizer.weights")
    return {
        "value": test[metric],
        "valid": stats["valid_best_metrics"][metric],
        "best_step": stats["global_step"],
        "layer_weights": None if weights is None else [round(w, 5) for w in weights.softmax(-1).tolist()],
        "curves": _curves(folder / "train" / "tb"),
    }


def _curves(folder: Path) -> dict[str, list[list[float]]]:
    """s3prl's TensorBoard scalars: "train-loss", "valid-accuracy", ... -> [[step, value], ...]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    latest = {tag: {s.step: round(s.value, 5) for s in points} for tag, points in scalars.items()}  # after a resume
    return {tag: [[step, values[step]] for step in sorted(values)] for tag, values in latest.items()}


def _stand_in_hub(run: Run, machine: Machine) -> None:
    """Put the run's upstream into s3prl's hub: built once, however often s3prl asks for it."""
    import s3prl.hub

    upstream = _build(run.upstream, run.seed, machine, run.output / "codes")
    setattr(s3prl.hub, HUB_NAME, lambda **options: upstream)


@functools.lru_cache(maxsize=1)
def _build(upstream: Upstream, seed: int, machine: Machine, codes: Path) -> Any:
    from codecssl.superb.features import CachedUpstream

    built = _shelf(machine.device, codes, seed).build(upstream)
    return CachedUpstream(built, int(machine.feature_cache_gib * 2**30))


@functools.cache
def _shelf(device: str, codes: Path, seed: int) -> Shelf:
    return Shelf(device=device, code_folder=codes, seed=seed)


def _prepare_process(machine: Machine) -> None:
    compat.install()
    import torch

    if machine.threads:
        torch.set_num_threads(machine.threads)


def _drop_torn_checkpoints(train: Path) -> None:
    """Remove what a kill left half-written; without a whole valid_best the run starts over."""
    best = train / "valid_best"
    if best.exists() and not _is_whole(best):
        shutil.rmtree(train)
    for checkpoint in train.glob("step_*"):
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def _is_whole(checkpoint: Path) -> bool:
    """s3prl writes config.yaml last; a torch file cut short is not a zip archive."""
    files = [
        checkpoint / "model" / "state_dict.pt",
        checkpoint / "task" / "state.pt",
        checkpoint / "optimizer.pt",
    ]
    return (checkpoint / "config.yaml").is_file() and all(f.is_file() and zipfile.is_zipfile(f) for f in files)


@contextlib.contextmanager
def _into_log(path: Path) -> Iterator[None]:
    logger, handler = logging.getLogger("s3prl"), logging.FileHandler(path)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with path.open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)
        handler.close()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("s3prl", "torch", "torchaudio")}
