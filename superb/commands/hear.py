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
        help="HEAR's predictor on frozen embeddings, on task folders of hearpreprocess",
        example="hear tasks/* --upstream model --upstream logmel --output hear",
        resume="computes what is missing",
    )
    add = hear.add_argument
    add("tasks", nargs="+", type=Path, metavar="TASK", help="folders of hearpreprocess or of hear-tasks, with 16000/")
    add("--upstream", action="append", required=True, metavar="MODEL|NAME", help=UPSTREAMS)
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
    add("--seed", type=int, default=0, help="seed of the notes and folds")


def _hear(arguments: argparse.Namespace) -> None:
    from codecssl.superb.hear.predictor import PredictorSettings
    from codecssl.superb.hear.run import run, write_table

    settings = PredictorSettings(points=arguments.grid_points, seed=arguments.seed)
    options = {"layer": arguments.layer, "device": arguments.device}
    run(arguments.upstream, arguments.tasks, arguments.output, settings, **options)
    print(f"wrote {write_table(arguments.output)}")


def _tasks(arguments: argparse.Namespace) -> None:
    from codecssl.superb.hear.local_tasks import write_tasks
    from codecssl.superb.probe.probe import load_probes

    found = write_tasks(arguments.output, arguments.manifest, load_probes(arguments.probes), seed=arguments.seed)
    print(f"{arguments.output}: {len(found)} tasks")
