"""TensorBoard's event file of a run: an extra, which must never hold training up or end it."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

_FLUSH_SECONDS = 30.0


class ScalarWriter:
    """Writes scalars to a new event file, until that fails once.

    Written at once by the thread that calls: tensorboardX's own ``SummaryWriter`` hands events to
    a thread through a queue, and waits for ever when a full disk has ended the thread.
    """

    def __init__(self, directory: Path, *, start_step: int, warn: Callable[[str], None]):
        """Opens the file.

        Args:
          directory: of the event files; made if need be.
          start_step: steps done already; TensorBoard hides what earlier files say of later ones.
          warn: called with one line when a write fails; nothing is written from then on.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._directory, self._warn = directory, warn
        self._event, self._scalar = Event, scalar
        self._file: EventsWriter | None = None
        self._flushed = 0.0  # by `time.monotonic`
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = EventsWriter(str(directory / "events"))
        except OSError as error:
            self._give_up(error)
        started = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=start_step + 1, session_log=started))

    def add(self, tag: str, value: float, step: int) -> None:
        """Writes one value of the curve `tag`."""
        summary = self._scalar(tag, value)
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Closes the file."""
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)
        self._file = None

    def _write(self, event: object) -> None:
        if self._file is None:
            return
        try:
            self._file.write_event(event)
            now = time.monotonic()
            if now - self._flushed > _FLUSH_SECONDS:
                self._file.flush()
                self._flushed = now
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._warn(f"WARNING: no TensorBoard from here on: {self._directory}: {error.strerror}")
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
