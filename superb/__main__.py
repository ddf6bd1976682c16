"""`python -m codecssl.superb`."""

import sys

from codecssl.slurm.watch import guarded
from codecssl.superb.cli import main

sys.exit(guarded(main))
