"""``python -m protopush``."""

import sys

from protopush.cli.program import run

if __name__ == "__main__":
    sys.exit(run())
