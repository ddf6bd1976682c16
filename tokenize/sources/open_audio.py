"""Open encoded audio as a seekable binary file: a file, a part of one, or bytes in memory."""

from __future__ import annotations

import io
import os
import stat
from contextlib import ExitStack
from typing import Any, BinaryIO

from codecssl.tokenize.common.errors import UserError

HELD_BYTES = 1 << 25
"""Maximum size of files held in memory, so that hashing and decoding read the disk once."""


class Held(io.BytesIO):
    """A file in memory."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def open_file(
    file: str, name: str, offset: int | None = None, size: int | None = None, *, held: bool = True
) -> BinaryIO:
    """Open `file`, or `size` bytes of it from `offset`, as a binary file. Raises UserError.

    With `held`, files up to HELD_BYTES are read into memory. Only regular files are opened, since a FIFO would block.
    """
    try:
        with ExitStack() as stack:
            opened = stack.enter_context(open(file, "rb", opener=_not_blocking))
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UserError("cannot read: not a regular file")
            if offset is None or size is None:
                offset, size = 0, status.st_size
            if size > HELD_BYTES or not held:
                window = io.BufferedReader(FileSlice(opened, name, offset, size), 1 << 20)
                stack.pop_all()
                return window
            opened.seek(offset)
            data = opened.read(size)
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}") from error
    except ValueError as error:  # an invalid file name
        raise UserError(f"cannot read: {error}") from error
    if len(data) < size:
        raise UserError(f"cannot read: {file} ends {size - len(data)} bytes before {name} does")
    return Held(data, name)


def _not_blocking(file: str, flags: int) -> int:
    return os.open(file, flags | getattr(os, "O_NONBLOCK", 0))


class FileSlice(io.RawIOBase):
    """View of `size` bytes of an open file from `offset`. Closing it closes the file."""

    def __init__(self, file: BinaryIO, name: str, offset: int, size: int) -> None:
        self.file, self.name, self.offset, self.size, self.position = file, name, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self.size - self.position))
        self.file.seek(self.offset + self.position)
        data = self.file.read(wanted)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()
