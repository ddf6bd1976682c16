"""`python -m codecssl.superb`."""

import sys

from codecssl.superb.cli import main
from codecssl.tokenize.common.process import guarded

sys.exit(guarded(main))
