"""Runs `python -m benchmark`."""

import os
import sys

from benchmark.cli import main
from benchmark.process import PARENT, end_with, keep_freed_memory

FAULTS = ("MisconfigurationException", "YAMLError")
"""Errors of libraries that are slow to import, by name."""

if __name__ == "__main__":
    if parent := os.environ.pop(PARENT, ""):  # not for the processes that this one starts
        end_with(int(parent))
    keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        sys.exit(143 if type(stop).__name__ == "SIGTERMException" else stop.code)  # Lightning gives it none
    except Exception as error:
        known = isinstance(error, ValueError | OSError | RuntimeError)
        if not known and not any(base.__name__ in FAULTS for base in type(error).__mro__):
            raise  # a bug, which keeps its stack
        from benchmark.messages import plain

        print(f"error: {plain(str(error)) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
