"""Gradients of keys, values and gates through the slots, added to those through the window.

With `D` the adjoint state at a chunk's end and `DK_i` that after key i: `dk_i = write_i . DK_i`,
`dwrite_i = k_i . DK_i + v_i . DV_i`. The log decay's is `x_i - exp(g_i) dwrite_i`, where `x` runs
back from `D . H` at the chunk's end: `x_i = x_{i+1} + (read . its gradient)_i - write_i dwrite_i`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gates as decays
from pallas_kernels import tiles
from pallas_kernels.adjoint import Adjoint
from pallas_kernels.launch import launch
from pallas_kernels.outputs import Outputs
from pallas_kernels.queries import Cotangents, QueryGradients
from pallas_kernels.rebuild import slot_gradients
from pallas_kernels.spec import Block, Operands, Spec
from pallas_kernels.states import States
from pallas_kernels.tiles import dot, dot_parts
from pallas_kernels.window_keys import KeyGradients


class SlotKeyGradients(NamedTuple):
    k: Any  # [B,S,G,K] of the keys that retire; with the window's where both are one array
    v: Any  # [B,S,G,V] with the window's
    log_decay: Any  # [B,S,G,M]


def slot_key_gradients(
    spec: Spec,
    chunk: int,
    block: Block,
    x: Operands,
    states: States,
    results: Outputs,
    cotangents: Cotangents,
    queries: QueryGradients,
    adjoint: Adjoint,
    window: KeyGradients | None,
) -> SlotKeyGradients:
    shapes = [jax.ShapeDtypeStruct(y.shape, y.dtype) for y in (x.k, x.v, x.log_decay)]
    before = None
    if window is not None:
        before = KeyGradients(window.k if x.slot_k is None else None, window.v)
    arrays = jax.tree.leaves(before)
    return launch(
        functools.partial(_kernel, spec, chunk, block),
        name="nha_slot_key_gradients",
        grid=(spec.num_kv_heads, spec.key_blocks(chunk)[0], x.k.shape[0]),
        out_shape=SlotKeyGradients(*shapes),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        interpret=spec.interpret,
        input_output_aliases={i: 2 - len(arrays) + i for i in range(len(arrays))},
    )(before, x, states, results, cotangents, queries, adjoint)


def _kernel(spec, chunk, block, before, x, states, results, cotangents, queries, adjoint, grads):
    g, b = pl.program_id(0), pl.program_id(2)
    c = pl.program_id(1) - spec.key_blocks(chunk)[1]
    first = spec.origin + c * chunk
    rows = tiles.load_rows(spec, x, b, spec.shift + c * chunk, chunk)
    view = tiles.chunk_view(spec, x, b, c, chunk, rows)
    keys = view.keys
    k = tiles.load_retiring_keys(spec, x, b, keys, g)
    v_CV = tiles.load_features(x.v, b, keys.at, g, spec.value_size, keys.valid)
    slot_delta = queries.delta if queries.slot_delta is None else queries.slot_delta
    last_start = tiles.key_start(spec, x, b, first + chunk - 1)
    to_end = keys.index >= last_start  # keys whose document goes on into the state at the end
    spans = last_start < first  # whether the state at the start does, too
    end = jnp.minimum(view.state + 1, spec.chunks(chunk))
    tile = min(block.slots, tiles.padded(spec.num_slots))

    def slots_tile(i, carry):
        slot = i * tile
        gates = decays.chunk_gates(
            tiles.load_log_decay(spec, x, b, keys, g, slot, tile), decays.BACKWARD_LIMIT
        )

        def head(h, carry):
            d_k, d_v, d_write, d_pairs, moved = carry
            n = g * spec.group + h
            q = tiles.load_parts(spec, x.q, b, rows.at, n, rows.valid)
            do_CV = tiles.load_features(cotangents.out, b, rows.at, n, spec.value_size, rows.valid)
            lse, delta = (tiles.load_per_row(y, b, n, rows) for y in (results.lse, slot_delta))
            args = (view, slot, tile, q, k, do_CV, v_CV, lse, delta)
            s = slot_gradients(spec, x, states, (b, g), *args)
            dz = spec.scale * s.dz
            to_keys = decays.write(gates, dz, view.pairs, spec)
            to_values = decays.write(gates, s.p, view.pairs, spec)
            through = decays.transposed(gates, spec, dz, s.products, s.p, s.value_products)
            return (
                tuple(d + dot(to_keys, y, spec, "a") for d, y in zip(d_k, q, strict=True)),
                d_v + dot(to_values, do_CV, spec, "a"),
                d_write + through[0],
                d_pairs + through[1],
                moved + s.moved,
            )

        zeros = jnp.zeros((chunk, tile), spec.wide)
        carry = (*carry, zeros, zeros, zeros)
        heads = jnp.int32(spec.group)
        carry = jax.lax.fori_loop(jnp.int32(0), heads, head, carry)
        d_k, d_v, d_write, d_pairs, moved = carry

        # Through the state at the chunk's end.
        d_end_k = tiles.load_slot_parts(spec, adjoint.k, b, end, g, slot, tile)
        d_end_v = tiles.load_slots(spec, adjoint.v, b, end, g, slot, tile, spec.value_size)
        decay_to_end = jnp.where(to_end[:, None], jnp.exp(gates.total[None, :] - gates.summed), 0)
        at_end = dot_parts(k, d_end_k, spec, "b") + dot(v_CV, d_end_v, spec, "b")
        at_end = decay_to_end * at_end
        written = decay_to_end * gates.write
        d_k = tuple(d + dot(written, y, spec) for d, y in zip(d_k, d_end_k, strict=True))
        d_v += dot(written, d_end_v, spec)
        d_write += at_end

        # D . H where the walk back begins: at the chunk's end, or where pairs are summed one by one
        # at its start, decayed.
        state = jnp.where(gates.is_mild, end, view.state)
        h_k = tiles.load_slot_parts(spec, states.k, b, state, g, slot, tile)
        h_v = tiles.load_slots(spec, states.v, b, state, g, slot, tile, spec.value_size)
        carried = sum(
            jnp.sum(d.astype(spec.wide) * h.astype(spec.wide), axis=1)
            for d, h in zip((*d_end_k, d_end_v), (*h_k, h_v), strict=True)
        )
        through_chunk = jnp.where(spans, jnp.exp(gates.total), 0) * carried
        carried = jnp.where(gates.is_mild, carried, through_chunk)

        summed = moved - jnp.where(gates.is_mild, gates.write * d_write, 0)
        d_gate = _sum_over_later(view.pairs, summed, spec) + to_end[:, None] * carried[None, :]
        own = gates.write * at_end
        through_end = jnp.where(to_end[:, None], jnp.cumsum(own, axis=0) - own, 0)
        d_gate += jnp.where(gates.is_mild, 0, d_pairs + through_end)
        d_gate -= gates.decay * d_write
        slots = slot + tiles.iota(tile)[None, :]
        retire = tiles.retiring(spec, x, b, keys)[:, None]
        plgpu.store(
            grads.log_decay.at[b, keys.at[:, None], g, slots],
            jnp.where(retire, d_gate, 0).astype(grads.log_decay.dtype),
            mask=keys.valid[:, None] & (slots < spec.num_slots),
        )
        return d_k, d_v

    d_k, d_v = _loaded(spec, before, b, g, keys, k, v_CV)
    d_k, d_v = decays.loop(-(-spec.num_slots // tile), slots_tile, (d_k, d_v))
    for part, value in enumerate(d_k):
        tiles.store_features(grads.k, b, keys.at, g, spec.part_size, keys.valid, value, part)
    tiles.store_features(grads.v, b, keys.at, g, spec.value_size, keys.valid, d_v)


def _loaded(spec, before: KeyGradients | None, b, g, keys, k, v_CV):
    """Gradients through the window, or zeros."""
    d_k = tuple(jnp.zeros(part.shape, spec.wide) for part in k)
    d_v = jnp.zeros(v_CV.shape, spec.wide)
    if before is None:
        return d_k, d_v
    if before.k is not None:
        parts = tiles.load_parts(spec, before.k, b, keys.at, g, keys.valid)
        d_k = tuple(part.astype(spec.wide) for part in parts)
    d_v = tiles.load_features(before.v, b, keys.at, g, spec.value_size, keys.valid)
    return d_k, d_v.astype(spec.wide)


def _sum_over_later(pairs_CC, values_CM, spec: Spec):
    """At key i the sum of the values of all rows that read it; terms may cancel: not in bfloat16."""
    precision = jax.lax.Precision.HIGHEST
    if jnp.dtype(spec.dtype).itemsize == 2:
        precision = jax.lax.Precision.DEFAULT
    pairs = pairs_CC.astype(spec.wide)
    dimensions = (((0,), (0,)), ((), ()))
    return jax.lax.dot_general(
        pairs, values_CM, dimensions, precision=precision, preferred_element_type=spec.wide
    )
