"""The command line: ``program`` is light and starts, ``parser`` reads words, ``commands`` holds a function for each.

Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 130 interrupted (143: terminated).
"""

from protopush.cli.program import main

__all__ = ["main"]
