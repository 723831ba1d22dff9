"""Compiling ahead of the first step, and saying what the program needs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from train.host_memory import available_host_memory


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """Memory of a compiled program on one device, in bytes.

    Attributes:
        arguments: The state and a batch.
        temporaries: What the program needs besides, at its peak.
        available: What the device has for this process; None where it does not say. Devices
            simulated on one host share what the host has left.
    """

    arguments: int
    temporaries: int
    available: int | None

    @property
    def needed(self) -> int:
        """Bytes needed to run the program."""
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        """False when it is known that the memory will not suffice."""
        return self.available is None or self.needed <= self.available

    def __str__(self) -> str:
        available = "unknown" if self.available is None else f"{self.available / 2**30:.2f} GiB"
        return (
            f"memory per device: {self.needed / 2**30:.2f} GiB needed (state and batch "
            f"{self.arguments / 2**30:.2f}, temporary {self.temporaries / 2**30:.2f}), "
            f"{available} available"
        )


def memory_report(compiled: jax.stages.Compiled, mesh: Mesh) -> MemoryReport:
    """What a compiled program needs on each device, against what there is.

    To be called before its arguments exist, or with the memory that they take counted as available.
    """
    analysis: Any = compiled.memory_analysis()
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return MemoryReport(
        arguments=analysis.argument_size_in_bytes + max(outputs, 0),
        temporaries=analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes,
        available=_available_memory(mesh),
    )


def _available_memory(mesh: Mesh) -> int | None:
    device = mesh.local_devices[0]
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    if device.platform == "cpu" and (memory := available_host_memory()) is not None:
        return memory // len(mesh.local_devices)
    return None


def compile_ahead(
    function: Callable[..., Any], *arguments: Any, donate_argnums: tuple[int, ...] = (), **jit: Any
) -> jax.stages.Compiled:
    """Compile a pure function for these shapes and shardings.

    The result refuses any other shapes, dtypes or shardings: it cannot be compiled a second time.
    """
    jitted = jax.jit(function, donate_argnums=donate_argnums, **jit)
    return jitted.lower(*arguments).compile()
