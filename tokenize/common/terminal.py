"""Text that is safe to print: names of files and ids from elsewhere may hold terminal escapes or invalid UTF-8."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters apart from tab, line feed and carriage return; marks that reorder text; halves of surrogates."""


def printable(text: str) -> str:
    """Replace each character of UNSAFE by its Python escape."""
    return UNSAFE.sub(lambda match: match[0].encode("unicode_escape", "backslashreplace").decode(), text)


def one_printable_line(text: str) -> str:
    """Like `printable`, with line breaks escaped too."""
    return printable(text).replace("\n", "\\n").replace("\r", "\\r")


class SafeText:
    """A text stream that writes `printable` text to another one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def unwrapped(stream: Any) -> Any:
    """Return the stream below a SafeText, for programs that draw with terminal escapes of their own."""
    return stream.stream if isinstance(stream, SafeText) else stream


@contextmanager
def safe_output() -> Iterator[None]:
    """Within this context, sys.stdout and sys.stderr are SafeText."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = SafeText(before[0]), SafeText(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
