"""python -m codecssl.pretrain: the same command as codecssl-pretrain."""

import sys

from codecssl.pretrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
