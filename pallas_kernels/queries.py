"""Gradient of the queries, and the shift `delta` that the other backward kernels need.

The walk of the forward pass again, with probabilities from the saved log-sum-exp: d(score) is
`p (do . v - delta)`, where `delta = do . o + d(mass) mass`, and the slots' get d(mass) besides.
Where rows read few tokens or none through the window, a first pass sums delta up from what is read:
what slots of similar values leave of a gradient is less than the rounding of the output. Without a
window the mass is constant.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import gates as decays
from pallas_kernels import slot_tiles, tiles, tokens, walk
from pallas_kernels.blocks import Block
from pallas_kernels.outputs import Outputs
from pallas_kernels.reads import SlotReads, WindowReads, exact_delta
from pallas_kernels.rebuild import output_shift, shifts
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States
from pallas_kernels.strong import mild_then_strong
from pallas_kernels.tiles import dot


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
    n = tokens.head_of_rows(first, chunk, heads)
    rows = tokens.load_rows(spec, x, b, spec.shift + c * chunk, chunk, heads)
    q = tiles.load_parts(spec, x.q, b, rows.at, n, rows.loaded)
    do_CV = tiles.load_features(cotangents.out, b, rows.at, n, spec.value_size, rows.loaded)
    lse = tokens.load_per_row(results.lse, b, n, rows)
    slots = SlotReads(chunk, block, strong, x, states, (b, g, c), rows, q, do_CV, lse)
    delta = output_shift(spec, results, b, n, rows, do_CV) if not spec.is_narrow else None
    window = rotation = None
    if spec.window:
        over = walk.begin_walk(spec, x, b, rows, chunk, block.walk)
        rotation = tiles.load_rotation(spec, x.rotation, b, rows.at, rows.loaded)
        turned = tiles.rotated(spec, q, rotation)
        window = WindowReads(x, (b, g), rows, over, turned, do_CV, lse)
    if spec.is_narrow and (spec.window or slot_tiles.tile_count(spec, block) > 1):
        delta = exact_delta(spec, window, slots)
    slot_delta = delta
    if spec.window:
        delta, slot_delta = shifts(results, cotangents, b, n, rows, delta)

    dq = tuple(jnp.zeros(part.shape, spec.wide) for part in q)
    if spec.window:
        dq = _from_window(spec, window, delta, dq)
        dq = tiles.rotated(spec, dq, rotation, inverse=True)
    if spec.num_slots:
        dq, slot_delta = _from_slots(spec, slots, slot_delta, dq)
    for part, value in enumerate(dq):
        tiles.store_features(
            grads.q, b, rows.at, n, spec.part_size, rows.exist, spec.scale * value, part
        )
    tokens.store_per_row(grads.delta, b, n, rows, slot_delta if delta is None else delta)
    if grads.slot_delta is not None:
        tokens.store_per_row(grads.slot_delta, b, n, rows, slot_delta)


def _from_window(spec, window, delta, dq):
    def add(dq, p, u, k):
        ds = p * (u - delta[:, None])
        return tuple(d + dot(ds, part, spec) for d, part in zip(dq, k, strict=True))

    return window.fold(spec, add, dq)


def _from_slots(spec, slots, delta, dq):
    view, k, gradients = slots.load(spec)

    def step(i, carry):
        dq, _ = carry
        state, gates, found = gradients(i, delta)
        to_keys = decays.write(gates, found.dz, view.pairs, spec)
        to_state = tiles.where(view.has_state, found.dz * gates.rows)
        dq = tuple(
            d + dot(to_state, h, spec) + dot(to_keys, part, spec)
            for d, h, part in zip(dq, state.k, k, strict=True)
        )
        return dq, found.delta

    zeros = jnp.zeros(slots.lse.shape, spec.wide)
    return tiles.loop(slot_tiles.tile_count(spec, slots.block), step, (dq, zeros))
