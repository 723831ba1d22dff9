"""The walk over the blocks of keys that a block of rows reads through the window."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.spec import Operands, Spec
from pallas_kernels.tiles import batch_index, iota, load
from pallas_kernels.tokens import Keys, Rows, has_places, key_places, keys_at, load_bounds

# From so many blocks in a window on, those that need no mask are worth a loop of their own.
_MANY_BLOCKS = 4


def _window_walk(spec: Spec, x: Operands, b, rows: Rows, block: int, size: int):
    """The walk over key blocks of `size` that a block of rows may read: (from, to, first key).

    Blocks end with the rows' own. Those before the first row's document are not visited where the
    window has many.
    """
    count = -(-(block + min(spec.window, spec.keys) - 1) // size)
    row = jnp.min(rows.row)
    first = row + spec.past + block - count * size
    row = jnp.clip(row, 0, spec.rows - 1)
    # No later row reaches further back than the first. A narrow window is not worth the wait for
    # the table.
    if spec.tables and is_long(spec, size):
        lowest = row + spec.past - load(x.reach, batch_index(x.reach, b), row)
    else:
        lowest = row + spec.past - spec.window + 1
    begin = jnp.maximum(lowest - first, 0) // size
    return jnp.minimum(begin, count), jnp.int32(count), first


def is_long(spec: Spec, size: int) -> bool:
    """Whether blocks of keys and rows without masks are worth a loop of their own."""
    return spec.window >= _MANY_BLOCKS * size


def _interior(spec: Spec, rows: Rows, size: int, first):
    """The steps of `Walk` whose keys every row reads: (from, to), maybe empty."""
    lowest = jnp.max(rows.row - rows.reach) + spec.past  # behind all of them if one is padding
    highest = jnp.min(rows.row) + spec.past
    begin = jnp.maximum(-((first - lowest) // size), 0)
    return begin, jnp.maximum((highest + 1 - first) // size, begin)


class Walk(NamedTuple):
    """The walk over key blocks of `size` that a block of rows may read."""

    size: int
    begin: jax.Array
    end: jax.Array
    first: jax.Array  # key of step 0
    places: jax.Array | None  # `key_places` of the step at `begin`; None: found at the step


def begin_walk(spec: Spec, x: Operands, b, rows: Rows, block: int, size: int) -> Walk:
    begin, count, first = _window_walk(spec, x, b, rows, block, size)
    places = None
    if has_places(x):
        places = key_places(spec, x, b, first + begin * size + iota(size))
    return Walk(size, begin, count, first, places)


def walk(spec: Spec, x: Operands, b, rows: Rows, over: Walk, step, carry):
    """`step(masked, keys, carry)` for the blocks of keys that a block of rows may read."""

    def at(masked, j, carry):
        places, carry = carry
        index = over.first + j * over.size + iota(over.size)
        # Those of the next step, so that it need not wait for them.
        after = None if places is None else key_places(spec, x, b, index + over.size)
        here = key_places(spec, x, b, index) if places is None else places
        keys = keys_at(spec, index, here, bounds) if masked else Keys(here, index, None, None)
        return after, step(masked, keys, carry)

    bounds = load_bounds(spec, x, b)
    masked = functools.partial(at, True)
    both = over.places, carry
    if not is_long(spec, over.size):
        return jax.lax.fori_loop(over.begin, over.end, masked, both)[1]
    steps = _interior(spec, rows, over.size, over.first)
    inner, outer = (jnp.maximum(j, over.begin) for j in steps)
    both = jax.lax.fori_loop(over.begin, inner, masked, both)
    both = jax.lax.fori_loop(inner, outer, functools.partial(at, False), both)
    return jax.lax.fori_loop(outer, over.end, masked, both)[1]
