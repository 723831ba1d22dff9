"""The slots' part of a decode step: a token retires into them, then they are read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_load import (
    Program,
    barrier,
    both,
    load,
    place,
    tile_columns,
    tile_mask,
    vector,
)
from pallas_kernels.decode_parts import Item, count_tiles, tile_items
from pallas_kernels.decode_softmax import attend
from pallas_kernels.decode_token import Token


def slot_items(p: Program, token: Token) -> list[Item]:
    """Token t - lag retires; the slots are written back, and read."""
    spec, refs, rows = p.spec, p.refs, p.blocks.slots
    if not spec.num_slots:
        return []
    arrays = ((refs.slots_k, spec.key_size), (refs.slots_v, spec.value_size))
    leaving = _leaving(p)

    def inside(i):
        m = i * rows + jnp.arange(rows, dtype=jnp.int32)
        return None if spec.num_slots % rows == 0 else m < spec.num_slots

    def tile(i, ref, size):
        target = place(ref, p.b, p.g, pl.ds(i * rows, rows), tile_columns(p, ref, size))
        return target, tile_mask(inside(i), size, target.shape)

    def fetch(i):
        # Whatever the row's scalars say: those are still on their way.
        return [load(*tile(i, ref, size)) for ref, size in arrays]

    def use(i, tiles, states):
        if spec.has_ids:
            tiles = [jnp.where(p.starts, 0, x) for x in tiles]
        if leaving is not None:
            log_alpha = _log_alpha(p, i, inside(i))
            alpha, write = jnp.exp(log_alpha)[:, None], -jnp.expm1(log_alpha)[:, None]
            tiles = [
                jnp.where(p.retires, alpha * x + write * new[None, :], x)
                for x, new in zip(tiles, leaving, strict=True)
            ]
        if spec.has_ids or leaving is not None:
            barrier(p)
            changes = p.valid & (p.starts | p.retires)
            for (ref, size), x in zip(arrays, tiles, strict=True):
                target, mask = tile(i, ref, size)
                plgpu.store(target, x, mask=both(mask, jnp.broadcast_to(changes, x.shape)))
        if p.blocks.products == "dot":
            # Read as the tokens are: rounded to their dtype, once (the state itself is not).
            tiles = [x.astype(spec.dtype) for x in tiles]
        read = inside(i)
        if spec.mask_empty:
            read = both(read, jnp.broadcast_to(~p.empty, (rows,)))
        return [attend(p, s, q, *tiles, read) for s, q in zip(states, token.plain(i), strict=True)]

    return tile_items(count_tiles(spec.num_slots, rows), fetch, use)


def _leaving(p: Program) -> list[jax.Array] | None:
    """Key [K] and value [V] of the token that retires; zeros where none does."""
    spec, refs = p.spec, p.refs
    if not spec.updates_slots:
        return None
    if spec.slot_lag == 0:
        rows: Any = ((refs.k, 0, spec.key_size), (refs.v, 0, spec.value_size))
    else:
        at_pending = jax.lax.rem(p.here, jnp.int32(spec.pending))
        at_ring = jax.lax.rem(p.here + (spec.capacity - spec.slot_lag), jnp.int32(spec.capacity))
        rows = (
            (refs.pending_k, at_pending, spec.key_size),
            (refs.window_v, at_ring, spec.value_size),
        )
    return [
        vector(p, ref, p.b, at, p.g, size=size, mask=p.retires).astype(spec.state_dtype)
        for ref, at, size in rows
    ]


def _log_alpha(p: Program, i, inside) -> jax.Array:
    """Log decays [M] of the token that retires, for one tile of slots; zeros where none does."""
    spec, rows = p.spec, p.blocks.slots
    ref: Any = p.refs.log_decay
    at: Any = 0
    if spec.slot_lag:
        ref, at = p.refs.pending_log_decay, jax.lax.rem(p.here, jnp.int32(spec.pending))
    mask = both(inside, jnp.broadcast_to(p.retires, (rows,)))
    return load(place(ref, p.b, at, p.g, pl.ds(i * rows, rows)), mask).astype(spec.state_dtype)
