"""Find a corpus and its small side files on disk. Errors name the missing file and its source."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError, one_line

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folders to search. `root` holds the corpora, or is one; `side` holds lists that do not come with them."""

    root: Path
    side: Path | None = None

    def corpus(self, title: str, names: tuple[str, ...], marks: tuple[str, ...]) -> Path:
        """Return the folder, root/NAME or root itself, that has all `marks` (names or glob patterns)."""
        if not self.root.is_dir():
            raise UserError(f"data {self.root}: no such folder; give the one that holds {title}")
        folders = [self.root / name for name in names] + [self.root]
        for folder in folders:
            if all(any(folder.glob(mark)) for mark in marks):
                return folder.absolute()
        raise UserError(
            f"data {self.root}: no {title} there; {' and '.join(marks)} must lie in it or in its folder "
            f"{' or '.join(names)}"
        )

    def file(self, names: tuple[str, ...], source: str, *near: Path) -> Path:
        """Return the first of `names` found in side, `near` or root; raise UserError if none is."""
        folders = [folder for folder in (self.side, *near, self.root) if folder is not None]
        for name in names:
            for folder in folders:
                if (folder / name).is_file():
                    return (folder / name).absolute()
        looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
        raise UserError(f"{' or '.join(names)}: not in {looked}; get it from {source} and give --side its folder")


def make_row(task: str, split: str, path: Path, **columns: Any) -> ManifestRow:
    """Make a row of manifest.jsonl with an absolute `path`."""
    return {"path": str(path), "task": task, "splits": {task: split}, **columns}


def read_text(path: Path) -> str:
    """Content of a UTF-8 text file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); convert it, or get the file again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_lines(path: Path, parse: Callable[[str], Parsed], form: str) -> list[Parsed]:
    """Return `parse(line)` of each non-blank line of a text file.

    form: the form of a line, for the error. Raises UserError that names file and line where `parse` fails.
    """
    found = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            with guarded(f"{path}:{number}", line, form):
                found.append(parse(line.strip()))
    return found


@contextmanager
def guarded(where: str, content: object, form: str) -> Iterator[None]:
    """Convert any error of one row into a UserError that names its place, content and expected form."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        shown = str(content).strip()
        shown = repr(f"{shown[:80]}..." if len(shown) > 80 else shown) if shown else "it"
        why = one_line(error)
        raise UserError(f"{where}: {shown} is not {form} ({why}); correct it, or get the file again") from error


def sound_files(folder: Path, pattern: str) -> list[Path]:
    """Files that match, by name, without the `._` files that macOS writes next to others."""
    return sorted((path for path in folder.rglob(pattern) if not path.name.startswith("._")), key=lambda p: p.stem)


def check_files(paths: Iterable[Path], listed_in: Path) -> None:
    """Raise UserError with the number of listed files that the corpus lacks."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: listed in {listed_in} but missing ({len(missing)} in all); complete the corpus")
