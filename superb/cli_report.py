"""The command codecssl-superb report, and the table that every run ends with."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_command(commands: Any) -> None:
    """`report`, among the other commands."""
    report = commands.add_parser("report", help="table, report.md and report.html of finished runs")
    report.set_defaults(command=_report)
    report.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="--output of run; files go to the first")


def _report(arguments: argparse.Namespace) -> int:
    show(arguments.folders)
    return 0


def show(folders: Sequence[Path]) -> None:
    """The tables of all finished runs, on the console and as files in the first folder."""
    from rich.console import Console

    from codecssl.superb.report import console_table, load, write

    comparisons, console = load(folders), Console(highlight=False)
    for comparison in comparisons:
        console.print(console_table(comparison))
    console.print("wrote " + " and ".join(str(path) for path in write(comparisons, folders[0])), soft_wrap=True)
