"""A run of an upstream on a task with a learning rate, a seed and optionally a fold. Each run has its own folder."""

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb import results
from codecssl.superb.corpora.corpus import Selection, chance, open_corpus
from codecssl.superb.patches import decoded_audio, import_patches
from codecssl.superb.reporting.predictions import write_detections, write_predictions
from codecssl.superb.rows import ResultRow
from codecssl.superb.runner.clip_errors import clip_errors
from codecssl.superb.runner.csvs import write_csvs
from codecssl.superb.runner.ctc_lengths import REASON, shortfall
from codecssl.superb.runner.interrupted import prepare_training
from codecssl.superb.runner.outcome import outcome
from codecssl.superb.runner.problems import make_problem
from codecssl.superb.tasks import TASKS, Budget, Task, official_config
from codecssl.superb.tokens.token_cache import counts_of
from codecssl.superb.upstreams.build import UpstreamBuilder
from codecssl.superb.upstreams.names import Upstream
from codecssl.tokenize.common.files import alone_in, refuse_links_out
from codecssl.tokenize.common.hashing import file_sha256

HUB_NAME = "codecssl_frozen"  # name of a run's upstream in s3prl's hub


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Device, processes and memory of a run. They affect results only by rounding."""

    device: str = "cpu"
    num_workers: int = 0  # of s3prl's data loaders, and of qbe's search
    feature_cache_gib: float = 2.0  # memory per process for hidden states
    threads: int | None = None  # per process; None is torch's own choice
    cache: str | None = None  # the token cache's folder; None is `cache` in the output


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of one result. `learning_rate` None is the task's official one."""

    upstream: Upstream
    task: str
    learning_rate: float | None
    budget: Budget
    seed: int
    data: str  # the corpus's name in tables
    root: Path
    output: Path
    side: Path | None = None  # small lists of official corpora
    fold: int | None = None  # the tested one, where folds are taken in turn
    language_model: Path | None = None  # of ASR with LM

    def identity(self) -> dict[str, Any]:
        """Everything the result depends on. Runs with different identities have different folders."""
        settings: dict[str, Any] = {"task": self.task, "learning_rate": self.learning_rate, "seed": self.seed}
        settings["budget"] = {k: v for k, v in asdict(self.budget).items() if k != "learning_rates"}
        if self.fold is not None:
            settings["fold"] = self.fold
        if self.language_model is not None:
            settings["language_model"] = [self.language_model.name, _sha256(self.language_model)]
        corpus = open_corpus(self.root, self.side).identity(self.task)
        return {"upstream": self.upstream.identity(), "data": self.data, **corpus, **settings}

    @functools.cached_property
    def folder(self) -> Path:
        """Folder of this run. It does not depend on the spelling of the upstream's path."""
        identity = self.identity()
        rate = f"lr{self.learning_rate:g}" if self.learning_rate is not None else "lr"
        fold = f"-fold{self.fold}" if self.fold is not None else ""
        upstream = "".join(c if c.isalnum() or c in "-_@." else "_" for c in self.upstream.name.strip("/"))[-60:]
        name = f"{self.budget.name}-{rate}-seed{self.seed}{fold}"
        place, spelled = self.output / "runs" / upstream / self.task, f"{name}-{_digest(identity)}"
        if identity["upstream"]["sha256"] is None or (place / spelled).exists():
            return place / spelled
        weights = {key: identity["upstream"][key] for key in ("kind", "sha256")}
        codec = (self.upstream.argument or "").rpartition("@")[0]  # of NAME@PATH
        contents = f"{name}-{_digest(identity | {'upstream': weights | {'codec': codec}})}"
        return next((self.output / "runs").glob(f"*/{self.task}/{contents}"), place / contents)

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").is_file()


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


@functools.cache
def _sha256(path: Path) -> str:
    """Return the sha256 of a file. It is cached per process, since many runs use the same large file."""
    return file_sha256(path)


def run_one(run: Run, machine: Machine) -> ResultRow:
    """Train and test one task's head on one upstream, in this process. Return the row of result.json.

    An unfinished run starts its training again. With the official steps it resumes from s3prl's last whole checkpoint,
    and the row's `interrupted` records this. Everything s3prl prints goes to run.log.
    """
    refuse_links_out(run.folder, run.output)
    with alone_in(run.folder):
        row = results.read_json(run.folder / "result.json") or _run(run, machine)
        _tidy(run.folder)  # after writing the result: a kill in between costs no training
        return row


def _run(run: Run, machine: Machine) -> ResultRow:
    start = time.monotonic()
    task, selection = TASKS[run.task], open_corpus(run.root, run.side).select(TASKS[run.task], run.fold)
    with _into_log(run.folder / "run.log"):
        _prepare_process(machine)
        upstream = _stand_in_hub(run, machine)
        before = counts_of(upstream) or {}
        stride = upstream.get_downsample_rates("hidden_states")
        short = shortfall(task.name, selection, stride, run.upstream.name)
        if short and (warning := short.warning()):
            print(f"warning: {warning}")
        found = _trained(run, machine, task, selection) if task.problem else _searched(run, machine, selection)
        if task.problem:
            write_predictions(run.folder, task.name, selection.splits["test"], found, fold=run.fold, stride=stride)
            found["errors"] = clip_errors(run.folder, task.name, selection.splits["test"], found["values"])
    utterances = {split: len(examples) for split, examples in selection.splits.items()}
    broken = upstream.count(run.upstream.name, sum(utterances.values()))
    row = {
        **run.identity(),
        **found,
        "folder": run.folder.relative_to(run.output).as_posix(),
        "metric": task.metric,
        "utterances": {**utterances, "test": min(utterances["test"], run.budget.tested(task.work) or 10**9)},
        "not_official": open_corpus(run.root, run.side).deviations(run.task),
        "skipped": {
            **selection.skipped,
            **({"features not finite, set to 0": broken} if broken else {}),
            **({REASON: short.total} if short and short.total else {}),
        },
        **({"ctc_warning": short.warning()} if short and short.total else {}),
        "machine": asdict(machine),
        "codec": _codec_card(upstream),
        "codes": {key: count - before[key] for key, count in (counts_of(upstream) or {}).items()},
        "versions": _versions(),
        "seconds": round(time.monotonic() - start, 2),
    }
    results.write_json(run.folder / "result.json", row)
    return row


def leftovers(folder: Path) -> list[Path]:
    """Return data that only an unfinished run needs, e.g. 300 MB of optimiser state of a recurrent head."""
    train = folder / "train"
    return [*train.glob("step_*"), *train.glob("valid_best/optimizer.pt")]


def _tidy(folder: Path) -> None:
    """Remove the `leftovers`."""
    for path in leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _trained(run: Run, machine: Machine, task: Task, selection: Selection) -> ResultRow:
    """Train and test with s3prl's problem; returns its results and the settings used."""
    config = configure(run, machine)
    interrupted = prepare_training(run.folder, config["train"]["total_steps"], restart=run.budget.divisor > 1)
    corpus = open_corpus(run.root, run.side)
    csvs = write_csvs(task, selection.splits, run.folder, corpus)
    problem = make_problem(task, csvs, pooled_bytes=_cache_bytes(machine) if _pooled(run.task, run.upstream) else 0)
    problem.run(**config)
    found = outcome(run.folder, task)
    if run.language_model is not None and task.name == "asr":
        from codecssl.superb.runner.lm_decoding import word_errors

        most = run.budget.tested(task.work)
        found["values"]["wer_lm"] = word_errors(problem, run.folder, run.language_model, machine.device, most)
    train = config["train"]
    return {
        **found,
        **({"interrupted": interrupted} if interrupted else {}),
        "chance": chance(selection.splits) if task.classes else None,
        "learning_rate": config["build_optimizer"]["conf"]["lr"],
        "steps": train["total_steps"],
        "official_steps": official_config(task)["train"]["total_steps"],
        "batch": config["build_batch_sampler"]["train"]["batch_size"] * train["gradient_accumulate"],
    }


def _searched(run: Run, machine: Machine, selection: Selection) -> ResultRow:
    """Evaluate query by example, which has no training."""
    import s3prl.hub

    from codecssl.superb.runner.qbe import evaluate, searches

    upstream = getattr(s3prl.hub, HUB_NAME)()
    options: dict[str, Any] = {"pairs": run.budget.pairs, "workers": machine.num_workers, "device": machine.device}
    found = evaluate(selection.splits, upstream, run.folder / "layers", **options)
    tested, layer = searches(selection.splits, run.budget.pairs)["test"], found["chosen"]["layer"]
    scores = np.load(run.folder / "layers" / f"test-{layer:02d}.npy")
    queries, documents = ([e.path for e in examples] for examples in (tested.queries, tested.documents))
    write_detections(run.folder, queries, documents, scores)
    return {**found, "chance": None, "learning_rate": None, "steps": 0, "official_steps": 0, "batch": 0}


def configure(run: Run, machine: Machine) -> dict[str, Any]:
    """Build s3prl's official configuration with this run's paths, upstream, seed, rate and scaled steps."""
    task, budget = TASKS[run.task], run.budget
    config = official_config(task)
    config["target_dir"], config["cache_dir"] = str(run.folder), str(run.folder / "cache")
    config["device"], config["num_workers"] = machine.device, machine.num_workers
    config["prepare_data"] = {}
    config["build_upstream"] = {"name": HUB_NAME}
    config["build_batch_sampler"]["train"]["seed"] = 12345678 + run.seed  # s3prl's own default at seed 0
    train = config["train"] = {**config["train"], "seed": run.seed}
    if run.learning_rate is not None:
        config["build_optimizer"]["conf"]["lr"] = run.learning_rate
    if (tested := budget.tested(task.work)) is not None:
        config["eval_batch"] = tested  # of one utterance each: s3prl decodes the padding of larger batches too
    if budget.divisor > 1:
        train["total_steps"] = budget.steps(train["total_steps"], task.work)
        train["save_step"] = max(1, train["total_steps"] // budget.checks(task.work))
        if "valid" in task.splits:
            train["eval_step"] = train["save_step"]
        train["log_step"] = max(1, train["total_steps"] // 20)
    return config


def _stand_in_hub(run: Run, machine: Machine) -> Any:
    """Register the run's upstream in s3prl's hub, with a new count of broken waves.

    The upstream is built only once, for any number of requests by s3prl.
    """
    import s3prl.hub

    from codecssl.superb.upstreams.finite_guard import Guarded

    seed = run.seed if run.upstream.kind == "random" else 0  # no other upstream has random weights
    upstream = Guarded(_build(run.upstream, seed, machine, Path(machine.cache or run.output / "cache"), run.task))
    setattr(s3prl.hub, HUB_NAME, lambda **options: upstream)
    return upstream


@functools.lru_cache(maxsize=1)
def _build(upstream: Upstream, seed: int, machine: Machine, codes: Path, task: str) -> Any:
    """Build the upstream with a feature cache. Each task gets a new one, which replaces that of the previous task."""
    from codecssl.superb.upstreams.feature_cache import CachedUpstream

    built = _shelf(machine.device, codes, seed).build(upstream)
    return CachedUpstream(built, 0 if _pooled(task, upstream) else _cache_bytes(machine))


def _cache_bytes(machine: Machine) -> int:
    return int(machine.feature_cache_gib * 2**30)


def _pooled(task: str, upstream: Upstream) -> bool:
    """True if the head needs the mean of the states only, and a wave's own frames do not depend on its batch.

    s3prl, like its fbank and the models of transformers, has fewer frames than s3prl counts: it fills them up with
    zeros or with the last frame, depending on the other waves of the batch.
    """
    return TASKS[task].classes and upstream.kind not in ("fbank", "s3prl", "hf")


@functools.cache
def _shelf(device: str, codes: Path, seed: int) -> UpstreamBuilder:
    return UpstreamBuilder(device=device, code_folder=codes, seed=seed)


def _prepare_process(machine: Machine) -> None:
    import_patches.install()
    decoded_audio.install()
    import torch

    if machine.threads:
        torch.set_num_threads(machine.threads)


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


def _codec_card(upstream: Any) -> dict[str, Any] | None:
    """Return the codec card of an upstream that reads codes, unwrapping its wrappers."""
    while upstream is not None and not hasattr(upstream, "card"):
        upstream = getattr(upstream, "frozen", None)
    return None if upstream is None else dict(upstream.card.to_dict())


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {package: version(package) for package in ("codecssl", "s3prl", "torch", "torchaudio", "dtw-python")}
    with contextlib.suppress(PackageNotFoundError):
        found["pyannote.metrics"] = version("pyannote.metrics")
    return found
