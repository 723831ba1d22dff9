"""When a checkpoint is due, and which ones are kept."""

import dataclasses
import datetime
import math
import time
from typing import Any

from train.distributed import from_process_zero

VALIDATION_LOSS = "validation_loss"
_LONGEST_WAIT_STEPS = 16


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
        every_steps: Steps between checkpoints; null: not by steps.
        every_minutes: Minutes after the last checkpoint at which another is due; null: not by time.
        keep_last: The newest checkpoints that are kept.
        keep_best: The checkpoints with the lowest validation loss that are kept as well, among
            those of validated steps: make ``every_steps`` a multiple of ``validation``'s.

    Raises:
        ValueError: A value that cannot be, by key.
    """

    every_steps: int | None = 1000
    every_minutes: float | None = 30.0
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(
                f"checkpoint.every_steps={self.every_steps}: expected an integer > 0, or null"
            )
        if self.every_minutes is not None and not 0 < self.every_minutes < math.inf:
            raise ValueError(
                f"checkpoint.every_minutes={self.every_minutes}: expected a number > 0, or null"
            )
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={self.keep_last}: expected an integer > 0")
        if self.keep_best < 0:
            raise ValueError(f"checkpoint.keep_best={self.keep_best}: expected an integer ≥ 0")


@dataclasses.dataclass
class CheckpointInfo:
    """One checkpoint as Orbax's preservation policies want it.

    Attributes:
        step: Its step.
        metrics: Its metrics, a ``validation_loss`` among them; None: not to be ranked.
        time: When it was written.
    """

    step: int
    metrics: dict[str, Any] | None
    time: datetime.datetime


class SaveClock:
    """Says when the minutes are up, by the clock of process 0.

    Asking process 0 makes the processes wait for each other, so it is not asked at every step: each
    time, its pace decides the step at which to ask again, half-way to the deadline but soon enough
    to notice a slower pace.

    Args:
        every_minutes: Minutes between saves; None: never due.
    """

    def __init__(self, every_minutes: float | None):
        self._seconds = None if every_minutes is None else 60 * every_minutes
        self._start = time.monotonic()
        self._start_step: int | None = None
        self._ask_at = 0

    def restart(self, step: int) -> None:
        """Count the minutes from now, the time of a save after this step."""
        self._start = time.monotonic()
        self._start_step = step
        self._ask_at = 0

    def is_due(self, step: int) -> bool:
        """Whether the minutes are up after this step. All processes must ask at every step."""
        if self._seconds is None:
            return False
        if self._start_step is None:
            self._start_step = step
        if step < self._ask_at:
            return False
        elapsed = time.monotonic() - self._start
        remaining = self._seconds - elapsed
        pace = max(elapsed, 1e-3) / max(step - self._start_step, 1)
        ahead = 0 if remaining <= 0 else max(1, min(int(remaining / pace / 2), _LONGEST_WAIT_STEPS))
        ahead = from_process_zero(ahead)
        self._ask_at = step + ahead
        return ahead == 0


def preservation_policy(config: CheckpointConfig) -> Any:
    """Orbax's policy for a configuration: the newest, and those with the lowest validation loss.

    Returns:
        An ``orbax.checkpoint.checkpoint_managers.PreservationPolicy``.
    """
    from orbax.checkpoint import checkpoint_managers as policies

    kept: list[Any] = [policies.LatestN(config.keep_last)]
    if config.keep_best:
        kept.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics[VALIDATION_LOSS],
                reverse=True,
                n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )
        )
    return policies.AnyPreservationPolicy(kept)
