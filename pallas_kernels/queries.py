"""Gradient of the queries, and the shift `delta` that the other backward kernels need.

The walk of the forward pass again, with probabilities from the saved log-sum-exp: d(score) is
`p (do . v - delta)`, where `delta = do . o + d(mass) mass`, and the slots' get d(mass) besides.
Without a window the mass is constant, and `delta = sum_m p_m u_m` over the slots with `u = do . v`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import gates as decays
from pallas_kernels import slot_tiles, tiles, walk
from pallas_kernels.blocks import Block
from pallas_kernels.outputs import Outputs
from pallas_kernels.rebuild import probabilities, shifts, slot_gradients
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States
from pallas_kernels.strong import mild_then_strong
from pallas_kernels.tiles import dot, dot_parts


class Cotangents(NamedTuple):
    """Of the operator's results."""

    out: Any  # [B,T,N,V]
    slot_mass: Any  # [B,T,N] or None


class QueryGradients(NamedTuple):
    """Of the queries, and the sums that a softmax's gradient subtracts in every row."""

    q: Any  # [B,T,N,K]
    delta: Any  # [B,N,T] wide
    slot_delta: Any  # [B,N,T] delta without the slot mass's own cotangent; None: the same


def query_gradients(
    spec: Spec,
    chunk: int,
    block: Block,
    x: Operands,
    states: States | None,
    results: Outputs,
    cotangents: Cotangents,
) -> QueryGradients:
    """Gradients of the queries, through slots (states None: there are none) and window."""
    batch, (count, first) = x.q.shape[0], spec.row_blocks(chunk)
    per_row = jax.ShapeDtypeStruct((batch, spec.num_heads, spec.rows), spec.wide)
    return mild_then_strong(
        spec,
        functools.partial(_kernel, spec, chunk, block),
        name="nha_query_gradients",
        grid=(spec.num_heads, count, batch),
        locate=lambda n, i, b: (b, n // spec.group, i - first),
        heads=block.heads,
        chunk=chunk,
        limit=decays.BACKWARD_LIMIT,
        out_shape=QueryGradients(
            jax.ShapeDtypeStruct(x.q.shape, spec.dtype),
            per_row,
            None if cotangents.slot_mass is None else per_row,
        ),
        block=block,
    )(x, states, results, cotangents)


def _kernel(spec, chunk, block, strong, ids, x, states, results, cotangents, grads):
    heads = 1 if strong else block.heads
    first, index, b = ids[0] * heads, ids[1], ids[2]
    g, c = first // spec.group, index - spec.row_blocks(chunk)[1]
    n = tiles.head_of_rows(first, chunk, heads)
    rows = tiles.load_rows(spec, x, b, spec.shift + c * chunk, chunk, heads)
    q = tiles.load_parts(spec, x.q, b, rows.at, n, rows.loaded)
    do_CV = tiles.load_features(cotangents.out, b, rows.at, n, spec.value_size, rows.loaded)
    lse = tiles.load_per_row(results.lse, b, n, rows)
    slot_delta = delta = None
    if spec.window:
        delta, slot_delta = shifts(spec, results, cotangents, b, n, rows, do_CV)

    dq = tuple(jnp.zeros(part.shape, spec.wide) for part in q)
    if spec.window:
        over = walk.begin_walk(spec, x, b, rows, chunk, block.walk)
        rotation = tiles.load_rotation(spec, x.rotation, b, rows.at, rows.loaded)
        turned = tiles.rotated(spec, q, rotation)
        dq = _from_window(spec, x, (b, g), rows, over, turned, do_CV, lse, delta, dq)
        dq = tiles.rotated(spec, dq, rotation, inverse=True)
    if spec.num_slots:
        args = (rows, q, do_CV, lse, slot_delta, dq)
        dq, slot_delta = _from_slots(spec, chunk, block, strong, x, states, (b, g, c), *args)
    for part, value in enumerate(dq):
        tiles.store_features(
            grads.q, b, rows.at, n, spec.part_size, rows.exist, spec.scale * value, part
        )
    tiles.store_per_row(grads.delta, b, n, rows, slot_delta if delta is None else delta)
    if grads.slot_delta is not None:
        tiles.store_per_row(grads.slot_delta, b, n, rows, slot_delta)


def _from_window(spec, x, at, rows, over, q, do_CV, lse, delta, dq):
    b, g = at

    def step(masked, keys, dq):
        k = tiles.load_window_keys(spec, x, b, keys, g)
        v_JV = tiles.load_features(x.v, b, keys.at, g, spec.value_size, keys.valid)
        mask = tiles.in_window(spec, rows, keys) if masked else None
        p = probabilities(spec, dot_parts(q, k, spec, "b"), lse[:, None], mask)
        ds = p * (dot(do_CV, v_JV, spec, "b") - delta[:, None])
        return tuple(d + dot(ds, part, spec) for d, part in zip(dq, k, strict=True))

    return walk.walk(spec, x, b, rows, over, step, dq)


def _from_slots(spec, chunk, block, strong, x, states, at, rows, q, do_CV, lse, delta, dq):
    b, g, c = at
    tile = min(block.slots, tiles.padded(spec.num_slots))
    view = slot_tiles.chunk_view(spec, x, b, c, chunk, rows)
    k = slot_tiles.load_retiring_keys(spec, x, b, view.keys, g)
    v_CV = tiles.load_features(x.v, b, view.keys.at, g, spec.value_size, view.keys.valid)

    def gradients(i, delta):
        state = slot_tiles.load_tile(spec, x, states, b, g, view, i * tile, tile)
        heads = rows.row.shape[0] // chunk
        gates = decays.chunk_gates(state.log_decay, strong, block.products, spec, heads)
        at = view, i * tile, state, gates
        return state, gates, slot_gradients(spec, *at, q, k, do_CV, v_CV, lse, delta)

    def add_delta(i, total):
        return total + gradients(i, None)[2].delta

    # Without a window: from the slots, not from outputs that were rounded. What slots of similar
    # values leave of a gradient is less than that rounding.
    count = -(-spec.num_slots // tile)
    if delta is None and count > 1:
        delta = tiles.loop(count, add_delta, jnp.zeros(lse.shape, spec.wide))

    def step(i, carry):
        dq, _ = carry
        state, gates, slots = gradients(i, delta)
        to_keys = decays.write(gates, slots.dz, view.pairs, spec)
        to_state = tiles.where(view.has_state, slots.dz * gates.rows)
        dq = tuple(
            d + dot(to_state, h, spec) + dot(to_keys, part, spec)
            for d, h, part in zip(dq, state.k, k, strict=True)
        )
        return dq, slots.delta

    return tiles.loop(count, step, (dq, jnp.zeros(lse.shape, spec.wide)))
