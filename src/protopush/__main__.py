"""``python -m protopush``."""

import sys

from protopush.cli import main

if __name__ == "__main__":
    sys.exit(main())
