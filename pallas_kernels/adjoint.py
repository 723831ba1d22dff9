"""Adjoint states: the gradient of the slots at each chunk's start.

Every chunk's own contribution is computed side by side, then one scan goes backwards over the
chunks, in place. Both sum over a group's query heads.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gates as decays
from pallas_kernels import tiles
from pallas_kernels.blocks import Block
from pallas_kernels.launch import launch
from pallas_kernels.outputs import Outputs
from pallas_kernels.queries import Cotangents, QueryGradients
from pallas_kernels.rebuild import load_head, slot_gradients
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States, final_holds
from pallas_kernels.strong import mild_then_strong
from pallas_kernels.tiles import dot, iota, load


class Adjoint(NamedTuple):
    """Gradients of `States.k` and `States.v`: the last entries are the final slots' cotangents."""

    k: Any  # [B,c+1,G,M,K]
    v: Any  # [B,c+1,G,M,V]
    decay: Any  # [B,c,G,M] wide: what remains of a chunk's first state at its end


class InitialGradients(NamedTuple):
    k: Any  # [B,G,M,K] wide
    v: Any  # [B,G,M,V]


def adjoint_states(
    spec: Spec,
    chunk: int,
    block: Block,
    scan: Block,
    x: Operands,
    states: States,
    results: Outputs,
    cotangents: Cotangents,
    queries: QueryGradients,
    final: tuple | None,
) -> tuple[Adjoint, InitialGradients]:
    """Adjoint states, and the gradients of the slots before the first row."""
    batch, count = x.q.shape[0], spec.chunks(chunk)
    m, g = spec.num_slots, spec.num_kv_heads
    tile = min(block.slots, tiles.padded(m))
    shape = jax.ShapeDtypeStruct
    sizes = (spec.key_size, spec.value_size)
    adjoint = mild_then_strong(
        spec,
        functools.partial(_contributions, spec, chunk, tile, block.products),
        name="nha_adjoint_contributions",
        locate=lambda i, c, b: (b, i % g, c),
        chunk=chunk,
        limit=decays.BACKWARD_LIMIT,
        grid=(-(-m // tile) * g, count, batch),
        out_shape=Adjoint(
            shape((batch, count + 1, g, m, spec.key_size), spec.adjoint),
            shape((batch, count + 1, g, m, spec.value_size), spec.adjoint),
            shape((batch, count, g, m), spec.wide),
        ),
        block=block,
    )(x, states, results, cotangents, queries)

    tile = min(scan.slots, tiles.padded(m))
    keys, values, *initial = launch(
        functools.partial(_scan, spec, tile, count),
        name="nha_adjoint_scan",
        grid=(-(-m // tile), 2 * g, batch),
        out_shape=(
            *(shape(y.shape, y.dtype) for y in adjoint[:2]),
            *(shape((batch, g, m, size), spec.wide) for size in sizes),
        ),
        num_warps=scan.num_warps,
        num_stages=scan.num_stages,
        interpret=spec.interpret,
        input_output_aliases={0: 0, 1: 1},
    )(adjoint.k, adjoint.v, adjoint.decay, x, final)
    return Adjoint(keys, values, adjoint.decay), InitialGradients(*initial)


def _contributions(
    spec, chunk, tile, products, strong, ids, x, states, results, cotangents, queries, out
):
    index, c, b = ids
    g, first = index % spec.num_kv_heads, index // spec.num_kv_heads * tile
    rows = tiles.load_rows(spec, x, b, spec.shift + c * chunk, chunk)
    view = tiles.chunk_view(spec, x, b, c, chunk, rows)
    k = tiles.load_retiring_keys(spec, x, b, view.keys, g)
    v_CV = tiles.load_features(x.v, b, view.keys.at, g, spec.value_size, view.keys.valid)
    g_CM = tiles.load_log_decay(spec, x, b, view.keys, g, first, tile)
    gates = decays.chunk_gates(g_CM, strong, products, spec)

    def head(h, carry):
        d_k, d_v = carry
        n = g * spec.group + h
        q, do_CV, lse, delta = load_head(spec, x, results, cotangents, queries, b, n, rows)
        slots = slot_gradients(
            spec, x, states, (b, g), view, first, tile, gates, q, k, do_CV, v_CV, lse, delta
        )
        to_keys = tiles.where(view.has_state, spec.scale * slots.dz * gates.rows)
        to_values = tiles.where(view.has_state, slots.p * gates.rows)
        d_k = tuple(d + dot(to_keys, part, spec, "a") for d, part in zip(d_k, q, strict=True))
        return d_k, d_v + dot(to_values, do_CV, spec, "a")

    zeros = (
        tuple(jnp.zeros((tile, part.shape[1]), spec.wide) for part in k),
        jnp.zeros((tile, v_CV.shape[1]), spec.wide),
    )
    d_k, d_v = decays.loop(spec.group, head, zeros)

    slot = first + iota(tile)
    for part, value in enumerate(d_k):
        _put(spec, out.k, (b, c, g), slot, spec.part_size, value, part)
    _put(spec, out.v, (b, c, g), slot, spec.value_size, d_v)
    decay = jnp.exp(gates.total)
    if spec.tables:
        start = tiles.key_start(spec, x, b, spec.origin + (c + 1) * chunk - 1)
        decay = jnp.where(start < spec.origin + c * chunk, decay, 0)
    plgpu.store(out.decay.at[b, c, g, slot], decay, mask=slot < spec.num_slots)


def _put(spec, ref, lead, slot, size, value, part=0):
    cols, mask = tiles.columns(size)
    mask = tiles.both((slot < spec.num_slots)[:, None], mask)
    at = ref.at[(*lead, slot[:, None], part * size + cols)]
    plgpu.store(at, value.astype(ref.dtype), mask=mask)


def _scan(spec, tile, count, ids, in_k, in_v, decays, x, final, out):
    """D_c = contribution_c + decay_c D_{c+1}, from the final slots' cotangents to the start."""
    out_k, out_v, first_k, first_v = out
    index, part, b = ids
    first, g, is_value = index * tile, part // 2, part % 2
    slot = first + iota(tile)

    def run(contributions, out, initial, final, size):
        cols, mask = tiles.columns(size)
        mask = tiles.both((slot < spec.num_slots)[:, None], mask)

        def get(ref, *lead):
            at = ref.at[(*lead, slot[:, None], cols)]
            return plgpu.load(at, mask=mask, other=0).astype(spec.wide)

        state = jnp.zeros((tile, tiles.padded(size)), spec.wide)
        if final is not None:
            state = jnp.where(final_holds(spec, x, b), get(final, b, g), 0)
        _put(spec, out, (b, count, g), slot, size, state)

        def step(i, state):
            c = count - 1 - i
            decay = load(decays, b, c, g, slot, mask=slot < spec.num_slots)
            state = get(contributions, b, c, g) + decay[:, None] * state
            _put(spec, out, (b, c, g), slot, size, state)
            return state

        state = jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), step, state)
        _put(spec, initial, (b, g), slot, size, state)

    final_k, final_v = (None, None) if final is None else final

    @pl.when(is_value == 0)
    def _():
        run(in_k, out_k, first_k, final_k, spec.key_size)

    @pl.when(is_value == 1)
    def _():
        run(in_v, out_v, first_v, final_v, spec.value_size)
