"""s3prl's problems on the CSVs of a corpus."""

from pathlib import Path
from typing import Any

from codecssl.superb.patches import task_patches
from codecssl.superb.reporting.predictions import keep_answers
from codecssl.superb.tasks import Task
from codecssl.tokenize.common.errors import UserError

UNLISTED = ("asv", "sd")
"""Tasks whose heads need waves padded to a tensor."""


def make_problem(task: Task, csvs: dict[str, Path], *, pooled_bytes: int = 0) -> Any:
    """Build s3prl's problem on the given CSVs.

    Four more things differ. s3prl seeds the generators and then builds the upstream, which seeds them again with 0:
    `train.seed` never reaches the head's weights. Here, building the upstream restores the state of the generators. If
    s3prl drops every training utterance as too short, it searches for a batch forever; here that is an error.
    Test answers are stored (predictions.py). With `pooled_bytes` of memory, heads of mean pooling get the mean of each
    wave's states (`PooledUpstream`). Models compute faster (faster_modules.py), and heads get waves in lists
    (`ListedUpstream`).
    """
    import random

    import s3prl.problem
    import torch
    from s3prl.nn import MeanPoolingLinear
    from torch.utils.data import get_worker_info

    from codecssl.superb.patches.faster_modules import quicken
    from codecssl.superb.upstreams.feature_cache import ListedUpstream, PooledUpstream

    task_patches.install()
    base: Any = getattr(s3prl.problem, str(task.problem))
    tested = [csvs["test"]]
    prepared = (csvs["train"], csvs["valid"], tested) if "valid" in task.splits else (csvs["train"], tested)

    class OnManifest(base):  # type: ignore[misc]
        def prepare_data(self, *arguments: Any, **options: Any) -> tuple[Any, ...]:
            return prepared

        def build_upstream(self, build_upstream: dict[str, Any]) -> Any:
            state, torch_state = random.getstate(), torch.get_rng_state()
            upstream = super().build_upstream(build_upstream)
            random.setstate(state)
            torch.set_rng_state(torch_state)
            return upstream

        def build_model(self, *arguments: Any, **options: Any) -> Any:
            model: Any = quicken(super().build_model(*arguments, **options))
            if pooled_bytes and isinstance(model.downstream, MeanPoolingLinear) and not model.featurizer.normalize:
                model.upstream = PooledUpstream(model.upstream, pooled_bytes)
            elif task.name not in UNLISTED:
                model.upstream = ListedUpstream(model.upstream)
            return model

        def build_collate_fn(self, *arguments: Any, **options: Any) -> Any:
            genuine = super().build_collate_fn(*arguments, **options)

            def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
                if task.name in UNLISTED or get_worker_info():  # processes hand over one padded tensor more easily
                    found: dict[str, Any] = genuine(samples)
                    return found
                waves = [sample["x"] for sample in samples]
                return {"x": waves, **genuine([{k: v for k, v in sample.items() if k != "x"} for sample in samples])}

            return collate

        def build_task(self, *arguments: Any, **options: Any) -> Any:
            return keep_answers(super().build_task(*arguments, **options))

        def build_dataset(self, *arguments: Any, **options: Any) -> Any:
            dataset = super().build_dataset(*arguments, **options)
            if len(dataset) == 0:
                raise UserError(f"task {task.name}: no utterance is left (asv drops those up to 2 s); give longer ones")
            return dataset

    return OnManifest()
