"""The command line `codecssl-superb`. The subcommands are in `commands`."""

import sys
from collections.abc import Sequence

from codecssl.superb.commands import cache, corpora, embed, hear, probe, report, run, task_codec
from codecssl.tokenize.common.command_line import CommandLine
from codecssl.tokenize.common.process import guarded

OLD_NAMES = {"compress": "task-codec", "compress-report": "task-codec-report"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code (see `tokenize.common.command_line`)."""
    return command_line().main(argv)


def command_line() -> CommandLine:
    """Build the command line of all subcommands, without slow imports."""
    line = CommandLine("codecssl-superb", "Evaluate speech encoders on the ten SUPERB tasks.", OLD_NAMES)
    for commands in (run, report, probe, hear, embed, cache, corpora, task_codec):
        commands.add_commands(line)
    return line


if __name__ == "__main__":
    sys.exit(guarded(main))
