"""What a run tells: progress bar, log lines, `metrics.jsonl`, TensorBoard, `environment.json`.

Only process 0 writes. `metrics.jsonl` has a line for every step and every validation:

    {"kind": "train", "step": 12, "loss": ..., "learning_rate": ..., "gradient_norm": ..., ...}
    {"kind": "validation", "step": 100, "loss": ..., "perplexity": ..., "bits_per_byte": ...,
     "slot_mass": [one number a layer]}
    {"kind": "baselines", "unigram_loss": ..., "bigram_loss": ..., ...}

A number that is not finite is null. A resumed run goes on in the same file: lines after the
step it resumes from are dropped first, so that each step stands there once.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int64

from train.baselines import EntropyBaselines
from train.config import PretrainConfig
from train.environment import ENVIRONMENT_FILE, write_environment
from train.evaluation import ValidationResult
from train.metrics import (
    Meter,
    Throughput,
    format_duration,
    peak_flops,
    training_flops_per_token,
)
from train.resume import ResumeError
from train.run_files import RunFileError, writing
from train.tensorboard import ScalarWriter
from train.terminal import show

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"
_NORMS = ("gradient_norms", "parameter_norms")


class RunLog:
    """Writes a run's progress; a context manager. Does nothing but count on processes but 0.

    Attributes:
      failure: why `metrics.jsonl` lacks records; None: it does not. Nothing is raised, so that the
        training loop can save what was trained, and then stop.
    """

    def __init__(
        self,
        config: PretrainConfig,
        mesh: Mesh,
        segment_lengths: Int64[np.ndarray, " lengths"],
        *,
        start_step: int,
    ):
        """Opens the files in `config.directory`, which is made if need be.

        Args:
          config: the run.
          mesh: the devices that train; they decide the peak that MFU is measured against.
          segment_lengths: of the training split: `Split.segment_lengths`.
          start_step: steps done already; lines of `metrics.jsonl` after it are dropped, all of
            them if it is 0.

        Raises:
          ResumeError: a line of an earlier `metrics.jsonl` is not a record.
          RunFileError: a file cannot be written.
        """
        self.failure: RunFileError | None = None
        self._config, self._start_step = config, start_step
        self._writes = jax.process_index() == 0
        devices = list(mesh.devices.flat)
        peak = peak_flops(devices[0].device_kind)
        # A row that is read as one text is one segment.
        lengths = segment_lengths if config.data.mask_documents else np.bincount([config.context])
        self._meter = Meter(
            flops_per_token=training_flops_per_token(config.model, lengths),
            peak_flops=None if peak is None else peak * len(devices),
        )
        self._first: tuple[int, float] | None = None
        self._bar: Any = None
        self._tensorboard: ScalarWriter | None = None
        self._validated: set[int] = set()
        if not self._writes:
            return
        directory = config.directory
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        with writing(directory / ENVIRONMENT_FILE):
            write_environment(directory, mesh, start_step=start_step)
        self._path = directory / METRICS_FILE
        with writing(self._path):
            kept = drop_records_after(self._path, start_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._validated = {r["step"] for r in kept if r["kind"] == "validation"}
        if config.log.tensorboard:
            self._tensorboard = ScalarWriter(
                directory / TENSORBOARD_DIRECTORY, start_step=start_step, warn=self.print
            )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes bar and files. Raises nothing: see `failure`."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None
        if not self._writes:
            return
        with self._noting_failure():
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def print(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if not self._writes:
            return
        if self._bar is None:
            show(line)
            return
        with contextlib.suppress(OSError), self._bar.external_write_mode():
            show(line)

    def step(self, step: int, metrics: Mapping[str, Any], finished_at: float | None = None) -> None:
        """Logs a finished step; call it once per step, in order.

        Args:
          step: number of the step, from 1.
          metrics: on the host: "loss" (nats per target), "learning_rate", "gradient_norm",
            "num_targets", "waited_seconds" (for data), and any further scalars;
            "gradient_norms" and "parameter_norms", dicts of group to norms per layer, are
            written with every log line.
          finished_at: when the step was, by `time.monotonic`; None: now.
        """
        throughput = self._meter.step(
            float(metrics["num_targets"]), float(metrics["waited_seconds"]), finished_at
        )
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if not self._writes:
            return
        line_due = step % self._config.log.every_steps == 0 or step in (
            self._start_step + 1,
            self._config.steps,
        )
        record: dict[str, Any] = {"kind": "train", "step": step}
        record |= {name: _number(v) for name, v in metrics.items() if name not in _NORMS}
        record |= _throughput_record(throughput)
        if line_due:
            record |= {
                name: {group: _numbers(values) for group, values in metrics[name].items()}
                for name in _NORMS
                if name in metrics
            }
        self._write(record)
        self._write_scalars(step, record)
        self._advance(step, record["loss"])
        if line_due:
            self.print(
                describe_step(
                    step,
                    self._config.steps,
                    metrics,
                    self._meter.average(),
                    eta=self._eta(step, now),
                )
            )
            self._meter.clear()

    def validation(self, step: int, result: ValidationResult) -> None:
        """Logs a validation pass, whose time is not counted as training."""
        self._meter.restart()
        if not self._writes:
            return
        record: dict[str, Any] = {"kind": "validation", "step": step}
        record |= {name: _number(v) for name, v in result._asdict().items() if name != "slot_mass"}
        record["slot_mass"] = _numbers(result.slot_mass)
        # A run that resumes at the step of a validation validates once more.
        if step not in self._validated:
            self._validated.add(step)
            self._write(record)
            self._write_scalars(step, record, prefix="validation/")
        masses = " ".join(f"{mass:.3f}" for mass in result.slot_mass)
        self.print(
            f"validation after step {step}: loss {result.loss:.4f},"
            f" perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte;"
            f" attention to slots by layer: {masses}"
        )

    def baselines(self, baselines: EntropyBaselines) -> None:
        """Logs the unigram and bigram entropies."""
        if not self._writes:
            return
        self._write({"kind": "baselines"} | baselines._asdict())
        self.print(
            f"baselines on the validation split: unigram {baselines.unigram_bits_per_byte:.4f},"
            f" bigram {baselines.bigram_bits_per_byte:.4f} bits per byte"
        )

    def _eta(self, step: int, now: float) -> float | None:
        assert self._first is not None
        first, since = self._first
        if step == first:
            return None
        # All that happened since counts, validations and checkpoints included.
        return (now - since) / (step - first) * (self._config.steps - step)

    def _advance(self, step: int, loss: float | None) -> None:
        if not self._config.log.progress_bar:
            return
        if self._bar is None:
            from tqdm import tqdm

            # disable=None: no bar where there is no terminal.
            self._bar = tqdm(
                total=self._config.steps,
                initial=self._start_step,
                desc=self._config.name,
                unit="step",
                disable=None,
            )
        with contextlib.suppress(OSError):
            self._bar.update(step - self._bar.n)
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

    def _write(self, record: Mapping[str, Any]) -> None:
        # What a full disk refuses stays in the file's buffer and is tried again the next time.
        with self._noting_failure():
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            with writing(self._path):
                yield
        except RunFileError as error:
            if self.failure is None:
                self.failure = error
                self.print(f"WARNING: {error}; training stops")

    def _write_scalars(self, step: int, record: Mapping[str, Any], prefix: str = "") -> None:
        if self._tensorboard is None:
            return
        for name, value in record.items():
            if name in ("kind", "step") or value is None or name in _NORMS:
                continue
            if isinstance(value, list):
                for layer, entry in enumerate(value):
                    if entry is not None:
                        self._tensorboard.add(f"{prefix}{name}/{layer:03d}", entry, step)
            else:
                self._tensorboard.add(f"{prefix}{name}", value, step)


def describe_step(
    step: int,
    steps: int,
    metrics: Mapping[str, Any],
    throughput: Throughput | None,
    *,
    eta: float | None,
) -> str:
    """The log line of a step.

    Args:
      step: number of the step.
      steps: of the whole run.
      metrics: "loss", "learning_rate", "gradient_norm".
      throughput: since the last line; None: not measured yet.
      eta: seconds left; None: not known yet.
    """
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {float(metrics['loss']):.4f}",
        f"lr {float(metrics['learning_rate']):.2e}",
        f"grad {float(metrics['gradient_norm']):.3f}",
    ]
    if throughput is None:
        parts += ["? tokens/s", "data wait ?", "MFU ?"]
    else:
        mfu = "n/a" if throughput.mfu is None else f"{100 * throughput.mfu:.1f} %"
        parts += [
            f"{throughput.tokens_per_second:,.0f} tokens/s",
            f"data wait {100 * throughput.data_wait_share:.1f} %",
            f"MFU {mfu}",
        ]
    return "  ".join([*parts, f"ETA {format_duration(eta)}"])


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that was cut off while written is left out.

    Raises:
      ResumeError: another line is not a record.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError:  # neither JSON nor UTF-8
            if number == len(lines):
                break
            record = None
        # Baselines belong to the data, not to a step.
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind is None or (kind != "baselines" and "step" not in record):
            raise ResumeError(
                f"{path}: line {number} is not a record, a JSON object with kind and step: "
                f"{line.decode('utf-8', 'replace')[:60]!r}; remove that line"
            )
        records.append(record)
    return records


def drop_records_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrites a `metrics.jsonl` without what came after a step; without anything for step 0.

    Args:
      path: the file; it need not exist.
      step: last step to keep.

    Returns:
      The records kept.

    Raises:
      ResumeError: a line is not a record.
    """
    if not path.exists():
        return []
    records = read_records(path) if step else []
    # Baselines belong to the data, not to a step, and are logged again.
    kept = [r for r in records if r["kind"] != "baselines" and r["step"] <= step]
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return kept


def _throughput_record(throughput: Throughput | None) -> dict[str, float | None]:
    if throughput is None:
        return {}
    return {
        "seconds": throughput.seconds_per_step,
        "tokens_per_second": throughput.tokens_per_second,
        "data_wait_share": throughput.data_wait_share,
        "mfu": throughput.mfu,
    }


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _numbers(values: Any) -> list[float | None]:
    return [_number(value) for value in np.ravel(np.asarray(values))]
