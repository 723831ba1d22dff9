"""The training loop: steps, metrics one step late, validation, checkpoints, stopping."""

import dataclasses
import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from train.baselines import EntropyBaselines, entropy_baselines
from train.checkpoints import VALIDATION_LOSS, CheckpointMetadata, CheckpointStore
from train.compilation import compile_ahead, memory_report
from train.data import Loader, Split, make_loader
from train.evaluation import ValidationResult, make_validation_step, validate
from train.logging import RunLog
from train.run_files import RunFileError
from train.schema import ConfigError
from train.sharding import batch_sharding, process_block, replicated, to_global_batch
from train.step import Metrics, Trainer, TrainState, make_train_step
from train.stopping import Stopper

BATCH_DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_mask": np.bool_,
    "segment_ids": np.int32,
    "positions": np.int32,
}


class StopRequested(Exception):
    """The run was told to stop; what was trained is saved."""


class TrainingDiverged(Exception):
    """Loss or gradient norm is not finite. The message is the report."""


class DataWorkerDied(Exception):
    """A worker process that reads the data has ended; what was trained is saved."""


class _Dispatched(NamedTuple):
    """A step that the device may still be working on."""

    step: int
    metrics: Metrics
    waited_seconds: float
    finished_at: Future[float]  # by `time.monotonic`


def _time_when_ready(array: jax.Array) -> float:
    """Waits on a thread of its own: the loop looks at a step when it may have ended long before."""
    array.block_until_ready()
    return time.monotonic()


@dataclasses.dataclass
class Loop:
    """A run's loop over steps.

    Attributes:
        trainer: Model, optimizer and mesh.
        train_split: Training data.
        validation_split: Validation data.
        store: Checkpoints.
        metadata: What goes into each checkpoint besides the state.
        log: Where metrics go.
        stopper: Says when to stop.
        before_step: Called with the number of each step and the state before it; returns the state
            to go on with. For tests that inject faults.
    """

    trainer: Trainer
    train_split: Split
    validation_split: Split
    store: CheckpointStore
    metadata: CheckpointMetadata
    log: RunLog
    stopper: Stopper
    before_step: Callable[[int, TrainState], TrainState] | None = None

    def __post_init__(self) -> None:
        self.baselines: EntropyBaselines | None = None
        self._config = self.trainer.config
        self._pending: _Dispatched | None = None
        self._metrics: dict[str, float] = {}
        self._validation: ValidationResult | None = None
        self._validated_step: int | None = None
        self._worker_failure: DataWorkerDied | None = None
        self._profile_directory = self._config.directory / "profile"
        self._profiling = False

    def measure_baselines(self) -> None:
        """Count unigrams and bigrams, for the model to be compared with.

        Raises:
            DataError: A record of the data is damaged.
        """
        tokens = self._config.log.baseline_tokens
        if tokens and jax.process_index() == 0:
            self.baselines = entropy_baselines(
                self.train_split, self.validation_split, max_tokens=tokens
            )
            self.log.baselines(self.baselines)

    def compile(self) -> None:
        """Compile the training and validation steps; say how much memory training needs.

        Raises:
            ConfigError: The operator's implementation that was named cannot serve the model here.
        """
        began = time.monotonic()
        try:
            self._compile()
        except NotImplementedError as error:
            if self._config.model.implementation is None:
                raise
            raise ConfigError(f"model.{error}") from error
        self.log.print(f"compiled in {time.monotonic() - began:.1f} s")
        report = memory_report(self._train_step, self.trainer.mesh)
        self.log.print(str(report))
        if not report.fits:
            self.log.print(
                "WARNING: more than is available; raise grad_accumulation or mesh.fsdp, set "
                "model.remat=full, or lower batch_size"
            )

    def _compile(self) -> None:
        mesh, state = self.trainer.mesh, self.trainer.abstract_state
        state_shardings = jax.tree.map(lambda array: array.sharding, state)
        self._train_step = compile_ahead(
            make_train_step(self.trainer),
            state,
            self._abstract_batch(self._config.batch_size),
            donate_argnums=(0,),
            out_shardings=(state_shardings, replicated(mesh)),
        )
        self._validation_step = compile_ahead(
            make_validation_step(self.trainer, self.train_split.tokenizer),
            state.params,
            self._abstract_batch(self._config.microbatch_size),
            out_shardings=replicated(mesh),
        )

    def _abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (batch_size, self._config.context)
        sharding = batch_sharding(self.trainer.mesh)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, dtype in BATCH_DTYPES.items()
        }

    def run(self, state: TrainState) -> tuple[TrainState, ValidationResult]:
        """Train from the state's step to the last, with validation and checkpoints as configured.

        Returns:
            The last state and the validation after the last step.

        Raises:
            StopRequested: Stopped early, and saved.
            RunFileError: Stopped early, and saved, because the log cannot be written.
            DataWorkerDied: Stopped early, and saved, because a worker process has ended.
            TrainingDiverged: Loss or gradient norm is not finite.
            CheckpointError: A checkpoint could not be written.
            DataError: A record of the data is damaged.
        """
        step, last = int(state.step), self._config.steps
        self._stop_if_asked(step, state)
        self._validate_if_due(step, state)
        with closing(self._batches(step)) as batches, ThreadPoolExecutor(1, "watcher") as watcher:
            while step < last:
                waiting = time.monotonic()
                local_batch = next(batches)
                waited = time.monotonic() - waiting
                batch = to_global_batch(self.trainer.mesh, local_batch, self._config.batch_size)
                if self.before_step is not None:
                    state = self.before_step(step + 1, state)
                self._start_profile(step + 1)
                state, metrics = self._train_step(state, batch)
                step += 1
                finished_at = watcher.submit(_time_when_ready, metrics["loss"])
                dispatched = _Dispatched(step, metrics, waited, finished_at)
                # The device works on this step while the host looks at the one before.
                self._settle()
                self._pending = dispatched
                self._stop_profile(step)
                self._after_step(step, state)
        self._stop_profile()
        assert self._validation is not None, "the last step is always validated"
        return state, self._validation

    def _batches(self, step: int) -> Generator[dict[str, np.ndarray], None, None]:
        """The batches from a step on; when a worker process has died, those until the stop.

        Other processes know nothing of it, and can stop only if this one takes part in their steps.
        """
        try:
            with self._loader(step, self._config.data.num_workers) as loader:
                for batch in loader:
                    yield batch
                    step += 1
        except RuntimeError as error:
            if not self._config.data.num_workers:
                raise
            reason = str(error).partition(". ")[0]
            self._worker_failure = DataWorkerDied(
                f"data.num_workers={self._config.data.num_workers}: {reason}"
            )
        with self._loader(step, num_workers=0) as loader:
            yield from loader

    def _loader(self, start_step: int, num_workers: int) -> Loader:
        index, count = process_block(self.trainer.mesh, self._config.batch_size)
        return make_loader(
            self.train_split,
            batch_size=self._config.batch_size,
            start_step=start_step,
            process_index=index,
            process_count=count,
            num_workers=num_workers,
        )

    def _after_step(self, step: int, state: TrainState) -> None:
        self.store.check()
        self._stop_if_asked(step, state)
        self._validate_if_due(step, state)
        if self.store.should_save(step) or step == self._config.steps:
            self._save(step, state)

    def _settle(self) -> None:
        """Fetch the metrics of the last dispatched step, check them and log them."""
        if self._pending is None:
            return
        dispatched, self._pending = self._pending, None
        step = dispatched.step
        metrics = jax.device_get(dispatched.metrics) | {"waited_seconds": dispatched.waited_seconds}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
            raise TrainingDiverged(self._divergence_report(step, metrics))
        self._metrics = {name: float(metrics[name]) for name in ("loss", "gradient_norm")}
        self.log.step(step, metrics, dispatched.finished_at.result())

    def _divergence_report(self, step: int, metrics: dict[str, Any]) -> str:
        lines = [
            f"step {step}: loss={metrics['loss']}, gradient norm={metrics['gradient_norm']}: "
            "not finite, stopped",
        ]
        for kind in ("gradient_norms", "parameter_norms"):
            for group, norms in metrics[kind].items():
                values = " ".join(f"{norm:.3g}" for norm in np.atleast_1d(norms))
                lines.append(f"  {kind.replace('_', ' ')}, {group}: {values}")
        self.store.wait()
        steps = self.store.steps()
        newest = self.store.directory / str(steps[-1]) if steps else None
        lines.append(f"last good checkpoint: {newest or 'none'}")
        return "\n".join(lines)

    def _save(self, step: int, state: TrainState) -> None:
        self._settle()
        metrics = dict(self._metrics)
        if self._validated_step == step and self._validation is not None:
            metrics[VALIDATION_LOSS] = self._validation.loss
        self.store.save(step, state, self.metadata, metrics)

    def _validate_if_due(self, step: int, state: TrainState) -> None:
        if step % self._config.validation.every_steps and step != self._config.steps:
            return
        self._settle()
        result = validate(
            self.trainer,
            self._validation_step,
            state.params,
            self.validation_split,
            should_stop=lambda: self.stopper.should_stop(step),
        )
        if result is None:
            self._stop(step, state)
        self._validation, self._validated_step = result, step
        self.log.validation(step, result)

    @property
    def _failure(self) -> RunFileError | DataWorkerDied | None:
        """Why this process cannot go on, though its state is sound."""
        return self.log.failure or self._worker_failure

    def _stop_if_asked(self, step: int, state: TrainState) -> None:
        if self._failure is not None:
            self.stopper.request()
        if self.stopper.should_stop(step):
            self._stop(step, state)

    def _stop(self, step: int, state: TrainState) -> NoReturn:
        self._stop_profile()
        self._save(step, state)
        self.store.wait()
        stopped = f"stopped after step {step}; saved in {self.store.directory / str(step)}"
        if self._failure is not None:
            raise type(self._failure)(f"{self._failure}; {stopped}")
        raise StopRequested(stopped)

    def _start_profile(self, step: int) -> None:
        bounds = self._config.profile.bounds
        if bounds is not None and step == bounds[0]:
            self._settle()
            jax.profiler.start_trace(str(self._profile_directory))
            self._profiling = True

    def _stop_profile(self, step: int | None = None) -> None:
        """End the trace after its last step, or at once."""
        bounds = self._config.profile.bounds
        if not self._profiling or (step is not None and bounds is not None and step < bounds[1]):
            return
        self._settle()
        jax.profiler.stop_trace()
        self._profiling = False
        self.log.print(f"profile: {self._profile_directory}")
