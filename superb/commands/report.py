"""The command codecssl-superb report, and the table that every run ends with."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codecssl.tokenize.common.errors import UserError


def add_command(commands: Any) -> None:
    """`report`, among the other commands."""
    report = commands.add_parser("report", help="table, report.md and report.html of finished runs")
    report.set_defaults(command=_report)
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="--output of run; files go to the first")
    report.add_argument(
        "--zip",
        type=Path,
        metavar="FILE",
        help="also pack the predictions of full runs on SUPERB's own corpora as its leaderboard takes them: the layout "
        "of s3prl's submit.py; nothing is sent, and no submission has been tried",
    )
    report.add_argument(
        "--of", metavar="UPSTREAM", help="of --zip: whose, as the table names it; default: the only one"
    )


def _report(arguments: argparse.Namespace) -> int:
    if arguments.of is not None and arguments.zip is None:
        raise UserError(f"--of {arguments.of}: is for --zip FILE, which is missing")
    show(arguments.folders)
    if arguments.zip is not None:
        from codecssl.superb.reporting.submission import write_zip

        lacking = write_zip(arguments.folders, arguments.zip, arguments.of)
        print(f"wrote {arguments.zip}; no finished run of: {', '.join(lacking) or 'none'}")
    return 0


def show(folders: Sequence[Path]) -> None:
    """The tables of all finished runs, on the console and as files in the first folder."""
    from rich.console import Console

    from codecssl.superb.reporting.tables import console_table, load
    from codecssl.superb.reporting.write import write

    comparisons, console = load(folders), Console(highlight=False)
    for comparison in comparisons:
        console.print(console_table(comparison))
    console.print("wrote " + " and ".join(str(path) for path in write(comparisons, folders[0])), soft_wrap=True)
