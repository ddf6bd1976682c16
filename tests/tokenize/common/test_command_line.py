"""Conventions of the three commands: exit codes, one-line errors, help, examples, Ctrl-C and closed pipes."""

import errno
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable

import pytest
from rich.console import Console

from codecssl.pretrain.cli import command_line as pretrain
from codecssl.superb.cli import command_line as superb
from codecssl.tokenize.cli import command_line as tokenize
from codecssl.tokenize.common import command_line
from codecssl.tokenize.common.command_line import CommandLine
from codecssl.tokenize.common.errors import TransientError, UserError

COMMANDS: dict[str, Callable[[], CommandLine]] = {"tokenize": tokenize, "pretrain": pretrain, "superb": superb}
EXAMPLES = [(stage, name) for stage, make in COMMANDS.items() for name in make().examples]


def toy(action: Callable[[Namespace], int | None], resume: str | None = None) -> CommandLine:
    line = CommandLine("toy", "A toy.", {"dance": "do"})
    sub = line.command("do", action, group="all", help="do it", example="do --output x", resume=resume)
    sub.add_argument("--output")
    return line


@pytest.mark.parametrize(("stage", "name"), EXAMPLES)
def test_the_example_of_a_subcommand_parses_and_is_in_its_help(stage: str, name: str, capsys) -> None:
    line = COMMANDS[stage]()
    words = shlex.split(line.examples[name])
    assert words[0] == name
    arguments = line.parse(words)
    assert callable(arguments.action)
    with pytest.raises(SystemExit) as stop:
        line.parse([name, "--help"])
    assert stop.value.code == 0
    assert f"codecssl-{stage} {line.examples[name]}" in capsys.readouterr().out


@pytest.mark.parametrize("stage", COMMANDS)
def test_help_lists_each_subcommand_once(stage: str, capsys) -> None:
    with pytest.raises(SystemExit):
        COMMANDS[stage]().parse(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS[stage]().examples:
        assert sum(line.split()[:1] == [name] for line in lines if line.startswith("  ")) == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("bad"), 1, "error: bad\n"),
        (TransientError("away"), 70, "error: away\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; the same command resumes\n"),
        (OSError(errno.ENOSPC, "full"), 1, "error: out: disk full; make room and run the same command again\n"),
        (OSError(errno.EACCES, "", "a"), 1, "error: a: Permission denied; make it usable, or give another path\n"),
    ],
)
def test_errors_are_one_line(error: BaseException, code: int, line: str, capsys) -> None:
    def fails(arguments: Namespace) -> None:
        raise error

    assert toy(fails, "resumes").main(["do", "--output", "out"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [OSError(errno.EIO, "", "a"), OSError(errno.EPERM, ""), RuntimeError("bug")])
def test_faults_of_the_machine_keep_their_traceback(error: Exception) -> None:
    """`process.guarded` exits with 70 then, so that batch scripts try again."""

    def fails(arguments: Namespace) -> None:
        raise error

    with pytest.raises(type(error)):
        toy(fails).main(["do"])


def test_former_names_are_accepted_with_a_note(capsys) -> None:
    assert toy(lambda arguments: 0).main(["dance"]) == 0
    assert capsys.readouterr().err == "note: dance is now called do\n"
    arguments = tokenize().parse(["run", "a", "--output", "b", "--compress"])
    assert arguments.entropy_code
    assert "compress" not in vars(arguments)
    assert capsys.readouterr().err == "note: --compress is now called --entropy-code\n"
    assert not tokenize().parse(["run", "a", "--output", "b"]).entropy_code
    old = ["compress", *superb().examples["task-codec"].split()[1:]]
    assert vars(superb().parse(old)) == vars(superb().parse(superb().examples["task-codec"].split()))


@pytest.mark.parametrize(("resume", "code"), [(None, 0), ("resumes", 141)])
@pytest.mark.parametrize("printer", ["print", "console().print"])
def test_a_closed_pipe_ends_silently(printer: str, resume: str | None, code: int) -> None:
    """`status | head`: the reader leaves after one line. The output is larger than a pipe."""
    program = (
        "import sys\nfrom codecssl.tokenize.common.command_line import CommandLine, console\n"
        "line = CommandLine('toy', 'A toy.')\n"
        f"def act(arguments):\n    for i in range(20000): {printer}('line', i)\n"
        f"line.command('do', act, group='all', help='do it', example='do', resume={resume!r})\n"
        "sys.exit(line.main(['do']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == code


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_short_output_into_a_closed_pipe_is_silent(stage: str) -> None:
    """The text fits the buffer: it meets the closed pipe only when Python flushes it at the end."""
    read, write = os.pipe()
    os.close(read)
    command = {
        "tokenize": ["codecs"],
        "pretrain": ["run", "codec2vec_tiny_codes", "--print_config"],
        "superb": ["tasks"],
    }
    words = [sys.executable, "-m", f"codecssl.{stage}", *command[stage]]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""


def test_ctrl_c_prints_one_line_and_exits_130() -> None:
    program = (
        "import sys, time\nfrom codecssl.tokenize.common.command_line import CommandLine\n"
        "line = CommandLine('toy', 'A toy.')\n"
        "def act(arguments):\n    print('ready', flush=True); time.sleep(60)\n"
        "line.command('do', act, group='all', help='do it', example='do')\n"
        "sys.exit(line.main(['do']))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.stderr.read() == b"error: interrupted\n"
    assert time.monotonic() - began < 30


def test_a_progress_bar_ends_with_the_last_state_that_was_reported(monkeypatch) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(command_line, "console", lambda **_: Console(file=drawn, force_terminal=True, width=80))
    with command_line.progress_bar("files", every=1e9) as on_progress:
        for done in range(1, 4):
            on_progress(done, 3, f"note {done}")
    assert "3/3" in drawn.getvalue()
    assert "note 3" in drawn.getvalue()
    assert "note 2" not in drawn.getvalue()
