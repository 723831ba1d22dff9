"""Rows and keys: which tokens a program reads, where they stand, and which rows read which keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.instructions import opaque
from pallas_kernels.spec import BEFORE, Offset, Operands, Spec
from pallas_kernels.tiles import (
    batch_index,
    both,
    iota,
    load,
    load_parts,
    load_rotation,
    repeated_iota,
    rotated,
)


class Rows(NamedTuple):
    """A block of rows; for several heads, the same rows once for each, one head after another."""

    at: jax.Array  # [C] their places in q and out; another row's where they do not exist
    row: jax.Array  # [C] r
    per_row: jax.Array  # [C] r; T where they do not exist
    exist: jax.Array  # [C] 0 <= r < T
    reach: jax.Array  # [C] -1 where there is no such row, or padding
    # With tables, else None; anything where there is no such row.
    start: jax.Array | None  # [C]
    readable: jax.Array | None  # [C] bool

    @property
    def valid(self) -> jax.Array:
        return self.reach >= 0

    @property
    def loaded(self) -> jax.Array | None:
        """Rows to load where those that do not exist may be any; None: all.

        They then are another row's, finite as its scores are, and harm nothing: their results are
        not stored, the window masks them, or their probabilities are 0 as their log-sum-exp is
        infinite.
        """
        return None if self.start is None else self.valid

    def in_turn(self, i, spec: Spec) -> "Rows":
        """The same in turn i of a loop over a group's heads: addresses are computed anew."""
        if spec.group == 1:
            return self
        at, per_row = (opaque(y, i, spec) for y in (self.at, self.per_row))
        return self._replace(at=at, per_row=per_row)


class RowTables(NamedTuple):
    """What stands in tables of a block of rows, [C] each."""

    place: jax.Array
    reach: jax.Array
    start: jax.Array
    readable: jax.Array


def row_tables(spec: Spec, x: Operands, b, first, size: int, heads: int = 1) -> RowTables | None:
    """Tables of the rows [first, first + size), None without; what is not read is not loaded."""
    if not spec.tables:
        return None
    index = jnp.clip(first + repeated_iota(size, heads), 0, spec.rows - 1)
    tables = (load(y, batch_index(y, b), index) for y in (x.reach, x.start, x.readable))
    return RowTables(_place(x, b, index), *tables)


def load_rows(spec: Spec, x: Operands, b, first, size: int, heads: int = 1) -> Rows:
    """The rows [first, first + size), some of which may not exist, for each of some heads.

    Loads keep their order and a program waits where it first uses one, to find the address of
    another maybe: what stands in tables is best loaded side by side, before all else.
    """
    return rows_at(spec, x, first, size, row_tables(spec, x, b, first, size, heads), heads)


def rows_at(
    spec: Spec, x: Operands, first, size: int, tables: RowTables | None, heads: int = 1
) -> Rows:
    """As `load_rows`, from their `row_tables`."""
    index = first + repeated_iota(size, heads)
    inside = (index >= 0) & (index < spec.rows)
    if tables is None:
        place = _place(x, 0, jnp.clip(index, 0, spec.rows - 1))
        reach = jnp.minimum(index, max(spec.window, 1) - 1)
    else:
        place, reach = tables.place, tables.reach
    return Rows(
        at=place,
        row=index,
        per_row=jnp.where(inside, index, spec.rows),
        exist=inside,
        reach=jnp.where(inside, reach, -1),
        start=None if tables is None else tables.start,
        readable=None if tables is None else tables.readable > 0,
    )


def _place(x: Operands, b, index):
    """Where tokens stand."""
    if not has_places(x):
        return index if x.source is None else index + x.source.offset
    return load(x.source, batch_index(x.source, b), index)


def has_places(x: Operands) -> bool:
    """Whether a table says where tokens stand."""
    return x.source is not None and not isinstance(x.source, Offset)


def head_of_rows(first, size: int, heads: int):
    """The head of each row of `load_rows`, [C]; a scalar if there is one head."""
    return first if heads == 1 else first + iota(size * heads) // size


def load_per_row(ref, b, n, rows: Rows, other=0) -> jax.Array:
    """A value per row [C] of [B,N,T], `other` for rows that do not exist."""
    return load(ref, b, n, rows.per_row, mask=rows.exist, other=other)


def store_per_row(ref, b, n, rows: Rows, value: jax.Array) -> None:
    plgpu.store(ref.at[b, n, rows.per_row], value, mask=rows.exist)


class Keys(NamedTuple):
    """A block of keys."""

    at: jax.Array  # [C] places in k, v and log_decay; another key's where they do not exist
    key: jax.Array  # [C] j
    exist: jax.Array | None  # [C] 0 <= j < S; None: all
    # [C] and no padding; None: all, or any serve for those that do not exist, as nothing reads them
    valid: jax.Array | None
    # [] the first one that can enter the slots, and how many can; None without tables.
    retiring: tuple[jax.Array, jax.Array] | None = None


def load_keys(spec: Spec, x: Operands, b, index: jax.Array) -> Keys:
    """Keys by their indices, some of which may not exist."""
    return keys_at(spec, index, key_places(spec, x, b, index), load_bounds(spec, x, b))


def key_places(spec: Spec, x: Operands, b, index: jax.Array) -> jax.Array:
    """Where keys stand; where another does if they do not exist."""
    return _place(x, b, jnp.clip(index, 0, spec.keys - 1))


def load_bounds(spec: Spec, x: Operands, b) -> tuple[jax.Array, jax.Array] | None:
    """The first key that can retire, and how many rows are no padding; None without tables."""
    if not spec.tables:
        return None
    bounds = batch_index(x.bounds, b)
    return load(x.bounds, bounds, 0), load(x.bounds, bounds, 1)


def keys_at(spec: Spec, index: jax.Array, places: jax.Array, bounds) -> Keys:
    """As `load_keys`, from their `key_places` and `load_bounds`."""
    exist = (index >= 0) & (index < spec.keys)
    if bounds is None:
        return Keys(places, index, exist, None)
    first, count = bounds
    retire = first, jnp.maximum(count + spec.past - spec.lag - first, 0)
    return Keys(places, index, exist, exist & (index < spec.past + count), retire)


def retiring(spec: Spec, keys: Keys) -> jax.Array:
    """Which keys [C], of `load_keys`, enter the slots in this call."""
    if keys.retiring is None:
        return both(keys.exist, keys.key < spec.rows - spec.lag)
    first, count = keys.retiring
    # One comparison: what lies before the first one is a large number without its sign.
    return (keys.key - first).astype(jnp.uint32) < count.astype(jnp.uint32)


def key_start(spec: Spec, x: Operands, b, key):
    """At which key the document of a key began; BEFORE: before this call, None without tables."""
    if not spec.tables:
        return None
    row = jnp.clip(key - spec.past, 0, spec.rows - 1)
    start = load(x.start, batch_index(x.start, b), row)
    return jnp.where(key < spec.past, BEFORE, start)


def reaches_end(spec: Spec, x: Operands, b, keys: Keys, last):
    """Which keys' document goes on through the chunk's last key, [C,1]; None: all."""
    if not spec.tables:
        return None
    return (keys.key >= key_start(spec, x, b, last))[:, None]


def key_rotation(spec: Spec, x: Operands, b, keys: Keys):
    """Tables of the window's keys: those of the rows unless keys of a cache stand before."""
    table = x.rotation if x.key_rotation is None else x.key_rotation
    # Tables belong to the tokens' own places, as q, k and v do.
    return load_rotation(spec, table, b, keys.at, keys.valid)


def load_window_keys(spec: Spec, x: Operands, b, keys: Keys, g):
    """Keys of the window as they are scored, in parts."""
    parts = load_parts(spec, x.k, b, keys.at, g, keys.valid)
    return rotated(spec, parts, key_rotation(spec, x, b, keys))


def in_window(spec: Spec, rows: Rows, keys: Keys, transpose: bool = False) -> jax.Array:
    """Which rows read which keys through the window: [rows, keys], or [keys, rows]."""
    down, across = (slice(None), None), (None, slice(None))
    of_rows, of_keys = (across, down) if transpose else (down, across)
    distance = rows.row[of_rows] + spec.past - keys.key[of_keys]
    return (distance >= 0) & (distance <= rows.reach[of_rows])
