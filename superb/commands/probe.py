"""The subcommands `probe`, `abx` and `pnmi` of codecssl-superb."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from codecssl.superb.commands.common import add_upstreams
from codecssl.tokenize.common.command_line import CommandLine, console, integers, positive, positive_floats

if TYPE_CHECKING:
    from codecssl.superb.probe.layers import Abx, Pnmi


def add_commands(line: CommandLine) -> None:
    """Add `probe`, `abx` and `pnmi`."""
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
    abx = line.command(
        "abx",
        _abx,
        group="evaluation",
        help="ABX error of every layer, to choose one without training",
        example="abx --upstream model --upstream logmel --data manifest.jsonl --output probes",
        resume="computes what is missing",
    )
    _add_clips(abx, "probe: its label column has the classes, its group column the speakers")
    pnmi = line.command(
        "pnmi",
        _pnmi,
        group="evaluation",
        help="mutual information of every layer's k-means units with phones or classes",
        example="pnmi --upstream model --upstream logmel --data manifest.jsonl --output probes",
        description="Labels: phones with times ([phone, start, end in seconds]) if a row has them, else its class.",
        resume="computes what is missing",
    )
    _add_clips(pnmi, "probe: its clips, and their classes where they have no phones with times")
    pnmi.add_argument("--clusters", type=positive, default=100, metavar="N", help="units of the k-means of a layer")


def _add_clips(parser: argparse.ArgumentParser, probe_help: str) -> None:
    add_upstreams(parser)
    parser.add_argument("--data", required=True, type=Path, metavar="MANIFEST|SHARDS", help="as in probe")
    parser.add_argument("--probes", default="probes", metavar="NAME|YAML", help="as in probe")
    parser.add_argument("--probe", default="digits", help=probe_help)
    parser.add_argument("--clips", type=int, default=200, metavar="N", help="maximum number of clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")


def _abx(arguments: argparse.Namespace) -> None:
    from codecssl.superb.probe.layers import Abx

    _measure_layers(arguments, Abx())


def _pnmi(arguments: argparse.Namespace) -> None:
    from codecssl.superb.probe.layers import Pnmi

    _measure_layers(arguments, Pnmi(clusters=arguments.clusters, seed=arguments.seed))


def _measure_layers(arguments: argparse.Namespace, measure: "Abx | Pnmi") -> None:
    from codecssl.superb.probe import layers, probe
    from codecssl.tokenize.common.errors import UserError

    probes = {one.name: one for one in probe.load_probes(arguments.probes)}
    if arguments.probe not in probes:
        raise UserError(f"--probe {arguments.probe}: not in {arguments.probes}, which has {', '.join(probes)}")
    options = {"measure": measure, "clips": arguments.clips, "seed": arguments.seed, "device": arguments.device}
    layers.run(arguments.upstream, arguments.data, probes[arguments.probe], arguments.output, **options)
    print(f"wrote {arguments.output / 'layers.html'}")


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
