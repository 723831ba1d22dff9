"""What is measured: architectures of one shape, and cells of context, batch and pass."""

import dataclasses
import datetime
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from nha_jax.layers.checks import Window
from nha_jax.models.accounting import matmul_parameters, num_parameters
from nha_jax.models.config import ModelConfig

Architecture = Literal["full", "hybrid", "nha"]
Measure = Literal["prefill", "decode"]
Status = Literal["ok", "does not fit", "failed"]

ARCHITECTURES: tuple[Architecture, ...] = ("full", "hybrid", "nha")
# The batch of a decode cell that searches for its own.
LARGEST = 0
# The note of a result of such a cell that ran the most rows that the search tries.
MORE_MAY_FIT = "more may fit"

_FULL_LAYERS = 4


def architecture(
    shape: ModelConfig, name: Architecture, *, window: int = 64, num_slots: int = 64
) -> ModelConfig:
    """A shape's config with the layers of one architecture.

    Args:
      shape: sizes and dtypes; its own windows and layer kinds do not matter.
      name: "full": full attention without slots or their gates. "hybrid": 4 full layers, each the
        last of a quarter of the depth (fewer in models of less than 8 layers), the rest with slots
        and a window. "nha": slots and a window everywhere.
      window: W of the layers with slots.
      num_slots: M.

    Raises:
      ValueError: an argument that makes no model, by name.
    """
    kind: Any = "full" if name == "full" else "nha"
    windows: tuple[Window, ...] = ("full",)
    if name == "nha":
        windows = (window,)
    elif name == "hybrid":
        depth = shape.num_layers
        most = max(1, min(_FULL_LAYERS, depth // 2 if depth < 8 else depth))
        count = next(n for n in range(most, 0, -1) if depth % n == 0)
        windows = (window,) * (depth // count - 1) + ("full",)
    # Nothing is differentiated, so nothing is to be recomputed.
    return dataclasses.replace(
        shape, layer_kinds=(kind,), windows=windows, num_slots=num_slots, remat="none"
    )


def described(config: ModelConfig) -> str:
    """The layers of an architecture's config, in words."""
    windows = [layer.window for layer in config.layers()]
    full = windows.count("full")
    if full == len(windows):
        return "all layers full attention"
    return f"{full} full layers, the rest NHA" if full else "all layers NHA"


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of all parameters."""
    return num_parameters(config) * jnp.dtype(config.param_dtype).itemsize


def token_weight_bytes(config: ModelConfig) -> int:
    """Bytes of the parameters that one token's step reads: the products', not the embeddings."""
    return matmul_parameters(config) * jnp.dtype(config.param_dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
      architecture: of the model.
      measure: "prefill": a prompt of `context` tokens, one row, until its first token is known.
        "decode": tokens of `batch` rows whose caches hold `context` tokens.
      context: tokens.
      batch: rows; `LARGEST`: as many as fit.
    """

    architecture: Architecture
    measure: Measure
    context: int
    batch: int = 1

    @property
    def label(self) -> str:
        """The cell in words."""
        rows = "largest batch" if self.batch == LARGEST else f"batch {self.batch}"
        return f"{self.architecture} {self.measure} context {self.context} {rows}"


@dataclasses.dataclass(frozen=True)
class Origin:
    """The run that measured a cell.

    Attributes:
      date: when the cell was done, UTC, ISO 8601.
      command_line: of the run.
      copy_bandwidth: that the run found, in bytes per second, read plus written.
      versions: of Python and packages.
    """

    date: str
    command_line: tuple[str, ...]
    copy_bandwidth: float
    versions: Mapping[str, str]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Origin":
        """From the fields as JSON has them."""
        return cls(**{**values, "command_line": tuple(values["command_line"])})


def now() -> str:
    """The time as an `Origin` has it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a cell.

    Attributes:
      cell: the cell, as it was asked for.
      status: "ok", "does not fit" (in the device's memory) or "failed".
      reason: of a status that is not "ok".
      batch: rows that were run.
      milliseconds: "prefill": until the first token; "decode": a step, which is a token of each
        row. Medians.
      samples: what they are the medians of.
      cache_bytes: of the rows' caches, by the arrays that were made.
      program_bytes: memory of the largest compiled program: arguments, results and temporaries.
      process_peak_bytes: the largest the device saw in this process so far; None: it does not tell.
      piece: "prefill": tokens that were read at once.
      compile_seconds: of the program that was timed.
      note: what else to know.
      origin: the run that measured it; None: the one that its report names.
    """

    cell: Cell
    status: Status
    reason: str = ""
    batch: int = 0
    milliseconds: float | None = None
    samples: tuple[float, ...] = ()
    cache_bytes: int | None = None
    program_bytes: int | None = None
    process_peak_bytes: int | None = None
    piece: int | None = None
    compile_seconds: float | None = None
    note: str = ""
    origin: Origin | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of a decode cell: of all rows together."""
        if self.milliseconds is None or self.cell.measure != "decode":
            return None
        return 1e3 * self.batch / self.milliseconds

    def as_json(self) -> dict[str, Any]:
        """All fields, and tokens per second."""
        return dataclasses.asdict(self) | {"tokens_per_second": self.tokens_per_second}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Result":
        """The inverse of `as_json`; fields that are missing have their defaults."""
        fields = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        fields["cell"] = Cell(**values["cell"])
        fields["samples"] = tuple(values.get("samples", ()))
        if fields.get("origin") is not None:
            fields["origin"] = Origin.from_json(fields["origin"])
        return cls(**fields)
