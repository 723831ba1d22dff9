"""Stopping a run so that it can go on later: SIGTERM and Ctrl-C.

The first signal asks for a stop; the training loop asks ``should_stop`` between pieces of work
(a step, a validation batch, a few tokens of the sample), saves, and exits with
``train.signals.EXIT_RESUMABLE``.
A second Ctrl-C ends the process at once, in the middle of a compilation if need be.

With several processes one signal to one of them is enough: JAX's preemption service tells the
others, and all of them see ``should_stop`` turn true at the same call.
"""

import os
import signal
import socket
import threading
from types import TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from train.signals import STOP_SIGNALS, print_line

_EXIT_INTERRUPTED = 128 + signal.SIGINT


class Stopper:
    """Turns SIGTERM and Ctrl-C into an answer to ``should_stop``, while its ``with`` block runs.

    To be entered on the main thread, after ``initialise_distributed``.

    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._agreed = False
        self._calls = 0
        self._interrupts = {"thread": 0, "handler": 0}
        # Never released: taking one without waiting is how one of two threads gets to go first.
        self._announcing = threading.Lock()
        self._relaying = threading.Lock()
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = -1
        self._receiver: socket.socket | None = None
        self._sender: socket.socket | None = None
        self._forking = threading.local()

    @property
    def requested(self) -> bool:
        """Whether this process has been told to stop; other processes may not know yet."""
        return self._requested.is_set()

    def request(self) -> None:
        """Ask for a stop as a signal would: this process has a reason that others do not know."""
        self._requested.set()

    def should_stop(self, step: int | None = None) -> bool:
        """Whether to stop now. Once true, it stays true.

        With several processes all must call this equally often, in the same places: the answer
        turns true at the same call on each, which is how they agree on the step. A call costs
        nothing worth counting.

        Args:
            step: The current step, for the reader of the calling code; the calls are counted here,
                so that several calls within a step (validation, sampling) are fine.

        Returns:
            The same answer on every process.
        """
        del step
        self._calls += 1
        if self._agreed:
            return True
        if jax.distributed.is_initialized():
            self._relay()
            self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
        else:
            self._agreed = self.requested
        return self._agreed

    def __enter__(self) -> "Stopper":
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        # Python runs a handler only between two bytecodes of the main thread, which can be minutes
        # away while XLA compiles. The byte in the wake-up descriptor is written at once, and a
        # thread of our own reads it.
        self._previous_wakeup = signal.set_wakeup_fd(
            self._sender.fileno(), warn_on_full_buffer=False
        )
        thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        thread.start()
        for number in STOP_SIGNALS:
            if number == signal.SIGTERM and jax.distributed.is_initialized():
                continue  # JAX's preemption service handles it
            self._previous[number] = signal.signal(number, self._handle)
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork,
            after_in_child=self._after_fork_in_child,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        assert self._sender is not None
        self._sender.close()  # ends the thread

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # Something else took the signal over meanwhile: then it is no longer ours to restore.
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._previous = {}
        signal.set_wakeup_fd(self._previous_wakeup)

    def _before_fork(self) -> None:
        # A forked child is born with the handlers and the descriptor, and its signals would pass
        # for ours: they are held back until it has let go of both.
        if self._previous:
            self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def _after_fork(self) -> None:
        if self._previous:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _after_fork_in_child(self) -> None:
        if self._previous:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            self._previous = {}
            signal.set_wakeup_fd(-1)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def _handle(self, number: int, frame: Any) -> None:
        # An event loop on the main thread may own the wake-up descriptor for a while, so the
        # handler does what the thread does, and one signal seen by both counts once.
        self._receive(signal.Signals(number), "handler")

    def _watch(self) -> None:
        assert self._receiver is not None
        with self._receiver as receiver:
            while numbers := receiver.recv(16):
                for number in numbers:
                    if number in STOP_SIGNALS:
                        self._receive(signal.Signals(number), "thread")

    def _receive(self, number: signal.Signals, seen_by: str) -> None:
        if number == signal.SIGINT:
            self._interrupts[seen_by] += 1
        interrupts = max(self._interrupts.values())
        if interrupts > 1:
            print_line("Stopped at once: what came after the last checkpoint is lost.")
            os._exit(_EXIT_INTERRUPTED)
        self._requested.set()
        if self._announcing.acquire(blocking=False):
            again = " again" if interrupts else ""
            print_line(
                f"{number.name}: saving a checkpoint at the next opportunity, then stopping. "
                f"Ctrl-C{again} stops at once."
            )
        if jax.distributed.is_initialized():
            self._relay()

    def _relay(self) -> None:
        """Pass a signal that only this process saw on to JAX's service, which tells the others."""
        if self.requested and self._relaying.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGTERM)
