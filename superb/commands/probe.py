"""The subcommand `codecssl-superb probe`."""

import argparse
from pathlib import Path

from codecssl.superb.commands.common import add_upstreams
from codecssl.tokenize.common.command_line import CommandLine, console, integers, positive_floats


def add_commands(line: CommandLine) -> None:
    """Add `probe`."""
    probe = line.command(
        "probe",
        _probe,
        group="evaluation",
        help="linear probes of frozen features",
        example="probe --upstream model --upstream codes --data shards --output probes",
        resume="computes what is missing",
    )
    add_upstreams(probe)
    probe.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="MANIFEST|SHARDS",
        help="a manifest.jsonl of audio, or a folder of token shards",
    )
    probe.add_argument(
        "--probes", default="probes", metavar="NAME|YAML", help="columns to probe: a name in configs/superb, or a file"
    )
    probe.add_argument("--seeds", type=integers, default=(0, 1, 2), help="seeds of the folds, comma-separated")
    probe.add_argument("--folds", type=int, default=4, help="folds of the cross-validation")
    probe.add_argument(
        "--pool",
        choices=("meanstd", "mean"),
        default="meanstd",
        help="statistics over time: mean and deviation, or the mean alone",
    )
    probe.add_argument(
        "--C",
        type=positive_floats,
        default=(1e-3, 1e-2, 1e-1, 1.0, 10.0),
        metavar="C,C,...",
        help="inverse strengths of the L2 penalty; the training folds choose one; one value fixes it",
    )


def _probe(arguments: argparse.Namespace) -> None:
    from codecssl.superb.probe import probe, tables
    from codecssl.superb.probe.crossvalidate import Settings

    settings = Settings(
        folds=arguments.folds,
        seeds=arguments.seeds,
        C=arguments.C,
        pool=arguments.pool,
        device=arguments.device,
        jobs=arguments.jobs,
    )
    probes, out = probe.load_probes(arguments.probes), console()
    rows = probe.run(arguments.upstream, arguments.data, probes, arguments.output, settings, on_progress=out.print)
    for table in tables.console_tables(rows):
        out.print(table)
    out.print(f"wrote {tables.write_markdown(arguments.output)}", soft_wrap=True)
