"""The subcommands of codecssl-superb about HEAR: hear, hear-tasks."""

import argparse
from pathlib import Path

from codecssl.superb.commands.common import DEVICE, UPSTREAMS
from codecssl.tokenize.common.command_line import CommandLine, positive


def add_commands(line: CommandLine) -> None:
    """Add `hear` and `hear-tasks`."""
    hear = line.command(
        "hear",
        _hear,
        group="evaluation",
        help="frozen embeddings on task folders of hearpreprocess, by HEAR's predictor, X-ARES or MAEB",
        example="hear tasks/* --upstream model --upstream logmel --output hear",
        resume="computes what is missing",
    )
    add = hear.add_argument
    add("tasks", nargs="+", type=Path, metavar="TASK", help="folders of hearpreprocess or of hear-tasks, with 16000/")
    add("--upstream", action="append", required=True, metavar="MODEL|NAME", help=UPSTREAMS)
    add(
        "--suites",
        default="hear",
        metavar="NAME,...",
        help="hear; x-ares: linear layer and kNN (extra xares); maeb: 8 clips of each class (extra mteb); tasks with "
        "one label a clip only, in x-ares and maeb; x-ares chooses its own device",
    )
    add("--output", required=True, type=Path, metavar="DIR", help="results; may hold earlier ones")
    add("--layer", type=int, metavar="L", help="hidden state 0 to L (negative: from the last); default: mean of all")
    add("--grid-points", type=positive, default=8, metavar="N", help="number of points of the predictor's grid to try")
    add("--seed", type=int, default=0, help="seed of the grid points, weights and batches")
    add("--device", default="cpu", help=DEVICE)
    tasks = line.command(
        "hear-tasks",
        _tasks,
        group="corpora",
        help="write task folders in HEAR's format: pitch, instruments, note events, labels of a manifest",
        example="hear-tasks manifest.jsonl --output tasks",
    )
    add = tasks.add_argument
    add("manifest", nargs="?", type=Path, help="a .jsonl with path, task and label columns; without it, notes only")
    add("--output", required=True, type=Path, metavar="DIR", help="the folder of tasks")
    add("--probes", default="probes", metavar="NAME|YAML", help="labels to make tasks of, as in probe")
    add("--copies", type=positive, default=2, metavar="N", help="notes of each timbre and pitch")
    add("--seed", type=int, default=0, help="seed of the notes and folds")
    add("--x-ares", type=Path, metavar="DIR", help="write the tasks with one label a clip for python -m xares.run too")


def _hear(arguments: argparse.Namespace) -> None:
    from codecssl.superb.hear.predictor import PredictorSettings
    from codecssl.superb.hear.run import run
    from codecssl.superb.hear.table import write_table

    settings = PredictorSettings(points=arguments.grid_points, seed=arguments.seed)
    options = {"suites": arguments.suites.split(","), "layer": arguments.layer, "device": arguments.device}
    run(arguments.upstream, arguments.tasks, arguments.output, settings, **options)
    print(f"wrote {write_table(arguments.output)}")


def _tasks(arguments: argparse.Namespace) -> None:
    from codecssl.superb.hear.local_tasks import write_tasks
    from codecssl.superb.probe.probe import load_probes

    options = {"seed": arguments.seed, "copies": arguments.copies}
    found = write_tasks(arguments.output, arguments.manifest, load_probes(arguments.probes), **options)
    print(f"{arguments.output}: {len(found)} tasks")
    if arguments.x_ares is not None:
        from codecssl.superb.hear.as_x_ares import write_x_ares_task
        from codecssl.superb.hear.task_folder import TaskFolder

        scenes = [path for path in found if not TaskFolder(path).events]
        modules = [write_x_ares_task(path, arguments.x_ares) for path in scenes]
        print(f"{arguments.x_ares}: {len(modules)} tasks of X-ARES")
