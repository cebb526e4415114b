"""Runs `python -m benchmark`."""

import os
import sys

from benchmark.cli import main
from benchmark.process import PARENT_VARIABLE, keep_freed_memory, terminate_with_parent

FAULTS = ("MisconfigurationException", "YAMLError")
"""Names of user errors whose classes are slow to import."""

if __name__ == "__main__":
    if parent := os.environ.pop(PARENT_VARIABLE, ""):  # popped, so that child processes do not inherit it
        terminate_with_parent(int(parent))
    keep_freed_memory()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as stop:
        sys.exit(
            143 if type(stop).__name__ == "SIGTERMException" else stop.code
        )  # Lightning raises it without an exit code
    except Exception as error:
        known = isinstance(error, ValueError | OSError | RuntimeError)
        if not known and not any(base.__name__ in FAULTS for base in type(error).__mro__):
            raise  # a bug: keep the traceback
        from benchmark.messages import condense, from_own_code

        print(f"error: {from_own_code(error) or condense(str(error)) or type(error).__name__}", file=sys.stderr)
        sys.exit(1)
