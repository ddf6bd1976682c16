"""A scene task folder of HEAR as a task of X-ARES: WebDataset tars and the module that X-ARES's runner takes.

    ROOT/NAME.py                              `task_config(encoder)`
    ROOT/NAME/wds-audio-fold-FOLD-000000.tar  clips (wav) and their labels (json) of each fold
    ROOT/NAME/.audio_tar_ready                X-ARES's sign that the tars are whole

    python -m xares.run codecssl/superb/suites/x_ares.py ROOT/*.py --max-jobs 0     # ROOT below the working folder

X-ARES trains a linear layer on the mean over frames (its "MLP") and a kNN. With folds it would keep the epoch that is
best on the test fold; here only the last epoch is validated, and so kept.
"""

import contextlib
import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codecssl.superb.hear.task_folder import TaskFolder
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.files import atomic_file, write_atomic

if TYPE_CHECKING:
    from xares.task import TaskConfig

READY = ".audio_tar_ready"
EPOCHS = 10
BATCH_SIZE = 8
"""With X-ARES's default of 32, 10 epochs would be 40 steps on 150 clips."""
NEIGHBOURS = 10
"""Number of neighbours of X-ARES's kNN."""
MODULE = '''"""A task of X-ARES, written by codecssl-superb hear-tasks."""

from pathlib import Path

from codecssl.superb.hear import as_x_ares


def task_config(encoder):
    return as_x_ares.config(Path(__file__), encoder)
'''


def write_x_ares_task(folder: Path, root: Path) -> Path:
    """Write a task folder of HEAR as tars below `root`; return the task's module.

    A task that is there is kept. If the folder has changed since, X-ARES's embeddings and predictors are removed.
    Raises UserError for tasks that have not one label a clip, or too few clips for the kNN.
    """
    task = TaskFolder(folder)
    if task.events or task.multilabel:
        raise UserError(f"{folder}: a task with one label a clip is needed")
    labels = {split: task.labels(split) for split in task.splits}
    total = sum(map(len, labels.values()))
    for split, clips in labels.items():
        if total - len(clips) < NEIGHBOURS:
            raise UserError(f"{folder}: {total - len(clips)} clips outside {split}; X-ARES's kNN needs {NEIGHBOURS}")
    name = re.sub(r"\W", "_", task.name)  # of a Python module
    described, ready = root / name / "task.json", root / name / READY
    description = {"name": task.name, "folds": task.splits, "vocabulary": task.vocabulary, "sha256": task.fingerprint}
    if ready.exists() and json.loads(described.read_text(encoding="utf-8")) == description:
        return root / f"{name}.py"
    if (root / name).is_dir():
        shutil.rmtree(root / name)
    (root / name).mkdir(parents=True)
    for split, clips in labels.items():
        with (
            atomic_file(root / name / f"wds-audio-fold-{split}-000000.tar") as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            for number, (clip, [label]) in enumerate(sorted(clips.items())):
                key = f"{split}-{number:05d}"
                _add(tar, f"{key}.wav", task.clip(split, clip).read_bytes())
                _add(tar, f"{key}.json", json.dumps({"label": str(label), "file": clip}).encode())
    write_atomic(described, (json.dumps(description, indent=1) + "\n").encode())
    write_atomic(root / f"{name}.py", MODULE.encode())
    ready.touch()
    return root / f"{name}.py"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def config(module: Path, encoder: Any) -> "TaskConfig":
    """Build X-ARES's configuration of a task from the path of its module. encoder: None while it only downloads."""
    from xares.task import TaskConfig

    described = json.loads((module.with_suffix("") / "task.json").read_text(encoding="utf-8"))
    index = {label: number for number, label in enumerate(described["vocabulary"])}
    return TaskConfig(
        name=module.stem,
        formal_name=described["name"],
        env_root=module.resolve().parent,
        private=True,  # nothing is downloaded
        torch_num_threads=1,
        encoder=encoder,
        k_fold_splits=described["folds"],
        label_processor=lambda row: index[row["label"]],
        num_encoder_workers=0,
        batch_size_train=BATCH_SIZE,
        epochs=EPOCHS,
        valid_every=EPOCHS,
        output_dim=len(index),
        eval_weight=1,
    )


def evaluate_x_ares(module: Path, encoder: Any) -> dict[str, float]:
    """Run X-ARES's own evaluation; its messages go to `log.txt` in the task's folder. Return accuracies, 0 to 1."""
    from xares.task import XaresTask

    with (
        (module.with_suffix("") / "log.txt").open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        task = XaresTask(config(module, encoder))
        task.make_encoded_tar()
        (mlp, _), (knn, _) = task.run_mlp(), task.run_knn()
    return {"mlp": float(mlp), "knn": float(knn)}
