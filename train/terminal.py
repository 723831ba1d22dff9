"""What a program prints. A terminal or a pipe that is gone takes lines with it, not the work.

``python -m train.pretrain … | tee log`` and a Ctrl-C is how it goes: ``tee`` dies first.
"""

import contextlib
import os
import sys


def show(line: str) -> None:
    """Print a line on standard output, if it can be printed."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def show_error(line: str) -> None:
    """Print a line on standard error, if it can be printed."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def drop_unprinted() -> None:
    """Forget what could not be printed, at a program's end: Python would make it an error."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # closed before the program began
            continue
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
