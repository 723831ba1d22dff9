"""SIGTERM and Ctrl-C where no loop is there to be stopped: while a program starts, and at its end.

Imports nothing that takes time, so that a program can call this before it imports the rest.
``train.stopping`` takes over while a run goes on.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

EXIT_RESUMABLE = 75
"""Exit status of a program that was stopped: EX_TEMPFAIL, "try again later"."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Never released: taking it without waiting is how one of two threads gets to go first.
_exiting = threading.Lock()


def exit_on_signals() -> None:
    """From now on a signal ends the process at once, with ``EXIT_RESUMABLE`` and a line.

    To be called on the main thread.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    # A handler waits for the main thread, which may wait for other processes; the thread does not.
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(receiver,), name="exit", daemon=True).start()
    for number in STOP_SIGNALS:
        signal.signal(number, _exit)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` at a signal within the ``with`` block: there is work to undo.

    To be entered on the main thread.
    """
    wakeup = signal.set_wakeup_fd(-1)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)


def print_line(line: str) -> None:
    """Print on standard error, from a handler or a thread."""
    # Not print(): these must not wait for a lock that the main thread holds.
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())


def _watch(receiver: int) -> None:
    while numbers := os.read(receiver, 16):
        for number in numbers:
            if number in STOP_SIGNALS:
                _exit(number)


def _exit(number: int, frame: Any = None) -> None:
    # No exception: what is being imported could catch it.
    if _exiting.acquire(blocking=False):
        name = signal.Signals(number).name
        print_line(f"{name}: stopped, with nothing left to save; the same command goes on.")
        os._exit(EXIT_RESUMABLE)
