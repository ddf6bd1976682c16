"""`python -m codecssl.slurm.scripts [DIR]`: where the batch scripts are, or a copy of them in DIR to adapt."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from codecssl.tokenize.common.errors import UserError

HERE = Path(__file__).resolve().parent
SITE = "site.sh"
"""The settings of the site. An existing copy is not overwritten."""


def scripts() -> list[Path]:
    """Return the installed batch scripts."""
    return sorted([*HERE.glob("*.sbatch"), *HERE.glob("*.sh")])


def copy(target: Path) -> list[Path]:
    """Copy the scripts into `target` and return the written files. Raises UserError if that fails."""
    written = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in scripts():
            if path.name != SITE or not (target / SITE).exists():
                written.append(Path(shutil.copy(path, target / path.name)))
    except (OSError, shutil.SameFileError) as error:
        raise UserError(f"{target}: the scripts cannot be copied there ({error}); give another folder") from error
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 on success, 1 after an error, which is printed on one line."""
    parser = argparse.ArgumentParser(prog="python -m codecssl.slurm.scripts", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help=f"copy them there; its {SITE} stays")
    arguments = parser.parse_args(argv)
    if arguments.folder is None:
        print(HERE)
        return 0
    try:
        for path in copy(arguments.folder):
            print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
