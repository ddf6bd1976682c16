"""python -m codecssl.tokenize: the same command as codecssl-tokenize."""

import sys

from codecssl.slurm.watch import guarded
from codecssl.tokenize.cli import main

if __name__ == "__main__":
    sys.exit(guarded(main))
