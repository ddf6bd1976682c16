"""python -m codecssl.pretrain: the same command as codecssl-pretrain."""

import sys

from codecssl.pretrain.cli import main
from codecssl.tokenize.common.process import guarded

if __name__ == "__main__":
    sys.exit(guarded(main))
