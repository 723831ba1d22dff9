"""The schema of a training run: frozen dataclasses, one per section of a file in ``configs/``.

Values are checked here, field by field and against each other, without touching a device, so that
an impossible configuration is refused before JAX starts its backends. ``train.command_line`` turns
files and command-line overrides into a ``PretrainConfig``.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from nha_jax.compilation_cache import DEFAULT_COMPILATION_CACHE
from nha_jax.models import ModelConfig
from nha_jax.tokenizer import MIN_BPE_SIZE, bpe_size
from train.checkpoints import CheckpointConfig
from train.schema import ConfigError


def _check(condition: bool, key: str, value: Any, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value!r}: expected {expected}")


def _check_fraction(key: str, value: float) -> None:
    _check(0.0 <= value <= 1.0, key, value, "a number from 0 to 1")


def _check_not_negative(key: str, value: float) -> None:
    _check(math.isfinite(value) and value >= 0, key, value, "a finite number ≥ 0")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from.

    Attributes:
        directory: Folder of prepared data, as written by ``python -m train.prepare_data``.
        input: What to prepare ``directory`` from when it is not prepared yet: files, folders or
            globs; ``stdlib`` is the text of the running interpreter's standard library. Empty:
            ``directory`` must be prepared already.
        tokenizer: For that preparation: ``bytes``, ``bpe:<ids>`` (trained on the input), or the
            path of a JSON file of the tokenizers library.
        text_key: Key of a JSON line's object that holds the text.
        validation_fraction: Share of the documents held out, chosen by the hash of their content.
        max_bytes: Prepare no more than about this many bytes of text; null: all.
        num_workers: Worker processes that read and pack rows; 0 reads in the training process.
        mask_documents: Whether a token reads its own document only. False: a row is read as one
            text, positions count from its start, and full attention can use cuDNN, which knows no
            documents. Targets never cross from one document to the next.

    Raises:
        ConfigError: A value that cannot be, by key.
    """

    directory: str
    input: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    text_key: str = "text"
    validation_fraction: float = 0.01
    max_bytes: int | None = None
    num_workers: int = 0
    mask_documents: bool = True

    def __post_init__(self) -> None:
        _check(self.directory != "", "data.directory", self.directory, "a folder")
        _check("" not in self.input, "data.input", self.input, "files, folders or globs")
        self._check_tokenizer()
        fraction = self.validation_fraction
        valid = 0 < fraction < 1
        _check(valid, "data.validation_fraction", fraction, "a number between 0 and 1")
        if self.max_bytes is not None:
            _check(self.max_bytes > 0, "data.max_bytes", self.max_bytes, "an integer > 0, or null")
        _check(self.num_workers >= 0, "data.num_workers", self.num_workers, "an integer ≥ 0")

    def _check_tokenizer(self) -> None:
        try:
            bpe_size(self.tokenizer)
        except ValueError:
            expected = f"bpe:N, N an integer ≥ {MIN_BPE_SIZE}"
            _check(False, "data.tokenizer", self.tokenizer, expected)
        _check(self.tokenizer != "", "data.tokenizer", self.tokenizer, "bytes, bpe:N or a file")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping by global norm.

    Attributes:
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay, times the learning rate; none on norms, biases and
            gates.
        clip_norm: Gradients are scaled down to this global norm; null: no clipping.

    Raises:
        ConfigError: A value that cannot be, by key.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"optimizer.{name}", value, "a number in [0, 1)")
        _check(self.eps > 0 and math.isfinite(self.eps), "optimizer.eps", self.eps, "a number > 0")
        _check_not_negative("optimizer.weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            valid = self.clip_norm > 0 and math.isfinite(self.clip_norm)
            _check(valid, "optimizer.clip_norm", self.clip_norm, "a finite number > 0, or null")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate against the step.

    Attributes:
        learning_rate: The peak.
        kind: ``cosine``: linear warm-up, then half a cosine down to the final value at the last
            step. ``wsd``: linear warm-up, constant, then linear decay (warm-up-stable-decay).
        warmup_steps: Steps of the linear warm-up from 0.
        decay_fraction: ``wsd`` only: share of all steps that the decay takes.
        final_fraction: Learning rate at the last step, as a share of the peak.

    Raises:
        ConfigError: A value that cannot be, by key.
    """

    learning_rate: float
    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        _check_not_negative("schedule.learning_rate", self.learning_rate)
        _check(self.warmup_steps >= 0, "schedule.warmup_steps", self.warmup_steps, "an integer ≥ 0")
        _check_fraction("schedule.decay_fraction", self.decay_fraction)
        _check_fraction("schedule.final_fraction", self.final_fraction)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Cross-entropy.

    Attributes:
        chunk_size: Time steps whose float32 logits exist at once.
        z_loss: Weight of the squared log-partition function, 0 for none (PaLM, section 5).

    Raises:
        ConfigError: A value that cannot be, by key.
    """

    chunk_size: int = 256
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        _check(self.chunk_size > 0, "loss.chunk_size", self.chunk_size, "an integer > 0")
        _check_not_negative("loss.z_loss", self.z_loss)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis.

    Attributes:
        data: Replicas of the parameters, each with its share of the batch; ``auto``: as many as the
            devices allow.
        fsdp: Shards of the parameters and of the optimizer state; the batch is shared out too.
        tensor: Shards of heads, feed-forward width and vocabulary.

    Raises:
        ConfigError: A value that cannot be, by key.
    """

    data: int | Literal["auto"] = "auto"
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        if self.data != "auto":
            _check(self.data > 0, "mesh.data", self.data, "an integer > 0, or auto")
        _check(self.fsdp > 0, "mesh.fsdp", self.fsdp, "an integer > 0")
        _check(self.tensor > 0, "mesh.tensor", self.tensor, "an integer > 0")


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """The validation pass.

    Attributes:
        every_steps: Steps between passes; there is one at step 0 and one after the last step too.
        batches: Batches of the validation split in a pass; null: all of it.

    Raises:
        ConfigError: A value that cannot be, by key.
    """

    every_steps: int
    batches: int | None = None

    def __post_init__(self) -> None:
        _check(self.every_steps > 0, "validation.every_steps", self.every_steps, "an integer > 0")
        if self.batches is not None:
            _check(self.batches > 0, "validation.batches", self.batches, "an integer > 0, or null")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text generated at the end of a run.

    Attributes:
        prompt: The text to continue. Spaces at its end count with the byte tokenizer only: others
            make a space part of the word after it.
        num_tokens: Tokens to generate; 0: no sample.
        temperature: 0 for greedy decoding.

    Raises:
        ConfigError: A value that cannot be, by key.
    """

    prompt: str = ""
    num_tokens: int = 200
    temperature: float = 0.8

    def __post_init__(self) -> None:
        _check(self.num_tokens >= 0, "sample.num_tokens", self.num_tokens, "an integer ≥ 0")
        _check_not_negative("sample.temperature", self.temperature)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written while training.

    Attributes:
        every_steps: Steps between lines on the terminal; the JSONL file has every step.
        tensorboard: Write TensorBoard event files too.
        progress_bar: Show a progress bar where the terminal can.
        baseline_tokens: Training tokens on which the unigram and bigram models are counted that
            the model is compared with; 0: no comparison.

    Raises:
        ConfigError: A value that cannot be, by key.
    """

    every_steps: int = 10
    tensorboard: bool = True
    progress_bar: bool = True
    baseline_tokens: int = 20_000_000

    def __post_init__(self) -> None:
        _check(self.baseline_tokens >= 0, "log.baseline_tokens", self.baseline_tokens, "≥ 0")
        _check(self.every_steps > 0, "log.every_steps", self.every_steps, "an integer > 0")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A trace for TensorBoard or Perfetto.

    Attributes:
        steps: ``first:last``, the steps to trace, both included; null: none.

    Raises:
        ConfigError: A value that cannot be, by key.
    """

    steps: str | None = None

    def __post_init__(self) -> None:
        if self.steps is None:
            return
        match = re.fullmatch(r"(\d+):(\d+)", self.steps)
        valid = match is not None and 1 <= int(match[1]) <= int(match[2])
        _check(valid, "profile.steps", self.steps, "first:last, such as 10:15")

    @property
    def bounds(self) -> tuple[int, int] | None:
        """First and last traced step, or None."""
        if self.steps is None:
            return None
        first, last = self.steps.split(":")
        return int(first), int(last)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """One training run.

    Attributes:
        name: Name of the run; its files are in ``<runs_directory>/<name>``.
        steps: Optimizer steps of the whole run.
        batch_size: Rows of the global batch of one step, over all devices and microbatches.
        context: Tokens of a row.
        model: The model.
        data: The text.
        schedule: Learning rate.
        validation: The validation pass.
        optimizer: AdamW.
        loss: Cross-entropy.
        mesh: Devices along each mesh axis.
        checkpoint: When checkpoints are written and which are kept.
        sample: Text generated at the end.
        log: What is written while training.
        profile: A trace of some steps.
        seed: Seeds the parameters, the packing and the order of the data.
        grad_accumulation: Microbatches that a step's batch is cut into, to save memory; it changes
            the numbers only by the rounding of sums.
        resume: ``auto``: continue if there is something to continue; ``never``: start anew, setting
            an earlier run of the same name aside; ``must``: continue or fail.
        runs_directory: Where runs are kept.
        compilation_cache: Folder of compiled programs, so that restarts are cheap; null: the
            one that JAX is told (``JAX_COMPILATION_CACHE_DIR``), if any. ``~`` is the home folder.

    Raises:
        ConfigError: A value that cannot be, or values that do not fit each other, by key.
    """

    name: str
    steps: int
    batch_size: int
    context: int
    model: ModelConfig
    data: DataConfig
    schedule: ScheduleConfig
    validation: ValidationConfig
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    seed: int = 0
    grad_accumulation: int = 1
    resume: Literal["auto", "never", "must"] = "auto"
    runs_directory: str = "runs"
    compilation_cache: str | None = DEFAULT_COMPILATION_CACHE

    def __post_init__(self) -> None:
        valid_name = re.fullmatch(r"[\w.+-]+", self.name) and not self.name.startswith(".")
        _check(bool(valid_name), "name", self.name, "letters, digits, '_', '-', '+' and '.'")
        for key, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("grad_accumulation", 1),
            ("context", 2),
        ):
            value = getattr(self, key)  # of a context of 1 no token has a target
            _check(least <= value < 2**31, key, value, f"an integer from {least} to 2**31 - 1")
        _check(0 <= self.seed < 2**32, "seed", self.seed, "an integer from 0 to 2**32 - 1")
        _check(
            self.schedule.warmup_steps <= self.steps,
            "schedule.warmup_steps",
            self.schedule.warmup_steps,
            f"at most steps={self.steps}",
        )
        traced = self.profile.bounds
        _check(
            traced is None or traced[0] <= self.steps,
            "profile.steps",
            self.profile.steps,
            f"to begin at most at steps={self.steps}",
        )
        _check(self.runs_directory != "", "runs_directory", self.runs_directory, "a folder")
        cache = self.compilation_cache
        _check(cache != "", "compilation_cache", cache, "a folder, or null")
        # Adam and accumulation compute in the parameters' type.
        dtype = self.model.param_dtype
        expected = "float32 for training; model.compute_dtype may be bfloat16"
        _check(dtype == "float32", "model.param_dtype", dtype, expected)
        self._check_mesh()

    def _check_mesh(self) -> None:
        data = 1 if self.mesh.data == "auto" else self.mesh.data
        check_batch(self, data)
        tensor, fsdp, model = self.mesh.tensor, self.mesh.fsdp, self.model
        for key in ("num_heads", "num_kv_heads", "mlp_width"):
            value = getattr(model, key)
            if value % tensor:
                raise ConfigError(f"model.{key}={value} is not divisible by mesh.tensor={tensor}")
        if model.width % fsdp:
            raise ConfigError(f"model.width={model.width} is not divisible by mesh.fsdp={fsdp}")

    def warnings(self) -> list[str]:
        """What is possible and perhaps not meant, a line each."""
        saves, passes = self.checkpoint.every_steps, self.validation.every_steps
        if not self.checkpoint.keep_best or saves is None or saves >= self.steps:
            return []
        if saves % passes == 0:
            return []
        return [
            f"checkpoint.keep_best={self.checkpoint.keep_best} chooses among checkpoints of"
            f" validated steps: with checkpoint.every_steps={saves} and"
            f" validation.every_steps={passes} every {math.lcm(saves, passes)} steps and the last;"
            " make checkpoint.every_steps a multiple of validation.every_steps, such as"
            f" {-(-saves // passes) * passes}"
        ]

    @property
    def directory(self) -> Path:
        """Folder of the run."""
        return Path(self.runs_directory) / self.name

    @property
    def microbatch_size(self) -> int:
        """Rows of one microbatch, over all devices."""
        return self.batch_size // self.grad_accumulation

    def to_dict(self) -> dict[str, Any]:
        """The whole configuration as plain lists, dicts and scalars, every value stated."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """The whole configuration as a file for ``--config``."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def check_batch(config: PretrainConfig, data: int) -> None:
    """Raise ``ConfigError`` unless microbatches of equal size fit the shards of a batch."""
    shards = data * config.mesh.fsdp
    if config.batch_size % (config.grad_accumulation * shards):
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by grad_accumulation="
            f"{config.grad_accumulation}*mesh.data={data}*mesh.fsdp={config.mesh.fsdp}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
