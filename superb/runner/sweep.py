"""The list of runs that a comparison needs: tasks x upstreams x learning rates x seeds (x folds), in a fixed order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from codecssl.superb.corpora.corpus import FOLDS, open_corpus
from codecssl.superb.runner.run import Run
from codecssl.superb.tasks import Budget, Task, lrs_of
from codecssl.superb.upstreams.names import Upstream
from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A comparison. Its list of runs is deterministic, and several processes can each take a part."""

    upstreams: Sequence[Upstream]
    tasks: Sequence[Task]
    budget: Budget
    data: str
    root: Path
    output: Path
    lrs: tuple[float, ...] | None = None
    """Learning rates; None for those of the budget."""
    seeds: tuple[int, ...] = (0,)
    folds: bool = False
    """Test each of five folds of emotion recognition in turn. With all official steps this is always done."""
    side: Path | None = None
    language_model: Path | None = None

    def __post_init__(self) -> None:
        if self.language_model is not None and not self.language_model.is_file():
            raise UserError(f"--lm {self.language_model}: no such file; give a 4-gram model in ARPA format")

    def runs(self) -> list[Run]:
        """List the runs. Raises UserError before any run if the corpus lacks data for a task."""
        corpus = open_corpus(self.root, self.side)
        for task in self.tasks:
            corpus.select(task)
        runs = [
            self._run(upstream, task, lr, seed, fold)
            for task in self.tasks  # outermost: a stopped sweep compares all upstreams on some tasks
            for upstream in self.upstreams
            for fold in self._folds(task)
            for seed in self._seeds(upstream, task)
            for lr in (lrs_of(task, self.budget) if self.lrs is None or task.problem is None else self.lrs)
        ]
        return list(dict.fromkeys(runs))  # duplicates run once

    def _run(self, upstream: Upstream, task: Task, lr: float | None, seed: int, fold: int | None) -> Run:
        return Run(
            upstream=upstream,
            task=task.name,
            learning_rate=lr,
            budget=self.budget,
            seed=seed,
            data=self.data,
            root=self.root,
            output=self.output,
            side=self.side,
            fold=fold,
            language_model=self.language_model if task.name == "asr" else None,
        )

    def _folds(self, task: Task) -> tuple[int | None, ...]:
        if task.name != "er" or not (self.folds or self.budget.divisor == 1):
            return (None,)
        corpus = open_corpus(self.root, self.side)
        if not corpus.has_folds(task.name):
            if self.folds:
                raise UserError(f"data {self.root}: er rows have no column fold; add it or leave out --folds")
            return (None,)
        return FOLDS

    def _seeds(self, upstream: Upstream, task: Task) -> tuple[int, ...]:
        """Return the seeds to run. Without training, the seed only matters for a random encoder."""
        return self.seeds if task.problem is not None or upstream.kind == "random" else self.seeds[:1]


def part(runs: Sequence[Run], parts: int, index: int) -> list[Run]:
    """Return runs[index::parts]. The parts are disjoint and together contain all runs."""
    if not 0 <= index < parts:
        raise UserError(f"--part {index}: must be 0 to {parts - 1}, for {parts} parts")
    return list(runs[index::parts])
