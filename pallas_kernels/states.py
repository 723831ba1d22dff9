"""The slots' recurrence: the state at each chunk's start.

The sequence is cut into splits that run side by side. The first launch walks each split from zero
and keeps only its end and its decay; the second starts each split from all splits before it. With
one split only the second launch is needed. Forward pass of `docs/operator.md`, "Slots".
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import slot_tiles, tiles, tokens
from pallas_kernels.blocks import ForwardBlocks, device_at_hand, enough_splits
from pallas_kernels.gates import exact_to_end, write_strength
from pallas_kernels.launch import launch
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.tiles import dot, iota, load


class Summaries(NamedTuple):
    """Of each split but the last one, as if it began with empty slots."""

    end_k: Any  # [B,splits-1,G,M,K] wide
    end_v: Any  # [B,splits-1,G,M,V]
    decay: Any  # [B,splits-1,G,M] what remains of the slots before it


class States(NamedTuple):
    """Slots at each chunk's start and, as the last entry, after the last chunk."""

    k: Any  # [B,c+1,G,M,K] in the call's dtype
    v: Any  # [B,c+1,G,M,V]
    final_k: Any  # [B,G,M,K] wide, after the last row
    final_v: Any  # [B,G,M,V]
    totals: Any  # [B,c,G,M] wide: each chunk's sum of log decays


def chunk_states(spec: Spec, blocks: ForwardBlocks, x: Operands) -> States:
    """Runs the recurrence over all chunks."""
    batch, count = x.q.shape[0], spec.chunks(blocks.chunk)
    splits = blocks.splits
    if splits is None:
        splits = enough_splits(spec, batch, blocks, device_at_hand().multiprocessors)
    splits = min(splits, count)
    m, g = spec.num_slots, spec.num_kv_heads

    def shapes(*lead, dtype):
        return tuple(
            jax.ShapeDtypeStruct((batch, *lead, g, m, size), dtype)
            for size in (spec.key_size, spec.value_size)
        )

    tile = slot_tiles.tile_size(spec, blocks.states)
    count_tiles = slot_tiles.tile_count(spec, blocks.states)
    run = functools.partial(
        launch,
        num_warps=blocks.states.num_warps,
        num_stages=blocks.states.num_stages,
        interpret=spec.interpret,
    )
    body = functools.partial(_kernel, spec, blocks.chunk, tile, count, splits)
    before = None
    if splits > 1:
        decay = jax.ShapeDtypeStruct((batch, splits - 1, g, m), spec.wide)
        before = run(
            functools.partial(body, True),
            name="nha_split_summaries",
            grid=(count_tiles, splits - 1, batch * g),  # nothing asks for the last one's
            out_shape=Summaries._make((*shapes(splits - 1, dtype=spec.wide), decay)),
        )(x, None)
    return run(
        functools.partial(body, False),
        name="nha_chunk_states",
        grid=(count_tiles, splits, batch * g),
        out_shape=States._make(
            (
                *shapes(count + 1, dtype=spec.dtype),
                *shapes(dtype=spec.wide),
                jax.ShapeDtypeStruct((batch, count, g, m), spec.wide),
            )
        ),
    )(x, before)


def _kernel(spec, chunk, tile, count, splits, summarize, ids, x: Operands, before, out):
    index, split, head = ids
    first_slot = index * tile
    b, g = head // spec.num_kv_heads, head % spec.num_kv_heads
    per_split = -(-count // splits)
    slot = first_slot + iota(tile)
    refs, sizes = (0, 1), (spec.key_size, spec.value_size)

    def get(ref, *lead, size):
        return slot_tiles.load_slots(spec, ref, (*lead, g), first_slot, tile, size)

    def put(ref, value, *lead, size):
        slot_tiles.store_slots(spec, ref, (*lead, g), first_slot, size, value)

    if summarize or x.slots_k is None:
        state = tuple(jnp.zeros((tile, tiles.padded(size)), spec.wide) for size in sizes)
    else:
        initial = (x.slots_k, x.slots_v)
        state = tuple(get(initial[i], b, size=sizes[i]).astype(spec.wide) for i in refs)
    kept = jnp.ones((tile,), spec.wide)
    if before is not None:

        def add_split(s, state):
            decay = load(before.decay, b, s, g, slot, mask=slot < spec.num_slots)[:, None]
            return tuple(decay * state[i] + get(before[i], b, s, size=sizes[i]) for i in refs)

        state = jax.lax.fori_loop(jnp.int32(0), split, add_split, state)

    def keys_of(c):
        return spec.origin + c * chunk + iota(chunk)

    def places_of(c):
        return None if not tokens.has_places(x) else tokens.key_places(spec, x, b, keys_of(c))

    def step(c, carry):
        places, state, kept = carry
        if not summarize:
            for i in refs:
                put(out[i], state[i], b, c, size=sizes[i])
        first = spec.origin + c * chunk
        index = keys_of(c)
        here = tokens.key_places(spec, x, b, index) if places is None else places
        keys = tokens.keys_at(spec, index, here, bounds)
        if spec.tables:  # others enter no slot, and one mask serves all loads
            keys = keys._replace(valid=tokens.retiring(spec, keys))
        places = places_of(c + 1)  # so that the next step need not wait for them
        start = tokens.key_start(spec, x, b, first + chunk - 1)
        g_CM = slot_tiles.load_log_decay(spec, x, b, keys, g, first_slot, tile)
        write_CM = write_strength(g_CM, spec) * exact_to_end(g_CM, spec)
        total_M = jnp.sum(g_CM, axis=0)
        decay_M = jnp.exp(total_M)
        if start is not None:
            write_CM = jnp.where((keys.key >= start)[:, None], write_CM, 0)
            decay_M = jnp.where(start < first, decay_M, 0)
        if not summarize:
            plgpu.store(out.totals.at[b, c, g, slot], total_M, mask=slot < spec.num_slots)
        slot_k = x.k if x.slot_k is None else x.slot_k
        written = (
            tiles.load_features(ref, b, keys.at, g, size, keys.valid)
            for ref, size in ((slot_k, spec.key_size), (x.v, spec.value_size))
        )
        state = tuple(
            decay_M[:, None] * h + dot(write_CM, y, spec, "a")
            for h, y in zip(state, written, strict=True)
        )
        return places, state, kept * decay_M

    bounds = tokens.load_bounds(spec, x, b)
    begin = split * per_split
    end = jnp.minimum(begin + per_split, count)
    carry = jax.lax.fori_loop(begin, end, step, (places_of(begin), state, kept))
    state, kept = carry[1:]

    if summarize:
        for i in refs:
            put(out[i], state[i], b, split, size=sizes[i])
        plgpu.store(out.decay.at[b, split, g, slot], kept, mask=slot < spec.num_slots)
        return

    @pl.when(split == splits - 1)
    def _():
        keeps = slot_tiles.final_holds(spec, x, b)
        for i in refs:
            put(out[i], state[i], b, count, size=sizes[i])
            put(out[i + 2], jnp.where(keeps, state[i], 0), b, size=sizes[i])
