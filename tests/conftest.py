"""For all tests: one thread, since two that wait for each other on a busy machine take ten times as long."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
