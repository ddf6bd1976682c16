"""Parser, exit codes and progress bar shared by the three commands.

    line = CommandLine("codecssl-toy", "Count the files of a folder.")
    count = line.command("count", _count, group="folders", help="count the files", example="count recordings")
    count.add_argument("folder", type=Path, metavar="DIR")
    sys.exit(line.main())

A subcommand is a function of the parsed arguments that returns an exit code, or None for 0. Import heavy modules inside
that function: `--help` and a mistyped option must answer at once.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | error, on one line |
| 2 | wrong usage |
| 70 | traceback, or a machine fault that may be transient (`process.CRASHED`) |
| 75, 76 | stopped by a signal, stuck (`process.PREEMPTED`, `process.STUCK`) |
| 130 | interrupted by Ctrl-C |
| 141 | the reader of a resumable command's output is gone |
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from codecssl.tokenize.common.errors import TransientError, UserError
from codecssl.tokenize.common.process import CRASHED, INTERRUPTED, PREEMPTED, StoppedBySignal, stoppable
from codecssl.tokenize.common.terminal import one_printable_line, printable, safe_output, unwrapped
from codecssl.tokenize.common.trusted_weights import giving

BROKEN_PIPE = 141
"""Exit code of a resumable command whose output has no reader any more: 128 + SIGPIPE."""

FULL = (errno.ENOSPC, errno.EDQUOT)
AWAY = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)
"""Disk or network faults that do not depend on a path chosen by the user: they print a traceback and can be retried."""

Action = Callable[[argparse.Namespace], int | None]
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_printable_line(message)}; see {self.prog} --help\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults other than None and False; keeps the line breaks of descriptions and epilogs."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [[line] if line.startswith(" ") else textwrap.wrap(line, width) or [""] for line in text.splitlines()]
        return "\n".join(indent + part for parts in lines for part in parts)


class CommandLine:
    """A command with subcommands in groups. See the module's example.

    old_names: subcommands' former names -> today's; accepted, with a note on stderr.
    """

    def __init__(self, prog: str, description: str, old_names: dict[str, str] | None = None) -> None:
        self._prog, self._description, self._old_names = prog, description, old_names or {}
        self._parser = Parser(prog=prog, usage=f"{prog} COMMAND ...", formatter_class=HelpFormatter)
        self._commands = self._parser.add_subparsers(
            dest="command", required=True, metavar="COMMAND", help=argparse.SUPPRESS, prog=prog
        )
        self._groups: dict[str, list[tuple[str, str]]] = {}
        self._overridable: set[str] = set()
        self.examples: dict[str, str] = {}
        """Arguments of each subcommand's example."""

    def command(
        self,
        name: str,
        action: Action,
        *,
        group: str,
        help: str,
        example: str,
        description: str | None = None,
        resume: str | None = None,
        overrides: bool = False,
    ) -> Parser:
        """Add a subcommand and return its parser.

        group: heading under which the command's `--help` lists it. example: arguments of a typical call, with the
        subcommand's name. resume: effect of the same command after an interruption, if it does not start over.
        overrides: collect `--section.key VALUE` in `arguments.overrides` (list of str).
        """
        parser: Parser = self._commands.add_parser(
            name,
            description=description or f"{help[0].upper()}{help[1:]}.",
            epilog=f"example:\n  {self._prog} {example}",
            formatter_class=HelpFormatter,
            allow_abbrev=not overrides,
        )
        parser.set_defaults(action=action, resume=resume)
        self._groups.setdefault(group, []).append((name, help))
        self.examples[name] = example
        if overrides:
            self._overridable.add(name)
        return parser

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments of a subcommand. If they are invalid, print one line and exit with 2."""
        self._parser.description = self._description
        self._parser.epilog = self._overview()
        words = list(argv)
        if words and words[0] in self._old_names:
            print(f"note: {words[0]} is now called {self._old_names[words[0]]}", file=sys.stderr)
            words[0] = self._old_names[words[0]]
        if words and words[0] in self._overridable:
            arguments, overrides = self._parser.parse_known_args(_joined(words))
            arguments.overrides = overrides
            return arguments
        return self._parser.parse_args(words)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the subcommand named in `argv` (default: the process's). Return the exit code."""
        with safe_output():
            return self._main(argv)

    def _main(self, argv: Sequence[str] | None) -> int:
        arguments = argparse.Namespace()
        for stream in map(unwrapped, (sys.stdout, sys.stderr)):
            if isinstance(stream, io.TextIOWrapper):  # characters that the terminal's encoding lacks
                stream.reconfigure(errors="backslashreplace")
        try:
            arguments = self.parse(sys.argv[1:] if argv is None else argv)
            with stoppable(), giving(getattr(arguments, "codec_weights", None) or ()):
                code = arguments.action(arguments) or 0
            sys.stdout.flush()
            return code
        except UserError as error:
            print(f"error: {one_printable_line(str(error))}", file=sys.stderr)
            return CRASHED if isinstance(error, TransientError) else 1
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE if getattr(arguments, "resume", None) else 0
        except OSError as error:
            print(f"error: {one_printable_line(_disk_error(error, arguments))}", file=sys.stderr)
            return 1
        except (KeyboardInterrupt, StoppedBySignal) as stop:
            resume = getattr(arguments, "resume", None)
            what = f"stopped by {stop}" if isinstance(stop, StoppedBySignal) else "interrupted"
            print(f"error: {what}{f'; the same command {resume}' if resume else ''}", file=sys.stderr)
            return PREEMPTED if isinstance(stop, StoppedBySignal) else INTERRUPTED

    def _overview(self) -> str:
        width = max(len(name) for commands in self._groups.values() for name, _ in commands)
        lines = []
        for group, commands in self._groups.items():
            lines += [f"{group}:", *(f"  {name:<{width}}  {help}" for name, help in commands), ""]
        first = next(iter(self.examples.values()))
        lines += ["example:", f"  {self._prog} {first}", "", f"{self._prog} COMMAND --help lists a command's options."]
        return "\n".join([*lines, "Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted."])


def _joined(words: Sequence[str]) -> list[str]:
    """Join `--section.key VALUE` into one word, allowed at any position. Argparse would take VALUE for an argument."""
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        if last.startswith("--") and "." in last and "=" not in last and not word.startswith("--"):
            joined[-1] = f"{last}={word}"
        else:
            joined.append(word)
    return joined


def _disk_error(error: OSError, arguments: argparse.Namespace) -> str:
    """Format the error of a path that the user chose as one line. Raises any other error again."""
    given = getattr(arguments, "output", None) or getattr(arguments, "dataset", None)
    where = error.filename or given or "the output"
    if error.errno in FULL:
        return f"{where}: disk full; make room and run the same command again"
    if error.errno is None or error.errno in AWAY or (error.filename is None and error.errno != errno.ENOTDIR):
        raise error
    return f"{where}: {os.strerror(error.errno)}; make it usable, or give another path"


def number(kind: Callable[[str], Number], least: Number) -> Callable[[str], Number]:
    """Argument type: a number of at least `least`."""

    def read(text: str) -> Number:
        if not (value := kind(text)) >= least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    read.__name__ = getattr(kind, "__name__", "number")  # argparse names it in "invalid int value"
    return read


positive, whole, amount = number(int, 1), number(int, 0), number(float, 0.0)


def integers(text: str) -> tuple[int, ...]:
    """Argument type: integers, comma-separated."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be whole numbers, as in 0,1,2") from None


def positive_floats(text: str) -> tuple[float, ...]:
    """Argument type: positive numbers, comma-separated."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < value < float("inf") for value in found):
        raise argparse.ArgumentTypeError(f"{text}: must be positive numbers, as in 50,100,200")
    return found


def add_sharing(parser: argparse.ArgumentParser) -> None:
    """Add `--tasks N --task I`: split the work among N processes, of which this is number I."""
    group = parser.add_argument_group("sharing the work, for example in a job array")
    group.add_argument("--tasks", type=positive, default=1, metavar="N", help="split the work into N tasks")
    group.add_argument("--task", type=whole, default=0, metavar="I", help="do task I, 0 to N - 1")


def add_codec_weights(parser: Any) -> None:
    """Add `--codec-weights PATH`, which `main` passes to every codec that the command loads by a card."""
    parser.add_argument(
        "--codec-weights",
        type=_existing_weights,
        action="append",
        metavar="PATH",
        help="the codec's weights, where they have moved; repeat for several codecs",
    )


def _existing_weights(text: str) -> str:
    """Argument type: PATH, NAME@PATH, or a URL. Paths are made absolute, for processes in other folders."""
    name, at, path = text.rpartition("@")
    if "://" in text:
        return text
    if Path(path).exists():
        return f"{name}{at}{Path(path).resolve()}"
    raise argparse.ArgumentTypeError(f"{text}: no such file or folder")


class Renamed(argparse.Action):
    """A deprecated flag: `add_argument("--old", action=Renamed, const="--new", dest="new", nargs=0)`."""

    def __init__(self, option_strings: Sequence[str], dest: str, const: str, **options: Any) -> None:
        super().__init__(option_strings, dest, const=const, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        print(f"note: {option} is now called {self.const}", file=sys.stderr)
        setattr(namespace, self.dest, True)


def console(**options: Any) -> Any:
    """Make a rich console that leaves a closed pipe to `CommandLine.main` and prints strings as `printable`.

    `options` are passed to rich's Console.
    """
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise

        def render_str(self, text: str, **how: Any) -> Any:
            return super().render_str(printable(text), **how)

    stream = unwrapped(sys.stderr if options.pop("stderr", False) else sys.stdout)
    return Quiet(**{"highlight": False, "file": stream, **options})


OnProgress = Callable[[int, int | None, str], None]


@contextmanager
def progress_bar(unit: str, *, every: float = 0.5) -> Iterator[OnProgress]:
    """Show a progress bar on stderr if it is a terminal. Yields on_progress(done, total, note).

    It is drawn at most once in `every` seconds, by the caller's thread. It starts no thread of its own, so the caller
    may fork.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    terminal = console(stderr=True)
    columns = (
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(*columns, console=terminal, disable=not terminal.is_terminal, auto_refresh=False)
    with bar:
        task, drawn = bar.add_task(unit, total=None, note=""), 0.0
        state: tuple[int, int | None, str] = (0, None, "")

        def on_progress(done: int, total: int | None, note: str = "") -> None:
            nonlocal drawn, state
            state = done, total, note
            if time.monotonic() - drawn > every:
                drawn = time.monotonic()
                _set(bar, task, state)
                bar.refresh()

        try:
            yield on_progress
        finally:
            _set(bar, task, state)  # drawn by the bar's end


def _set(bar: Any, task: Any, state: tuple[int, int | None, str]) -> None:
    done, total, note = state
    bar.update(task, completed=done, total=total, note=note)
