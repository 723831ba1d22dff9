"""The scan of the adjoint states, backwards over the chunks and in place."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import slot_tiles, tiles
from pallas_kernels.blocks import Block
from pallas_kernels.launch import launch
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.tiles import iota, load


class Adjoint(NamedTuple):
    """Gradients of `States.k` and `States.v`, and what else the contributions' kernel knows."""

    k: Any  # [B,c+1,G,M,K]; the last entries are the final slots' cotangents
    v: Any  # [B,c+1,G,M,V]
    decay: Any  # [B,c,G,M] wide: what remains of a chunk's first state at its end
    # [B,S,G,M] wide: gradient of the log decays through the rows of each key's own chunk; unwritten
    # for keys outside of the chunks
    gates: Any


class InitialGradients(NamedTuple):
    """Of the slots before the first row."""

    k: Any  # [B,G,M,K] wide
    v: Any  # [B,G,M,V]


def adjoint_scan(
    spec: Spec, count: int, block: Block, x: Operands, contributions: Adjoint, final: tuple | None
) -> tuple[Adjoint, InitialGradients]:
    """From the contributions of `count` chunks and the final slots' cotangents, if any."""
    batch, m, g = x.q.shape[0], spec.num_slots, spec.num_kv_heads
    shape = jax.ShapeDtypeStruct
    tile = slot_tiles.tile_size(spec, block)
    keys, values, *initial = launch(
        functools.partial(_kernel, spec, tile, count),
        name="nha_adjoint_scan",
        grid=(slot_tiles.tile_count(spec, block), 2 * g, batch),
        out_shape=(
            *(shape(y.shape, y.dtype) for y in contributions[:2]),
            *(shape((batch, g, m, size), spec.wide) for size in (spec.key_size, spec.value_size)),
        ),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        interpret=spec.interpret,
        input_output_aliases={0: 0, 1: 1},
    )(*contributions[:3], x, final)
    return contributions._replace(k=keys, v=values), InitialGradients(*initial)


def _kernel(spec, tile, count, ids, in_k, in_v, decays, x, final, out):
    """D_c = contribution_c + decay_c D_{c+1}, from the final slots' cotangents to the start."""
    out_k, out_v, first_k, first_v = out
    index, part, b = ids
    first, g, is_value = index * tile, part // 2, part % 2
    slot = first + iota(tile)

    def run(contributions, out, initial, final, size):
        def get(ref, *at):
            return slot_tiles.load_slots(spec, ref, at, first, tile, size).astype(spec.wide)

        def put(ref, value, *at):
            slot_tiles.store_slots(spec, ref, at, first, size, value)

        state = jnp.zeros((tile, tiles.padded(size)), spec.wide)
        if final is not None:
            state = jnp.where(slot_tiles.final_holds(spec, x, b), get(final, b, g), 0)
        put(out, state, b, count, g)

        def step(i, state):
            c = count - 1 - i
            decay = load(decays, b, c, g, slot, mask=slot < spec.num_slots)
            state = get(contributions, b, c, g) + decay[:, None] * state
            put(out, state, b, c, g)
            return state

        state = jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), step, state)
        put(initial, state, b, g)

    final_k, final_v = (None, None) if final is None else final

    @pl.when(is_value == 0)
    def _():
        run(in_k, out_k, first_k, final_k, spec.key_size)

    @pl.when(is_value == 1)
    def _():
        run(in_v, out_v, first_v, final_v, spec.value_size)
