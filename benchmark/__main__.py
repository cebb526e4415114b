"""Runs `python -m benchmark`."""

import sys

from benchmark.cli import main

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:  # what was given cannot work: one message, no stack
        sys.exit(f"{type(error).__name__}: {error}")
