"""How a decode program, for one batch row b and key/value head g, loads scalars and vectors.

Suffixes give shapes: K, V padded key and value sizes; M, S tiles of slots and of ring rows. Query
heads are scored in *groups*: some heads padded to H rows by matrix products (products="dot"), or
one head at a time by multiplying and reducing (products="sum": the same arrays without H).
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_blocks import DecodeBlocks, DecodeSpec, power_of_two


class Program(NamedTuple):
    """Where a program is, and the scalars of its batch row."""

    refs: SimpleNamespace  # by name; arrays updated in place: their output refs, read and written
    spec: DecodeSpec
    blocks: DecodeBlocks
    b: Any
    g: Any
    here: Any  # the token's position in the row,
    t: Any  # and in its document
    valid: Any  # not padding
    starts: Any  # the token starts a document
    retires: Any  # token t - lag retires into the slots
    empty: Any  # the slots are empty when the token reads them


def enter(refs, spec: DecodeSpec, blocks: DecodeBlocks, b, g) -> Program:
    """Reads the row's scalars. Without segment ids nothing starts and nothing is padding."""
    here, t = plgpu.load(place(refs.length, b)), plgpu.load(place(refs.segment_length, b))
    valid: Any = True
    starts: Any = False
    retires: Any = False
    empty: Any = True
    if spec.has_ids:
        token_id = plgpu.load(place(refs.token_ids, b, 0))
        valid, starts = token_id != 0, token_id != plgpu.load(place(refs.segment_id, b))
        t = jnp.where(starts, 0, t)
    if spec.updates_slots:
        retires = (t >= spec.slot_lag) & valid
    if spec.num_slots:
        empty = (starts | plgpu.load(place(refs.slots_empty, b))) & (True ^ retires)
    return Program(refs, spec, blocks, b, g, here, t, valid, starts, retires, empty)


def barrier(p: Program) -> None:
    """Ends the program's reads before its writes begin: its threads share rows."""
    if not p.spec.interpret:
        plgpu.debug_barrier()


# --- vectors and tiles ------------------------------------------------------------------------


def place(ref, *index):
    """ref.at[index], where no number and no slice's start is one that JAX can see.

    The first index has to be a program's own already.
    JAX 0.10 interprets no store at plain numbers (under x64 they are of another width), and no
    version takes a static slice that passes the end, which masks make harmless.
    """
    zero = index[0] * 0

    def hide(i):
        if isinstance(i, pl.Slice):
            return pl.ds(zero + i.start, i.size)
        return zero + i if isinstance(i, int) else i

    return ref.at[tuple(hide(i) for i in index)]


def load(ref, mask=None) -> jax.Array:
    """Zeros where the mask (None: everything) does not hold."""
    return plgpu.load(ref) if mask is None else plgpu.load(ref, mask=mask, other=0)


def both(a, b):
    """The conjunction of two masks, None and True standing for everything."""
    if a is None or a is True:
        return b
    return a if b is None or b is True else a & b


def below(size: int, index: jax.Array):
    """The mask of a padded index; None where nothing is padded."""
    return None if index.size == size else index < size


def tile_columns(p: Program, ref, size: int):
    """The columns of a tile, padded; 16-bit ones in pieces of 8 bytes where blocks say so.

    The compiler loads all tiles by the widest one's 8 elements per thread, but stores float32 by 4:
    slots would change layout through shared memory.
    """
    first = jnp.minimum(p.here, 0) * 4  # 0, of which the compiler knows only that 4 divides it
    narrow = p.blocks.narrow_loads and ref.dtype.itemsize == 2
    return pl.ds(first if narrow else 0, power_of_two(size))


def tile_mask(rows, size: int, shape: tuple[int, ...]):
    """The mask of a tile of vectors of `size` from that of its rows (None: all)."""
    inside = below(size, jnp.arange(shape[1], dtype=jnp.int32)[None, :])
    inside = None if inside is None else jnp.broadcast_to(inside, shape)
    return both(None if rows is None else jnp.broadcast_to(rows[:, None], shape), inside)


def vector(p: Program, ref, *lead, size: int, rope: bool = False, mask=None) -> jax.Array:
    """ref[*lead, :size], zeros up to a power of two; [H,·] where `lead` has an [H,1] index."""
    padded = power_of_two(size)
    column = jnp.arange(padded, dtype=jnp.int32)
    inside = below(size, column)
    if p.blocks.narrow_loads and ref.dtype.itemsize == 2:
        column = column + jnp.minimum(p.here, 0) * 4  # as in `tile_columns`
    if any(getattr(i, "ndim", 0) for i in lead):
        shape = (*[i.shape[0] for i in lead if getattr(i, "ndim", 0)], padded)
        lead = tuple(jnp.broadcast_to(i, shape) if getattr(i, "ndim", 0) else i for i in lead)
        inside = None if inside is None else jnp.broadcast_to(inside[None, :], shape)
        column = jnp.broadcast_to(column[None, :], shape)
    mask = both(inside, mask)
    x = load(place(ref, *lead, column), mask)
    if not (rope and p.spec.rope):
        return x
    # Half-split pairing: element i with element i + K/2.
    half, dtype = size // 2, p.spec.state_dtype
    first = column < half
    partner = load(place(ref, *lead, jnp.where(first, column + half, column - half)), mask)
    angle = jnp.where(first, column, column - half)
    cos, sin = (
        load(place(r, jnp.minimum(p.b, r.shape[0] - 1), 0, angle), mask).astype(dtype)
        for r in (p.refs.cos, p.refs.sin)
    )
    partner = jnp.where(first, -partner.astype(dtype), partner.astype(dtype))
    return (x.astype(dtype) * cos + partner * sin).astype(x.dtype)
