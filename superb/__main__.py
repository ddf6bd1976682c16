"""`python -m codecssl.superb`."""

import sys

from codecssl.superb.cli import main

sys.exit(main())
