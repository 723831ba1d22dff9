"""Static description of a decode step, and its block sizes."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from pallas_kernels.blocks import Device

# Programs that keep an H100 busy: two for each of its 132 multiprocessors.
_FULL_DEVICE = 264
# Bytes of one key or value tile: what keeps enough of them in flight within the registers.
_TILE_BYTES = 16 * 1024
# Query heads per key/value head that the kernels serve.
MOST_HEADS = 64
# Bytes of shared memory for sums over threads.
_SCRATCH = 512


@dataclasses.dataclass(frozen=True)
class DecodeBlocks:
    """Block sizes of the decode kernels.

    slots: memory slots per tile, a power of two >= 16.
    window: ring rows per tile, a power of two >= 16.
    splits: programs over which each window is split; 1 runs the whole step in one kernel.
    products: "sum" multiplies and reduces each query head by itself, exactly in float32; "dot"
      runs matrix products on several heads at a time, padded to a power of two >= 16.
    heads: at most so many in a product.
    ahead: tiles loaded before their turn.
    narrow_loads: load 16-bit tiles in pieces of 8 bytes, not 16 (see `tile_columns`).
    num_warps, num_stages: of the Triton compiler.
    """

    slots: int
    window: int
    splits: int
    products: Literal["sum", "dot"]
    heads: int = MOST_HEADS
    ahead: int = 1
    narrow_loads: bool = False
    num_warps: int = 4
    num_stages: int = 3


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """What is static in a decode step. Letters as in the operator's legend; R = N / G."""

    batch: int
    kv_heads: int
    heads: int  # R, query heads per key/value head
    key_size: int
    value_size: int
    num_slots: int
    capacity: int  # rows of the window's ring
    pending: int  # rows of the pending ring: the lag, or 0
    window: int
    slot_lag: int
    mask_empty: bool
    scale: float
    rope: bool
    has_ids: bool
    dtype: jnp.dtype  # of q, k, v
    interpret: bool

    @property
    def state_dtype(self) -> jnp.dtype:
        """Of slots, softmax and accumulation."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def padded_key(self) -> int:
        """K up to a power of two."""
        return power_of_two(self.key_size)

    @property
    def padded_value(self) -> int:
        """V up to a power of two."""
        return power_of_two(self.value_size)

    def groups(self, blocks: DecodeBlocks) -> list[tuple[int, int]]:
        """Query heads that are scored together: the first of them, and how many."""
        size = 1 if blocks.products == "sum" else min(blocks.heads, self.heads)
        return [(r, min(size, self.heads - r)) for r in range(0, self.heads, size)]

    @property
    def updates_slots(self) -> bool:
        """Whether tokens can retire at all: a bounded cache may never see lag tokens."""
        return self.num_slots > 0 and (self.slot_lag == 0 or self.pending > 0)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two >= n and >= least."""
    return max(least, 1 << (n - 1).bit_length())


def default_blocks(spec: DecodeSpec, device: Device) -> DecodeBlocks:
    """Block sizes for any sizes up to 256: tiles within `_TILE_BYTES`, splits that fill the GPU.

    They fit into 99 KiB of shared memory, or more where it is there; those of float64 may not.
    """
    size = max(spec.padded_key, spec.padded_value)
    narrow = spec.dtype.itemsize == 2

    def rows(dtype: jnp.dtype, available: int, tile: int = _TILE_BYTES) -> int:
        fitting = max(16, min(128, tile // (size * dtype.itemsize)))
        return min(fitting, power_of_two(max(available, 1)))

    window = rows(spec.dtype, spec.capacity)
    # Rows of slots are written, too: with larger tiles of long ones registers spill.
    half = narrow and size > 64
    slots = rows(spec.state_dtype, spec.num_slots, _TILE_BYTES // 2 if half else _TILE_BYTES)
    programs = spec.batch * spec.kv_heads
    tiles = math.ceil(spec.capacity / window)
    # A split reads at least four tiles: below that, launching and merging cost more than they save.
    splits = max(1, min(_FULL_DEVICE // programs, tiles // 4))
    many_heads = spec.heads > 16
    # Float32 tiles of products lie in shared memory once more per stage.
    wide_stages = 1 if many_heads else 2
    stages, heads, padded = 3 if narrow else wide_stages, MOST_HEADS, power_of_two(spec.heads)
    if narrow:
        # Two tiles per stage; what heads take beside them counts from the least product on.
        beside = (padded - 16) * size * 4 + _SCRATCH
        while stages > 1 and 2 * _TILE_BYTES * stages + beside > device.shared_memory:
            stages -= 1
    elif spec.dtype == jnp.float32:
        # Beside two tiles lie queries and weights, twice: upper and lower halves of their digits.
        row, weights = 2 * 4 * spec.padded_key, 2 * 4 * max(slots, window)
        if padded * (row + weights) + 2 * _TILE_BYTES > device.shared_memory:
            heads = max(padded // 2, 16)
        while heads > 16 and min(heads, padded) * row + 2 * _TILE_BYTES > device.shared_memory:
            heads //= 2
    return DecodeBlocks(
        slots=slots,
        window=window,
        splits=splits,
        products="dot" if narrow or spec.heads > 4 else "sum",
        heads=heads,
        narrow_loads=narrow and splits == 1,
        num_warps=8 if many_heads or size > 128 else 4,
        num_stages=stages,
    )
