"""Upstreams on HEAR task folders by the procedures of HEAR, X-ARES and MAEB: one result file for each, and a table.

OUTPUT/SUITE/TASK/HASH/result.json
OUTPUT/x-ares/tasks        the task folders as X-ARES reads them, with its embeddings and predictors
OUTPUT/hear.md             the table
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from codecssl.superb import results
from codecssl.superb.hear.evaluate import evaluate
from codecssl.superb.hear.predictor import PredictorSettings
from codecssl.superb.hear.table import cell, write_table
from codecssl.superb.hear.task_folder import TaskFolder
from codecssl.superb.suites.hear_2021 import HearModel
from codecssl.superb.upstreams.names import Upstream, parse_all
from codecssl.tokenize.common.errors import UserError

SUITES = ("hear", "x-ares", "maeb")
EXTRAS = {"x-ares": "xares", "maeb": "mteb"}


def run(
    names: Sequence[str],
    folders: Sequence[Path],
    output: Path,
    settings: PredictorSettings,
    *,
    suites: Sequence[str] = ("hear",),
    layer: int | None = None,
    device: str = "cpu",
    on_progress: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Evaluate every upstream on every task by every suite. Results that are in `output` are not computed again.

    X-ARES and MAEB have no procedure for events: they skip event tasks. settings: of HEAR's predictor; the other
    suites use their own. layer: hidden state, or None for the mean of all. Raises UserError for folders that are not
    tasks and for suites that are not installed, before anything is computed.
    """
    for suite in suites:
        _check_installed(suite)
    tasks, rows = [TaskFolder(path) for path in folders], []
    for upstream in parse_all(names):
        for suite in suites:
            evaluator = _Evaluator(suite, upstream, output, settings, layer, device)
            for task in tasks:
                if suite != "hear" and (task.events or task.multilabel):
                    continue
                rows.append(evaluator(task))
                on_progress(f"{upstream.name}  {suite}  {task.name}  {cell(rows[-1], rows[-1]['metrics'][0])}")
    return rows


def _check_installed(suite: str) -> None:
    from importlib.util import find_spec

    if suite not in SUITES:
        raise UserError(f"--suites {suite}: give {', '.join(SUITES)}")
    if suite in EXTRAS and find_spec(EXTRAS[suite]) is None:
        raise UserError(f"--suites {suite}: not installed; pip install codecssl[{EXTRAS[suite]}]")


class _Evaluator:
    """Evaluates one upstream by one suite. The upstream is built at its first use."""

    def __init__(
        self, suite: str, upstream: Upstream, output: Path, settings: PredictorSettings, layer: int | None, device: str
    ) -> None:
        self.suite, self.upstream, self.output, self.settings = suite, upstream, output, settings
        self.layer, self.device = layer, device
        self.model: Any = None

    def __call__(self, task: TaskFolder) -> dict[str, Any]:
        """Return the finished result of a task, or compute and keep it."""
        identity = {
            "upstream": self.upstream.identity(),
            "layer": self.layer,
            "task": task.name,
            "fingerprint": task.fingerprint,
            **({"settings": asdict(self.settings)} if self.suite == "hear" else {"suite": self.suite}),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        path = self.output / self.suite / task.name / digest / "result.json"
        if not path.is_file():
            found = {"hear": self._hear, "x-ares": self._x_ares, "maeb": self._maeb}[self.suite](task)
            clips = sum(len(task.labels(split)) for split in ({fold.test for fold in task.folds}))
            results.write_json(path, {**identity, "clips": clips, **found})
            write_table(self.output)
        return results.read_json(path)

    def _hear(self, task: TaskFolder) -> dict[str, Any]:
        self.model = self.model or HearModel(self.upstream, self.layer).to(self.device)
        return {"metrics": task.metrics, **evaluate(task, self.model, self.settings)}

    def _x_ares(self, task: TaskFolder) -> dict[str, Any]:
        from codecssl.superb.hear.as_x_ares import evaluate_x_ares, write_x_ares_task
        from codecssl.superb.suites.x_ares import CodecSSLEncoder

        self.model = self.model or CodecSSLEncoder(self.upstream, self.layer)
        module = write_x_ares_task(task.path, self.output / "x-ares" / "tasks")
        scores = evaluate_x_ares(module, self.model)
        return {"metrics": list(scores), "scores": scores, "deviations": {}, "folds": [{} for _ in task.folds]}

    def _maeb(self, task: TaskFolder) -> dict[str, Any]:
        from codecssl.superb.hear.as_maeb import RememberingAudio, evaluate_maeb

        self.model = self.model or RememberingAudio(
            "codecssl", device=self.device, upstream=self.upstream, layer=self.layer
        )
        folds = evaluate_maeb(task.path, self.model)
        return {
            "metrics": ["accuracy"],
            "scores": {"accuracy": float(np.mean(folds))},
            "deviations": {"accuracy": float(np.std(folds))},
            "folds": [{"accuracy": value} for value in folds],
        }
