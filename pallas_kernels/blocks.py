"""Block sizes: tuned for a device where a table has the case, else from the sizes of its tiles.

The table is `tuned.json`, written by `python -m pallas_kernels.tune`.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.spec import Spec
from pallas_kernels.tiles import padded

TABLE = Path(__file__).with_name("tuned.json")

# Of an A100 or better; consumer GPUs of the same generations have less, which they say themselves.
_SHARED_MEMORY = 163 * 1024
_MULTIPROCESSORS = 132
# The kernels of 16-bit calls hold up to so many tiles [chunk, size] in shared memory at a time.
_TILES = 7
# Operands of exact 32-bit products go through registers: kernels with larger tiles [chunk, size]
# (bytes), or with longer chunks, spill tens of kilobytes a thread and take many times as long.
_WIDE_TILE = 8 * 1024
_WIDE_CHUNK = 32
# Bytes of the longest row of keys or values whose sums four warps hold in their registers.
# While they do, they are better than eight: two programs then share a multiprocessor.
_FOUR_WARPS = 256
# Kernels whose loop over a group's heads sums in registers.
_SUMS = ("adjoint", "slot_keys")
# A window of so many tokens is most of the work.
_WIDE_WINDOW = 256


@dataclasses.dataclass(frozen=True)
class Block:
    """Sizes of one kernel's tiles and its launch."""

    num_warps: int = 4
    num_stages: int = 1
    slots: int = 64  # slots per tile
    walk: int = 64  # keys, or rows, per step of the walk over the window
    own: int = 64  # keys that a program of the window's backward pass owns
    heads: int = 1  # of a group, whose outputs or queries' gradients a program computes at once
    # Whether 16-bit calls sum up log decays by matrix products, or by a scan: fewer instructions,
    # or fewer registers.
    products: bool = True
    # Whether a chunk's keys and values are loaded with every head of a group: less shared memory.
    reload: bool = False


@dataclasses.dataclass(frozen=True)
class ForwardBlocks:
    """Block sizes of the forward kernels."""

    chunk: int = 64  # C
    # Parts of the sequence whose recurrences run side by side; None: `enough_splits`.
    splits: int | None = None
    states: Block = Block(num_stages=3, slots=16)
    outputs: Block = Block(products=False)


@dataclasses.dataclass(frozen=True)
class BackwardBlocks:
    """Block sizes of the backward kernels; the chunk is that of the forward pass."""

    queries: Block = Block(walk=32, products=False)
    adjoint: Block = Block()
    scan: Block = Block(slots=16)
    window: Block = Block(walk=32)
    slot_keys: Block = Block(products=False)
    slot_gates: Block = Block()


@dataclasses.dataclass(frozen=True)
class Device:
    """What block sizes depend on."""

    kind: str
    shared_memory: int  # bytes that one program may use
    multiprocessors: int


def device_at_hand() -> Device:
    """The first GPU that JAX sees; without one, what every GPU of compute capability 8.0 has."""
    if jax.default_backend() != "gpu":
        return Device("", _SHARED_MEMORY, _MULTIPROCESSORS)
    device = jax.devices()[0]
    return Device(
        device.device_kind,
        getattr(device, "shared_memory_per_block_optin", None) or _SHARED_MEMORY,
        getattr(device, "core_count", None) or _MULTIPROCESSORS,
    )


def choose(spec: Spec, device: Device) -> tuple[ForwardBlocks, BackwardBlocks]:
    """Block sizes of a call: those of the tuned table, or else of `heuristic`.

    Args:
      spec: sizes of the call.
      device: such as `device_at_hand` gives.
    """
    entry = table().get(table_key(device.kind, spec))
    forward, backward = entry if entry is not None else heuristic(spec, device)
    chunk = min(forward.chunk, max(16, 1 << (spec.rows - 1).bit_length()))
    return dataclasses.replace(forward, chunk=chunk), backward


def heuristic(spec: Spec, device: Device) -> tuple[ForwardBlocks, BackwardBlocks]:
    """Sizes whose tiles fit the device's shared memory; never fails."""
    row = max(_features(spec))
    # Operands that a float16 call computes are multiplied in 32 bits.
    row *= 2 if spec.dtype == jnp.bfloat16 else jnp.dtype(spec.wide).itemsize
    chunk, limit = 64, device.shared_memory // _TILES
    # Interpreted, they have no registers, and stand for 16-bit calls: chunks are theirs.
    if spec.is_exact and not spec.interpret:
        chunk, limit = _WIDE_CHUNK, min(limit, _WIDE_TILE)
    while chunk > 16 and chunk * row > limit:
        chunk //= 2

    def limited(blocks: Any) -> Any:
        changes = {
            field.name: dataclasses.replace(
                block,
                slots=min(block.slots, chunk),
                walk=min(block.walk, chunk),
                own=min(block.own, chunk),
                # Pipelined loops keep tiles of several steps.
                num_stages=block.num_stages if chunk == 64 else 1,
            )
            for field in dataclasses.fields(blocks)
            if isinstance(block := getattr(blocks, field.name), Block)
        }
        return dataclasses.replace(blocks, **changes)

    forward, backward = ForwardBlocks(chunk=chunk), BackwardBlocks()
    if spec.group > 1:
        reload = chunk == 16 and _beside_a_loop(spec, chunk) > device.shared_memory
        few = {
            name: dataclasses.replace(getattr(backward, name), slots=32, reload=reload)
            for name in _SUMS
        }
        backward = dataclasses.replace(backward, **few)
    if is_wide(spec):
        backward = dataclasses.replace(backward, window=Block())
    if spec.dtype == jnp.bfloat16 and chunk == 64 and row > _FOUR_WARPS:
        forward = _with_eight_warps(forward, "outputs")
        backward = _with_eight_warps(backward, "queries", "window", "slot_keys")
    return limited(forward), limited(backward)


def _features(spec: Spec) -> tuple[int, int]:
    """Of tiles of keys and of values, padded."""
    return spec.parts * padded(spec.part_size), padded(spec.value_size)


def _beside_a_loop(spec: Spec, chunk: int) -> int:
    """Bytes of a loop over heads: its rows, the chunk and the slots, and five small tiles."""
    return (3 * sum(_features(spec)) + 5 * chunk) * chunk * jnp.dtype(spec.dtype).itemsize


def _with_eight_warps(blocks: Any, *names: str) -> Any:
    changes = {name: dataclasses.replace(getattr(blocks, name), num_warps=8) for name in names}
    return dataclasses.replace(blocks, **changes)


def is_wide(spec: Spec) -> bool:
    """Whether the window's tiles are better large than few."""
    return min(spec.window, spec.keys) >= _WIDE_WINDOW


def enough_splits(spec: Spec, batch: int, blocks: ForwardBlocks, multiprocessors: int) -> int:
    """Enough splits to fill the device twice, each of at least eight chunks.

    Their summaries are a walk of their own: two splits take as long as one.

    Args:
      spec: of the heads that one device holds.
      batch: the rows B that it holds.
      blocks: without splits.
      multiprocessors: of the device.
    """
    programs = batch * spec.num_kv_heads * max(-(-spec.num_slots // blocks.states.slots), 1)
    count = min(2 * multiprocessors // programs, spec.chunks(blocks.chunk) // 8)
    return count if count > 2 else 1


def table_key(kind: str, spec: Spec) -> str:
    """Names the cases that share block sizes.

    Groups of odd size are apart, as their heads make no pairs.
    """
    dtype = jnp.dtype(spec.dtype).name
    sizes = f"K{spec.key_size} V{spec.value_size} M{spec.num_slots}"
    group = "mha" if spec.group == 1 else "gqa odd" if spec.group % 2 else "gqa"
    wide = " wide" if is_wide(spec) else ""
    return f"{kind} {dtype} {sizes} {group}{' rope' if spec.rope else ''}{wide}"


@functools.cache
def table() -> dict[str, tuple[ForwardBlocks, BackwardBlocks]]:
    """The tuned table: from `table_key` to block sizes."""
    if not TABLE.exists():
        return {}
    entries = json.loads(TABLE.read_text())["entries"]
    return {key: blocks_of_entry(entry) for key, entry in entries.items()}


def blocks_of_entry(entry: dict[str, Any]) -> tuple[ForwardBlocks, BackwardBlocks]:
    """The block sizes of an entry of the table's JSON."""

    def of(cls: Any, fields: dict[str, Any]) -> Any:
        return cls(
            **{
                name: Block(**value) if isinstance(value, dict) else value
                for name, value in fields.items()
            }
        )

    return of(ForwardBlocks, entry["forward"]), of(BackwardBlocks, entry["backward"])
