"""Names from elsewhere cannot move the cursor, recolour or retitle a terminal, or end a command."""

import io
import sys
from argparse import Namespace

from codecssl.tokenize.common.command_line import CommandLine, console
from codecssl.tokenize.common.errors import UserError
from codecssl.tokenize.common.terminal import one_printable_line, printable

EVIL = "a\x1b[2J\x1b]0;title\x07\x9b31m\u202eb\udcff"
SAFE = r"a\x1b[2J\x1b]0;title\x07\x9b31m\u202eb\udcff"


def line(action) -> CommandLine:
    made = CommandLine("toy", "A toy.")
    made.command("do", action, group="all", help="do it", example="do")
    return made


def test_control_characters_and_bytes_that_are_not_utf8_are_escaped() -> None:
    assert printable(EVIL) == SAFE
    assert printable("Grüße 日本 🎧\tx\r\n") == "Grüße 日本 🎧\tx\r\n"
    assert one_printable_line("a\r\nb") == r"a\r\nb"


def test_all_printed_text_is_escaped_except_our_colours(capsys) -> None:
    def act(arguments: Namespace) -> None:
        from rich.table import Table

        print(EVIL)
        print(EVIL, file=sys.stderr)
        table = Table("id")
        table.add_row(EVIL)
        console(width=80).print(EVIL, table)
        raise UserError(f"{EVIL}\nnext")

    assert line(act).main(["do"]) == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert out.count(SAFE) == 3
    assert err == f"{SAFE}\nerror: {SAFE}\\nnext\n"


def test_the_streams_are_put_back(capsys) -> None:
    before = sys.stdout, sys.stderr
    assert line(lambda arguments: None).main(["do"]) == 0
    assert (sys.stdout, sys.stderr) == before


def test_a_console_on_a_terminal_keeps_its_colours() -> None:
    stream = io.StringIO()
    console(file=stream, force_terminal=True).print("[red]x[/red]")
    assert "\x1b[31m" in stream.getvalue()
