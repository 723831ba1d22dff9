"""Tiles of the slots' side: states, log decays, a chunk of keys beside the rows it retires at."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.blocks import Block
from pallas_kernels.instructions import opaque
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.tiles import (
    batch_index,
    both,
    columns,
    iota,
    load,
    load_features,
    load_parts,
    padded,
    repeated_iota,
    stored,
)
from pallas_kernels.tokens import Keys, Rows, load_keys, retiring

# exp(-1000) is 0 in every dtype: a floor that no result can show and that keeps sums finite.
_LOWEST_LOG_DECAY = -1000.0


def tile_size(spec: Spec, block: Block) -> int:
    """Slots per tile: no more than there are."""
    return min(block.slots, padded(spec.num_slots))


def tile_count(spec: Spec, block: Block) -> int:
    return -(-spec.num_slots // tile_size(spec, block))


def load_retiring_keys(spec: Spec, x: Operands, b, keys: Keys, g):
    """Keys that enter the slots, unrotated, in parts."""
    ref = x.k if x.slot_k is None else x.slot_k
    return load_parts(spec, ref, b, keys.at, g, keys.valid)


def load_in_turn(spec: Spec, x: Operands, b, keys: Keys, g, reload: bool) -> Callable:
    """From the turn i of a loop over heads to keys in parts and values [C,V] of a chunk.

    They are loaded once, or with `reload` in every turn.
    """

    def load_all(keys: Keys):
        k = load_retiring_keys(spec, x, b, keys, g)
        return k, load_features(x.v, b, keys.at, g, spec.value_size, keys.valid)

    if reload:
        return lambda i: load_all(keys._replace(at=opaque(keys.at, i, spec)))
    kept = load_all(keys)
    return lambda i: kept


class ChunkView(NamedTuple):
    """One chunk of keys beside the rows at which they retire."""

    keys: Keys
    # [C] rows (of each head) read through the slots the chunk's keys from `begin` to `own`; None:
    # from the first one. Those among them that do not retire write nothing.
    begin: jax.Array | None
    own: jax.Array
    state: jax.Array  # [] the chunk, as an index into the states
    # [C,1] rows that also read what retired before the chunk; None: all, or they read zeros.
    has_state: jax.Array | None
    # [C,1] rows whose slots take part in the softmax; [1,1] where that is all of them or none.
    readable: jax.Array

    @property
    def pairs(self) -> jax.Array:
        """Which rows read which keys through the slots, [C,C]."""
        key = iota(self.keys.key.shape[0])[None, :]
        begun = None if self.begin is None else key >= self.begin[:, None]
        return both(begun, key <= self.own[:, None])

    @property
    def readers(self) -> jax.Array:
        """The same, transposed, of one head."""
        key = iota(self.keys.key.shape[0])[:, None]
        begun = None if self.begin is None else key >= self.begin[None, :]
        return both(begun, key <= self.own[None, :])

    def in_turn(self, i, spec: Spec) -> "ChunkView":
        """The same in turn i of a loop over a group's heads: masks are compared anew."""
        if spec.group == 1:
            return self
        begin = None if self.begin is None else opaque(self.begin, i, spec)
        return self._replace(begin=begin, own=opaque(self.own, i, spec))


def chunk_view(spec: Spec, x: Operands, b, c, chunk: int, rows: Rows) -> ChunkView:
    """Chunk c, which may lie before the first one: then nothing has retired."""
    first = spec.origin + c * chunk
    keys = load_keys(spec, x, b, first + iota(chunk))
    own = repeated_iota(chunk, rows.row.shape[0] // chunk)
    state = jnp.clip(c, 0, spec.chunks(chunk))
    if not spec.tables:
        # The first key to retire makes chunk 0.
        readable = jnp.broadcast_to(spec.sink | (c >= 0), (1, 1))
        return ChunkView(keys, None, own, state, None, readable)
    assert rows.start is not None and rows.readable is not None
    begin = jnp.where(rows.valid, rows.start - first, chunk)
    has_state = rows.valid & (rows.start < first)
    readable = rows.valid & rows.readable
    return ChunkView(keys, begin, own, state, has_state[:, None], readable[:, None])


def readable_slots(spec: Spec, view: ChunkView, first, tile: int) -> jax.Array:
    """Which rows may read which slots of a tile, [C|1,1|tile]."""
    if spec.num_slots % tile == 0:
        return view.readable
    return view.readable & (first + iota(tile) < spec.num_slots)[None, :]


def _slots_at(spec: Spec, at: tuple, first, tile: int, size: int, part: int):
    cols, mask = columns(size)
    slots = first + iota(tile)[:, None]
    slot_mask = None if spec.num_slots % tile == 0 else slots < spec.num_slots
    return (*at, slots, part * size + cols), both(slot_mask, mask)


def load_slots(spec: Spec, ref, at: tuple, first, tile: int, size: int, part: int = 0) -> jax.Array:
    """A tile of slots of [...,M,.], `at` its leading axes: [tile, padded size]."""
    index, mask = _slots_at(spec, at, first, tile, size, part)
    return load(ref, *index, mask=mask)


def store_slots(spec: Spec, ref, at: tuple, first, size: int, value, part: int = 0) -> None:
    """Writes what `load_slots` reads."""
    index, mask = _slots_at(spec, at, first, value.shape[0], size, part)
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def load_slot_parts(spec: Spec, ref, at: tuple, first, tile: int) -> tuple[jax.Array, ...]:
    """Keys of the slots, in parts as queries are."""
    return tuple(
        load_slots(spec, ref, at, first, tile, spec.part_size, part) for part in range(spec.parts)
    )


def load_per_slot(spec: Spec, ref, b, keys: Keys, g, first, tile: int) -> jax.Array:
    """A tile [C,tile] of [B,S,G,M] for keys that retire, 0 for others."""
    slots = first + iota(tile)[None, :]
    mask = retiring(spec, keys)[:, None]
    if spec.num_slots % tile:
        mask &= slots < spec.num_slots
    return load(ref, b, keys.at[:, None], g, slots, mask=mask).astype(spec.wide)


def load_log_decay(spec: Spec, x: Operands, b, keys: Keys, g, first, tile: int) -> jax.Array:
    """Log decays [C,tile] of keys that retire, 0 for others: they write and forget nothing."""
    g_CM = load_per_slot(spec, x.log_decay, b, keys, g, first, tile)
    # Not a maximum, which would make a number of NaN on GPUs.
    return jnp.where(g_CM < _LOWEST_LOG_DECAY, _LOWEST_LOG_DECAY, g_CM)


def store_per_slot(spec: Spec, ref, b, keys: Keys, g, first, value: jax.Array) -> None:
    """Writes a tile of [B,S,G,M] for keys that exist."""
    assert keys.exist is not None
    slots = first + iota(value.shape[1])[None, :]
    mask = keys.exist[:, None] & (slots < spec.num_slots)
    at = stored(ref, keys.at, keys.exist)[:, None]
    plgpu.store(ref.at[b, at, g, slots], value.astype(ref.dtype), mask=mask)


def load_total(spec: Spec, states, b, c, g, first, tile: int) -> jax.Array:
    """The sum of a chunk's log decays [tile]; another chunk's if there is no chunk c."""
    slots = first + iota(tile)
    c = jnp.clip(c, 0, states.totals.shape[1] - 1)
    return load(states.totals, b, c, g, slots, mask=slots < spec.num_slots)


class SlotTile(NamedTuple):
    """What a chunk's program reads of a tile of slots."""

    log_decay: jax.Array  # [C,tile] of keys that retire
    k: tuple  # in parts [tile,K] the state at the chunk's start
    v: jax.Array  # [tile,V]


def load_tile(spec: Spec, x: Operands, states, b, g, view: ChunkView, first, tile: int) -> SlotTile:
    """Side by side: loads keep their order, and wait for a product that stands between them."""
    log_decay = load_log_decay(spec, x, b, view.keys, g, first, tile)
    return SlotTile(log_decay, *load_states(spec, states, (b, view.state, g), first, tile))


def load_states(spec: Spec, states, at: tuple, first, tile: int) -> tuple:
    """Keys, in parts, and values of a tile of slots."""
    k = load_slot_parts(spec, states.k, at, first, tile)
    return k, load_slots(spec, states.v, at, first, tile, spec.value_size)


def final_holds(spec: Spec, x: Operands, b):
    """Whether a key of the last row's document retired, or its document began before this call."""
    if not spec.tables:
        return True  # else the slots are still zero
    bounds = batch_index(x.bounds, b)
    last = load(x.bounds, bounds, 1) - 1
    start = load(x.start, batch_index(x.start, b), jnp.maximum(last, 0))
    return start <= last + spec.past - spec.lag
