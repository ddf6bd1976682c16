"""The subcommand `codecssl-superb report`, and the table that every run ends with."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from codecssl.tokenize.common.command_line import CommandLine, console
from codecssl.tokenize.common.errors import UserError


def add_commands(line: CommandLine) -> None:
    """Add `report`."""
    report = line.command(
        "report",
        _report,
        group="evaluation",
        help="table, report.md and report.html of finished runs",
        example="report superb --zip predict.zip",
    )
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="--output of run; files go to the first")
    report.add_argument(
        "--zip",
        type=Path,
        metavar="FILE",
        help="also pack the predictions of full runs on SUPERB's own corpora for its leaderboard, in the layout of "
        "s3prl's submit.py; nothing is sent, and no submission has been tried",
    )
    report.add_argument(
        "--of", metavar="UPSTREAM", help="with --zip: the upstream, as the table names it (default: the only one)"
    )


def _report(arguments: argparse.Namespace) -> None:
    if arguments.of is not None and arguments.zip is None:
        raise UserError(f"--of {arguments.of}: needs --zip FILE")
    show(arguments.folders)
    if arguments.zip is not None:
        from codecssl.superb.reporting.submission import write_zip

        lacking = write_zip(arguments.folders, arguments.zip, arguments.of)
        print(f"wrote {arguments.zip}; no finished run of: {', '.join(lacking) or 'none'}")


def show(folders: Sequence[Path]) -> None:
    """Print the tables of all finished runs and write them into the first folder."""
    from codecssl.superb.reporting.tables import console_table, load
    from codecssl.superb.reporting.verdicts import sentence
    from codecssl.superb.reporting.write import write

    comparisons, out = load(folders), console()
    written = write(comparisons, folders[0])  # before any output, whose reader may be gone
    for comparison in comparisons:
        out.print(console_table(comparison))
        out.print(sentence(comparison), soft_wrap=True)
    out.print("wrote " + " and ".join(map(str, written)), soft_wrap=True)
