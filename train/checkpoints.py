"""Checkpoints of a run: written in the background, verified before they are read.

A save goes through three names, and only the last one counts::

    <step>.unfinished.orbax-checkpoint-tmp   Orbax writes, on every process
    <step>.unfinished                        Orbax has committed; the manifest is being computed
    <step>                                   complete: manifest inside, all of it on the disk

The renames are atomic, so a process killed at any moment leaves complete checkpoints and leftovers
that are known for what they are. Old checkpoints are deleted after the new one has its final name.
"""

import datetime
import math
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from nha_jax.models import checkpoint_files as files
from train import integrity
from train.checkpoint_contents import (
    CheckpointError,
    CheckpointMetadata,
    from_items,
    read_json,
    read_metadata,
    to_items,
)
from train.checkpoint_policy import (
    VALIDATION_LOSS,
    CheckpointConfig,
    CheckpointInfo,
    SaveClock,
    preservation_policy,
)
from train.distributed import any_process, from_process_zero
from train.integrity import retire

__all__ = [
    "VALIDATION_LOSS",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointMetadata",
    "CheckpointStore",
    "NotFiniteError",
    "retire",
]

_WRITE_TIMEOUT_SECONDS = 3600


class NotFiniteError(CheckpointError):
    """A state that belongs to a loss or gradient that is not finite must not be saved."""


class CheckpointStore:
    """The checkpoints of one run.

    With several processes, all of them call every method, in the same order.

    Args:
        directory: Folder of the checkpoints, ``runs/<name>/checkpoints``; on a file system that
            all processes share.
        config: When to save and what to keep.
        report: Called on process 0 with lines for the user.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig,
        report: Callable[[str], None] = print,
    ):
        import orbax.checkpoint as ocp

        self.directory = Path(directory).absolute()
        self._config = config
        self._report = report
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_WRITE_TIMEOUT_SECONDS, create_directories_asynchronously=False
            ),
        )
        self._policy = preservation_policy(config)
        self._clock = SaveClock(config.every_minutes)
        self._lock: int | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved_step: int | None = None

    def prepare(self) -> int | None:
        """Claim the folder, clear it of leftovers, find the newest sound checkpoint.

        Damaged checkpoints newer than that are set aside, with a line that names the file.

        Returns:
            The step to resume from, or None when there is none and never was.

        Raises:
            NoSoundCheckpointError: There are checkpoints, but all are damaged.
            DirectoryInUseError: Another process trains in the same folder.
        """
        found: int | None = None
        error: Exception | None = None
        if jax.process_index() == 0:
            try:
                found = self._prepare_files()
            except (integrity.NoSoundCheckpointError, integrity.DirectoryInUseError) as failure:
                error = failure
            except OSError as failure:
                error = CheckpointError(f"{self.directory} cannot be prepared: {failure}")
        self._raise_together(error)
        step = from_process_zero(-1 if found is None else found)
        self._saved_step = None if step < 0 else step
        return self._saved_step

    def _prepare_files(self) -> int | None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = integrity.lock_directory(self.directory)
        integrity.remove_leftovers(self.directory, self._report)
        return integrity.newest_sound(self.directory, self._report)

    def restore(self, step: int, abstract_state: Any) -> tuple[Any, CheckpointMetadata]:
        """Read a checkpoint onto the devices that ``abstract_state`` names.

        The mesh and the number of processes may differ from those that wrote it.

        Args:
            step: The step, as ``prepare`` returned it.
            abstract_state: The train state with ``jax.ShapeDtypeStruct`` leaves that carry
                shardings.

        Returns:
            The state and the metadata.

        Raises:
            CheckpointError: It does not have these arrays.
        """
        import orbax.checkpoint as ocp

        metadata = self.read_metadata(step)
        abstract = to_items(abstract_state)
        try:
            items = self._checkpointer.restore(
                self._path(step),
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {self._path(step)} does not hold the arrays of this model and "
                f"optimizer: {error}"
            ) from error
        return from_items(items, abstract_state), metadata

    def read_metadata(self, step: int) -> CheckpointMetadata:
        """The metadata of a checkpoint, without its arrays.

        Args:
            step: The step.

        Raises:
            CheckpointError: It is not there or cannot be read.
        """
        return read_metadata(self._path(step))

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with a checkpoint.

        Args:
            step: The step.

        Raises:
            CheckpointError: It is not there or cannot be read.
        """
        return read_json(self._path(step), files.METRICS_ITEM)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return list(files.step_directories(self.directory))

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint is due, by steps or by minutes; all processes get one answer.

        Args:
            step: Steps taken so far.

        Returns:
            True when it is due; never twice for one step.
        """
        # The clock is asked in any case: asking it keeps the processes and its pace in step.
        due_by_time = self._clock.is_due(step)
        if step == self._saved_step:
            return False
        by_steps = self._config.every_steps
        return due_by_time or (by_steps is not None and step % by_steps == 0)

    def save(
        self,
        step: int,
        state: Any,
        metadata: CheckpointMetadata,
        metrics: Mapping[str, float],
    ) -> bool:
        """Start to write a checkpoint; it is complete after ``wait``, or some time before.

        Returns as soon as the arrays are copied, so the state may be donated to the next step.
        An earlier save is waited for. Without a ``validation_loss`` among the metrics, the
        checkpoint cannot be kept as one of the best.

        Args:
            step: Steps taken so far.
            state: The train state: a NamedTuple or dataclass with a field ``params``.
            metadata: The rest.
            metrics: Metrics of this very step, at least the loss and the gradient norm.

        Returns:
            False when this step's checkpoint is there already, else True.

        Raises:
            NotFiniteError: A metric is not finite; nothing was written.
            CheckpointError: There is no room on the disk, and nothing was written; or an earlier
                save failed; or this one could not start.
        """
        self.wait()
        if step == self._saved_step:
            return False
        values = {name: float(value) for name, value in metrics.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NotFiniteError(
                    f"step {step} is not saved: {name}={value} is not finite; {self._last_good()}"
                )
        self._check_free_space(step, state)
        try:
            self._start_writing(step, state, metadata, values)
        except Exception as error:
            raise self._failure(step, error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(step, values), name="checkpoint", daemon=False
        )
        # Before the thread, which takes it back if it fails.
        self._saved_step = step
        self._thread.start()
        self._clock.restart(step)
        return True

    def check(self) -> None:
        """Raise the error of a save in the background, if this process has met one.

        Raises:
            CheckpointError: What went wrong and which checkpoint is the last good one.
        """
        if self._error is not None and (self._thread is None or not self._thread.is_alive()):
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until the save in progress is complete on every process.

        Raises:
            CheckpointError: It failed, here or on another process.
        """
        if self._thread is not None:
            self._thread.join()
        error, self._error = self._error, None
        started, self._thread = self._thread is not None, None
        if started:
            self._raise_together(error)
        elif error is not None:
            raise error

    def close(self) -> None:
        """Wait for this process's part of the save in progress and release the folder.

        Raises:
            CheckpointError: The save in progress failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._checkpointer.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self.check()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            # The first error is the one to show; this one must not vanish either.
            error.add_note(str(failure))

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _raise_together(self, error: Exception | BaseException | None) -> None:
        """Raise on all processes when one has an error, so that none waits for the others."""
        if any_process(error is not None):
            raise error or CheckpointError("another process failed; see its message")

    def _check_free_space(self, step: int, state: Any) -> None:
        error: OSError | None = None
        if jax.process_index() == 0:
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            try:
                integrity.check_free_space(self.directory, needed)
            except OSError as failure:
                error = failure
        if any_process(error is not None):
            reason = error or "process 0 finds no room on the disk"
            raise CheckpointError(f"step {step} is not saved: {reason}; {self._last_good()}")

    def _start_writing(
        self, step: int, state: Any, metadata: CheckpointMetadata, metrics: dict[str, float]
    ) -> None:
        import orbax.checkpoint as ocp

        arrays = {name: ocp.args.StandardSave(item) for name, item in to_items(state).items()}
        texts = {
            name: ocp.args.JsonSave(item)
            for name, item in (metadata.items() | {files.METRICS_ITEM: metrics}).items()
        }
        self._checkpointer.save(
            self.directory / f"{step}{integrity.UNFINISHED}",
            args=ocp.args.Composite(**arrays, **texts),
            force=True,
        )

    def _finish(self, step: int, metrics: dict[str, float]) -> None:
        """On a thread of its own: wait for Orbax's commit, then complete the checkpoint."""
        try:
            self._checkpointer.wait_until_finished()  # all processes have written
            if jax.process_index() == 0:
                unfinished = self.directory / f"{step}{integrity.UNFINISHED}"
                files.write_manifest(unfinished)
                unfinished.rename(self._path(step))
                files.sync_directory(self.directory)
                self._delete_old()
        except BaseException as error:
            self._error = self._failure(step, error)

    def _delete_old(self) -> None:
        from orbax.checkpoint.checkpoint_managers import PreservationContext

        infos = [self._info(step) for step in self.steps()]
        keep = self._policy.should_preserve(infos, context=PreservationContext())
        for info, kept in zip(infos, keep, strict=True):
            if not kept:
                integrity.delete_checkpoint(self._path(info.step))

    def _info(self, step: int) -> CheckpointInfo:
        try:
            metrics: dict[str, float] | None = self.metrics(step)
        except CheckpointError:
            metrics = None  # damaged: ranked as one without a validation loss
        if metrics is not None and VALIDATION_LOSS not in metrics:
            metrics = None
        modified = self._path(step).stat().st_mtime
        time = datetime.datetime.fromtimestamp(modified, tz=datetime.UTC)
        return CheckpointInfo(step, metrics, time)

    def _failure(self, step: int, error: BaseException) -> CheckpointError:
        if self._saved_step == step:
            self._saved_step = None
        return CheckpointError(f"saving step {step} failed: {error}; {self._last_good()}")

    def _last_good(self) -> str:
        steps = self.steps()
        if not steps:
            return "there is no earlier checkpoint"
        return f"the last good checkpoint is {self._path(steps[-1])}"
