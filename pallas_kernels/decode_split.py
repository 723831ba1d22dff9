"""A decode step whose window is long: parts in parallel (flash-decoding), then a merge.

Part 0 of each (b, g) retires, reads slots and the token, and is the only one that writes the cache;
parts 1 ... `splits` read the ring's rows, except the one that part 0 is writing.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_blocks import DecodeBlocks, DecodeSpec, power_of_two
from pallas_kernels.decode_load import Program, below, enter, load, place, tile_mask
from pallas_kernels.decode_parts import (
    count_tiles,
    run,
    token_items,
    used_rows,
    window_items,
    write_rings,
)
from pallas_kernels.decode_slots import slot_items
from pallas_kernels.decode_softmax import State, empty_states, finite, slot_share, store_heads
from pallas_kernels.decode_token import load_token, queries_in_turn

# Parts whose values a merging program holds at once.
_MERGED = 16


def part_shapes(spec: DecodeSpec, blocks: DecodeBlocks) -> dict[str, jax.ShapeDtypeStruct]:
    """Of each part: the softmax's maximum, sum and values; of the slots: their share of part 0."""
    heads, parts, dtype = spec.kv_heads * spec.heads, blocks.splits + 1, spec.state_dtype
    shape = (spec.batch, heads, parts)
    return {
        "highest": jax.ShapeDtypeStruct(shape, dtype),
        "total": jax.ShapeDtypeStruct(shape, dtype),
        "values": jax.ShapeDtypeStruct((*shape, spec.value_size), dtype),
        "share": jax.ShapeDtypeStruct(shape[:2], dtype),
    }


def part_kernel(ids, refs: SimpleNamespace, spec: DecodeSpec, blocks: DecodeBlocks) -> None:
    """Grid (G, 1 + splits, B): neighbours read neighbouring heads of the same rows."""
    g, part, b = ids
    p = enter(refs, spec, blocks, b, g)

    @pl.when(part == 0)
    def _():
        token = load_token(p)
        after_slots = run(slot_items(p, token), empty_states(p), blocks.ahead)
        states = run(token_items(p, token), after_slots, blocks.ahead)
        write_rings(p, token)
        shares = [slot_share(*pair) for pair in zip(after_slots, states, strict=True)]
        store_heads(p, lambda n: place(refs.share, b, n), shares)
        _store_part(p, 0, states)

    @pl.when(part > 0)
    def _():
        # Equal shares of the rows that are in use, in whole tiles.
        used = used_rows(p, exact=True)
        share = count_tiles(count_tiles(used, blocks.splits), blocks.window) * blocks.window
        first = (part - 1) * share
        items = window_items(
            p, queries_in_turn(p, rope=True), first, jnp.minimum(first + share, used)
        )
        _store_part(p, part, run(items, empty_states(p), blocks.ahead))


def _store_part(p: Program, part, states: list[State]) -> None:
    refs = p.refs
    store_heads(p, lambda n: place(refs.highest, p.b, n, part), [s.highest for s in states])
    store_heads(p, lambda n: place(refs.total, p.b, n, part), [s.total for s in states])
    columns = pl.ds(0, p.spec.padded_value)
    store_heads(
        p,
        lambda n: place(refs.values, p.b, n, part, columns),
        [s.values for s in states],
        values=True,
    )


def merge_kernel(ids, refs: SimpleNamespace, spec: DecodeSpec, blocks: DecodeBlocks) -> None:
    """Grid (N, B): one softmax from the parts."""
    n, b = ids
    parts = blocks.splits + 1
    part = jnp.arange(power_of_two(parts), dtype=jnp.int32)
    inside = below(parts, part)
    at = (b, n, pl.ds(0, part.shape[0]))
    highest = load(place(refs.highest, *at), inside)
    total = load(place(refs.total, *at), inside)
    if inside is not None:
        highest = jnp.where(inside, highest, -jnp.inf)
    base = finite(highest.max())
    weight = 1 / (total * jnp.exp(highest - base)).sum()

    def add(i, values):
        p = i * _MERGED + jnp.arange(_MERGED, dtype=jnp.int32)
        some = None if parts % _MERGED == 0 else p < parts
        ref = place(refs.values, b, n, pl.ds(i * _MERGED, _MERGED), pl.ds(0, spec.padded_value))
        x = load(ref, tile_mask(some, spec.value_size, ref.shape))
        high = load(place(refs.highest, b, n, pl.ds(i * _MERGED, _MERGED)), some)
        scale = jnp.exp(high - base)
        scale = scale if some is None else jnp.where(some, scale, 0)
        return values + (scale[:, None] * x).sum(0)

    values = jnp.zeros((spec.padded_value,), spec.state_dtype)
    values = (
        jax.lax.fori_loop(jnp.int32(0), jnp.int32(pl.cdiv(parts, _MERGED)), add, values) * weight
    )
    mass = (
        jnp.exp(load(place(refs.highest, b, n, 0)) - base) * load(place(refs.share, b, n)) * weight
    )
    if spec.has_ids:
        valid = load(place(refs.token_ids, b, 0)) != 0
        values, mass = jnp.where(valid, values, 0), jnp.where(valid, mass, 0)
    columns = jnp.arange(spec.padded_value, dtype=jnp.int32)
    plgpu.store(
        place(refs.out, b, 0, n, pl.ds(0, spec.padded_value)),
        values.astype(spec.dtype),
        mask=below(spec.value_size, columns),
    )
    plgpu.store(place(refs.slot_mass, b, 0, n), mass)
