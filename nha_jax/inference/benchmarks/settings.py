"""How cells are measured, and on what: both travel between processes as JSON."""

import dataclasses
import math
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nha_jax.inference.benchmarks.cells import Architecture, architecture
from nha_jax.models.config import ModelConfig
from nha_jax.models.presets import preset
from pallas_kernels.benchmarks.timing import measure
from pallas_kernels.benchmarks.versions import versions

_PACKAGES = ("nha-jax", "jax", "jaxlib", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin")
# Programs also need room that their analysis does not count: code, and gaps between buffers.
_USABLE = 0.97


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all cells of a run share.

    Attributes:
      shape: name of a preset, whose sizes and dtypes are taken.
      window: W of layers with slots.
      num_slots: M.
      implementation: of the operator; None: the fastest that serves each call.
      block: tokens that the device makes between two looks of the host.
      blocks: blocks that are timed, after one that is not.
      piece: tokens of a prompt that are read at once; None: all of them, or as many as fit.
      runs: prompts that are timed, at most; long ones are read once.
      max_batch: of the search for the largest batch.
      memory_limit: bytes that programs may take; None: what the device has.
    """

    shape: str
    window: int = 64
    num_slots: int = 64
    implementation: str | None = None
    block: int = 16
    blocks: int = 4
    piece: int | None = None
    runs: int = 3
    max_batch: int = 512
    memory_limit: int | None = None

    def config(self, name: Architecture) -> ModelConfig:
        """The model of one architecture."""
        shape = dataclasses.replace(preset(self.shape), implementation=self.implementation)
        return architecture(shape, name, window=self.window, num_slots=self.num_slots)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The device, as found by a process that measured on it.

    Attributes:
      device: its kind.
      platform: "gpu", "cpu", ...
      memory_limit: bytes that programs may take.
      copy_bandwidth: bytes per second of a large copy on the device, read plus written.
      versions: of Python and packages.
    """

    device: str
    platform: str
    memory_limit: int
    copy_bandwidth: float
    versions: Mapping[str, str]


def memory_limit(settings: Settings) -> int:
    """Bytes that programs may take on the first device."""
    if settings.memory_limit is not None:
        return settings.memory_limit
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return math.floor(_USABLE * stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def measure_machine(settings: Settings) -> Machine:
    """Looks at the first device and times copies on it."""
    device = jax.devices()[0]
    size = 2**30 if device.platform == "gpu" else 2**26
    sources = [jnp.full((size,), i, jnp.uint8) for i in range(2)]
    copy = jax.jit(jnp.copy)
    copying = measure(lambda i: copy(sources[i % 2]), runs=10, timer="wall")
    return Machine(
        device.device_kind,
        device.platform,
        memory_limit(settings),
        2 * size / (1e-3 * copying.median),
        versions(_PACKAGES),
    )
