"""python -m codecssl.tokenize: the same command as codecssl-tokenize."""

import sys

from codecssl.tokenize.cli import main
from codecssl.tokenize.common.process import guarded

if __name__ == "__main__":
    sys.exit(guarded(main))
