"""The parts of a decode step besides the slots: the token, ring rows, writing the rings.

Every element that a program writes is used by that program alone, or not at all. Inside a program
a barrier separates reads from writes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_load import (
    Program,
    barrier,
    below,
    both,
    load,
    place,
    tile_columns,
    tile_mask,
)
from pallas_kernels.decode_softmax import State, attend, attend_token
from pallas_kernels.decode_token import Token

States = list[State]
# What to load, and what to do with it once loaded.
Item = tuple[Callable[[], Any], Callable[[Any, States], States]]
# Longer loops are not unrolled: compile time.
_UNROLLED = 4


def run(items: list[Item], states: States, ahead: int) -> States:
    """Each item in turn, its loads issued `ahead` items before their use."""
    loaded = [fetch() for fetch, _ in items[:ahead]]
    for i, (_, use) in enumerate(items):
        if i + ahead < len(items):
            loaded.append(items[i + ahead][0]())
        states = use(loaded[i], states)
    return states


def count_tiles(rows, size: int):
    """How many tiles of `size` hold `rows`, at least 0; traced rows are int32, under x64 too."""
    if isinstance(rows, int):
        return pl.cdiv(rows, size)
    return jax.lax.div(jnp.maximum(rows, 0) + (size - 1), jnp.int32(size))


def tile_items(count, fetch: Callable, use: Callable) -> list[Item]:
    """Items for tiles 0 ... count - 1: one each, or a loop where there are many."""
    if isinstance(count, int) and count <= _UNROLLED:
        return [(partial(fetch, i), partial(use, i)) for i in range(count)]

    def loop(_, states):
        return jax.lax.fori_loop(
            jnp.int32(0), jnp.int32(count), lambda i, s: use(i, fetch(i), s), states
        )

    return [(lambda: None, loop)]


def token_items(p: Program, token: Token) -> list[Item]:
    """The token reads itself: its ring row is written last, by one program."""
    if not p.spec.window:
        return []

    def use(_, states):
        groups = zip(states, token.rotated(0), strict=True)
        return [attend_token(p, s, q, token.k, token.v) for s, q in groups]

    return [(lambda: None, use)]


def used_rows(p: Program, exact: bool = False):
    """How many ring rows hold tokens. Of a few tiles all are read: a static count is unrolled."""
    if not exact and p.spec.capacity <= _UNROLLED * p.blocks.window:
        return p.spec.capacity
    used = jnp.minimum(p.here + 1, p.spec.capacity)
    return jnp.where(p.valid, used, 0) if p.spec.has_ids else used


def window_items(p: Program, rotated: Callable, first, last) -> list[Item]:
    """Ring rows [first, last) without the token's own; `rotated` as in `Token`."""
    spec, rows = p.spec, p.blocks.window
    if not spec.window:
        return []
    # A static number of rows is loaded whole, whatever the row's scalars say: those are still on
    # their way.
    whole = isinstance(last, int)
    at = jax.lax.rem(p.here, jnp.int32(spec.capacity))

    def ring_rows(i):
        return first + i * rows + jnp.arange(rows, dtype=jnp.int32)

    def read(i):
        s = ring_rows(i)
        age = jnp.where(s <= at, at - s, at - s + spec.capacity)  # (here - s) modulo capacity
        return (s < spec.capacity) & (age > 0) & (age < spec.window) & (age <= p.t)

    def fetch(i):
        tiles = []
        mask = below(spec.capacity, ring_rows(i)) if spec.capacity % rows else None
        mask = mask if whole else read(i)
        for ref, size in ((p.refs.window_k, spec.key_size), (p.refs.window_v, spec.value_size)):
            row = place(ref, p.b, pl.ds(first + i * rows, rows), p.g, tile_columns(p, ref, size))
            tiles.append(load(row, tile_mask(mask, size, row.shape)))
        return tiles

    def use(i, tiles, states):
        k, v = tiles
        if whole:  # what is not read may be anything, and no weight makes up for that
            v = jnp.where(jnp.broadcast_to(read(i)[:, None], v.shape), v, 0)
        return [attend(p, s, q, k, v, read(i)) for s, q in zip(states, rotated(i), strict=True)]

    return tile_items(count_tiles(last - first, rows), fetch, use)


def write_rings(p: Program, token: Token) -> None:
    """The token enters the window, and waits to retire."""
    spec, refs = p.spec, p.refs
    if not spec.capacity:
        return
    at = jax.lax.rem(p.here, jnp.int32(spec.capacity))
    writes: list[Any] = [
        (refs.window_k, at, token.k, spec.key_size),
        (refs.window_v, at, token.v, spec.value_size),
    ]
    if spec.pending:
        at = jax.lax.rem(p.here, jnp.int32(spec.pending))
        writes.append((refs.pending_k, at, token.pending_k, spec.key_size))
        writes.append((refs.pending_log_decay, at, token.log_decay, spec.num_slots))
    barrier(p)  # the token that retires may lie in the very row that is written
    for ref, at, x, size in writes:
        mask = below(size, jnp.arange(x.shape[0], dtype=jnp.int32))
        if spec.has_ids:
            mask = both(mask, jnp.broadcast_to(p.valid, x.shape))
        plgpu.store(place(ref, p.b, at, p.g, pl.ds(0, x.shape[0])), x.astype(ref.dtype), mask=mask)
