"""What the kernels' bodies share: loading tiles, products, pairs of rows and keys.

Values cannot be sliced in this lowering, so everything is cut when it is loaded; sizes are padded
to powers of two and masked. Names carry shapes: C rows or keys of a chunk, M slots, K and V sizes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.instructions import fma, opaque
from pallas_kernels.spec import BEFORE, Offset, Operands, Spec

# The hardware's exponential has base 2: scores and log-sum-exps of the kernels are in this unit.
LOG2_E = 1 / math.log(2)


def padded(size: int) -> int:
    """The tile size for an axis: a power of two, and at least 16 for the matrix units."""
    return max(16, 1 << (size - 1).bit_length())


def iota(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


def repeated_iota(size: int, times: int) -> jax.Array:
    return iota(size) if times == 1 else iota(size * times) % size


def repeated(x: jax.Array, times: int) -> jax.Array:
    """The rows of x [C,P], `times` times: [times * C, P]."""
    if times == 1:
        return x
    return jnp.broadcast_to(x[None], (times, *x.shape)).reshape(times * x.shape[0], x.shape[1])


def load(ref, *index, mask=None, other=0):
    """A tile of a ref, `other` where masked; index arrays broadcast against each other."""
    # Interpretation fails on Python integers beside arrays.
    index = tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else other)


def dot(a: jax.Array, b: jax.Array, spec: Spec, transpose: str = "") -> jax.Array:
    """a @ b with operands in the call's dtype, accumulated wide; `transpose` names a, b or both.

    float32 is multiplied as float32, never as TF32. Operands that a float16 call computes may leave
    float16's range, so they are multiplied as TF32, which has float16's precision.
    """
    contract = ((0 if "a" in transpose else 1,), (1 if "b" in transpose else 0,))
    dtype, precision = spec.dtype, jax.lax.Precision.HIGHEST
    if dtype == jnp.float16 and not a.dtype == b.dtype == dtype:
        dtype, precision = jnp.float32, jax.lax.Precision.DEFAULT
    elif dtype in (jnp.float16, jnp.bfloat16):
        precision = jax.lax.Precision.DEFAULT
    a, b = a.astype(dtype), b.astype(dtype)
    if spec.interpret and dtype != spec.wide:
        # Products of narrow operands are exact in float32, and XLA's CPU backend lacks some.
        a, b = a.astype(spec.wide), b.astype(spec.wide)
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=spec.wide
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
        """Rows to load where those that do not exist may be any; None: all."""
        return None if self.start is None else self.valid

    def in_turn(self, i, spec: Spec) -> "Rows":
        """The same in turn i of a loop over a group's heads: addresses are computed anew."""
        if spec.group == 1:
            return self
        at, per_row = (opaque(y, i, spec) for y in (self.at, self.per_row))
        return self._replace(at=at, per_row=per_row)


def batch_index(ref, b):
    """The index on an axis [1|B]."""
    return b if ref.shape[0] > 1 else 0


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


def _across(head):
    """A head, or one of each row, as an index into [C,P]."""
    return head if jnp.ndim(head) == 0 else head[:, None]


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


def columns(size: int):
    """Indices [1,P] of a padded axis, and their mask; None where nothing is padded."""
    cols = iota(padded(size))[None, :]
    return cols, None if padded(size) == size else cols < size


def both(*masks):
    """The conjunction of masks, some of which may be None."""
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    result = present[0]
    for mask in present[1:]:
        result = result & mask
    return result


def load_features(ref, b, at, head, size: int, valid, part: int = 0) -> jax.Array:
    """Rows of [B,T,H,.]: features [part * size, (part + 1) * size) of their head, [C,padded]."""
    cols, mask = columns(size)
    valid = None if valid is None else valid[:, None]
    return load(ref, b, at[:, None], _across(head), part * size + cols, mask=both(valid, mask))


def load_parts(spec: Spec, ref, b, at, head, valid) -> tuple[jax.Array, ...]:
    """Queries or keys in one part, or in two halves where they are to be rotated."""
    return tuple(
        load_features(ref, b, at, head, spec.part_size, valid, part) for part in range(spec.parts)
    )


def store_features(ref, b, at, head, size: int, valid, value, part: int = 0) -> None:
    cols, mask = columns(size)
    plgpu.store(
        ref.at[b, stored(ref, at, valid)[:, None], _across(head), part * size + cols],
        value.astype(ref.dtype),
        mask=both(valid[:, None], mask),
    )


def stored(ref, at, valid) -> jax.Array:
    """Places [C] of a masked store, behind the end where an interpreted one harms nothing."""
    return jnp.where(valid, at, ref.shape[1])


def load_rotation(spec: Spec, table, b, index, valid):
    """Cosines and sines [C,K/2] of rows or keys; None without rotation."""
    if not spec.rope:
        return None
    cols, mask = columns(spec.part_size)
    mask = both(None if valid is None else valid[:, None], mask)
    at = batch_index(table, b), index[:, None]
    return tuple(
        load(table, *at, part * spec.part_size + cols, mask=mask).astype(spec.wide)
        for part in range(2)
    )


def rotated(spec: Spec, parts, rotation, inverse: bool = False):
    """Half-split rotation of two halves, rounded to the call's dtype unless it is the inverse."""
    if rotation is None:
        return parts
    cos, sin = rotation
    first, second = (part.astype(spec.wide) for part in parts)
    if inverse:
        sin = -sin
    turned = fma(first, cos, -(second * sin), spec), fma(second, cos, first * sin, spec)
    if inverse:
        return turned
    return tuple(part.astype(spec.dtype) for part in turned)


def key_rotation(spec: Spec, x: Operands, b, keys: Keys):
    """Tables of the window's keys: those of the rows unless keys of a cache stand before."""
    table = x.rotation if x.key_rotation is None else x.key_rotation
    # Tables belong to the tokens' own places, as q, k and v do.
    return load_rotation(spec, table, b, keys.at, keys.valid)


def load_window_keys(spec: Spec, x: Operands, b, keys: Keys, g):
    """Keys of the window as they are scored, in parts."""
    parts = load_parts(spec, x.k, b, keys.at, g, keys.valid)
    return rotated(spec, parts, key_rotation(spec, x, b, keys))


def dot_parts(a, b, spec: Spec, transpose: str = "") -> jax.Array:
    """Sum of the products of two lists of parts: scores of queries and keys."""
    total = dot(a[0], b[0], spec, transpose)
    for first, second in zip(a[1:], b[1:], strict=True):
        total += dot(first, second, spec, transpose)
    return total


def in_window(spec: Spec, rows: Rows, keys: Keys, transpose: bool = False) -> jax.Array:
    """Which rows read which keys through the window: [rows, keys], or [keys, rows]."""
    down, across = (slice(None), None), (None, slice(None))
    of_rows, of_keys = (across, down) if transpose else (down, across)
    distance = rows.row[of_rows] + spec.past - keys.key[of_keys]
    return (distance >= 0) & (distance <= rows.reach[of_rows])


def loop(count: int, body, carry):
    """`fori_loop` whose index is int32 under 64-bit types, too; a single turn is no loop at all."""
    if count == 1:
        return body(jnp.int32(0), carry)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, carry)


def where(mask, value):
    """The value where the mask holds, else 0; None holds everywhere."""
    return value if mask is None else jnp.where(mask, value, 0)
