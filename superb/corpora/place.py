"""Find a corpus and its small side files on disk, or name what is missing in the error."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codecssl.superb.rows import ManifestRow
from codecssl.tokenize.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folders to search. `root` holds the corpora, or is one; `side` holds lists that do not come with them."""

    root: Path
    side: Path | None = None

    def corpus(self, title: str, names: tuple[str, ...], marks: tuple[str, ...]) -> Path:
        """The folder, root/NAME or root itself, that has every one of `marks` (glob patterns allowed)."""
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
        """The first of `names` in side, in `near`, or in root; else a UserError that says where to get it."""
        folders = [folder for folder in (self.side, *near, self.root) if folder is not None]
        for name in names:
            for folder in folders:
                if (folder / name).is_file():
                    return (folder / name).absolute()
        looked = ", ".join(str(folder) for folder in dict.fromkeys(folders))
        raise UserError(f"{' or '.join(names)}: not in {looked}; get it from {source} and give --side its folder")


def make_row(task: str, split: str, path: Path, **columns: Any) -> ManifestRow:
    """A row of manifest.jsonl; `path` absolute."""
    return {"path": str(path), "task": task, "splits": {task: split}, **columns}


def read_lines(path: Path) -> list[str]:
    """Non-blank lines of a UTF-8 text file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    return [line for line in text.split("\n") if line.strip()]


def check_files(paths: Iterable[Path], listed_in: Path) -> None:
    """Raise UserError with the number of listed files that the corpus lacks."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: listed in {listed_in} but missing ({len(missing)} in all); complete the corpus")
