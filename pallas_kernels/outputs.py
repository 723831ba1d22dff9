"""Outputs: one flash-attention walk whose first block of keys is the slots.

One program computes the output of one head, or of some heads of a group, for a block of rows: the
slots' scores from the state at the chunk's start and the chunk's own keys, then the window's key
blocks, with a running maximum and sum over all of them. Nothing of size T x M or T x W is written.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gates as decays
from pallas_kernels import slot_tiles, tiles, tokens, walk
from pallas_kernels.blocks import ForwardBlocks
from pallas_kernels.instructions import exp2
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States
from pallas_kernels.strong import mild_then_strong
from pallas_kernels.tiles import dot, dot_parts


class Outputs(NamedTuple):
    """The forward pass's results, which the backward pass reads again."""

    out: Any  # [B,T,N,V]
    slot_mass: Any  # [B,T,N] wide
    lse: Any  # [B,N,T] wide: base-2 log-sum-exp of a row's scores, rows in the kernels' order


def outputs(spec: Spec, blocks: ForwardBlocks, x: Operands, states: States | None) -> Outputs:
    """Reads slots (None: there are none) and window in one softmax, a program a block of rows."""
    batch = x.q.shape[0]
    count, first = spec.row_blocks(blocks.chunk)
    rows, heads = spec.rows, spec.num_heads
    shapes = Outputs(
        jax.ShapeDtypeStruct((batch, rows, heads, spec.value_size), spec.dtype),
        jax.ShapeDtypeStruct((batch, rows, heads), spec.wide),
        jax.ShapeDtypeStruct((batch, heads, rows), spec.wide),
    )
    return mild_then_strong(
        spec,
        functools.partial(_kernel, spec, blocks),
        name="nha_outputs",
        locate=lambda n, i, b: (b, n // spec.group, i - first),
        chunk=blocks.chunk,
        limit=decays.LIMIT,
        # The heads of a group come one after another: they share keys, values and states in L2.
        grid=(heads, count, batch),
        heads=blocks.outputs.heads,
        out_shape=shapes,
        block=blocks.outputs,
    )(x, states)


def _kernel(spec: Spec, blocks: ForwardBlocks, strong: bool, ids, x: Operands, states, out):
    chunk = blocks.chunk
    heads = 1 if strong else blocks.outputs.heads
    first, index, b = ids[0] * heads, ids[1], ids[2]
    g, c = first // spec.group, index - spec.row_blocks(chunk)[1]
    n = tokens.head_of_rows(first, chunk, heads)
    rows = tokens.load_rows(spec, x, b, spec.shift + c * chunk, chunk, heads)
    # Before what is loaded through tables, which waits for them.
    view = slot_tiles.chunk_view(spec, x, b, c, chunk, rows) if spec.num_slots else None
    q = tiles.load_parts(spec, x.q, b, rows.at, n, rows.loaded)

    # highest score, sum, output
    carry = (
        jnp.full(rows.row.shape, jnp.finfo(spec.wide).min, spec.wide),
        jnp.zeros(rows.row.shape, spec.wide),
        jnp.zeros((heads * chunk, tiles.padded(spec.value_size)), spec.wide),
    )
    slot_sum = jnp.zeros(rows.row.shape, spec.wide)
    if view is not None:
        carry = _read_slots(spec, blocks, strong, heads, x, states, (b, g), view, q, carry)
        slot_sum = carry[1]
    highest = carry[0]
    if spec.window:
        over = walk.begin_walk(spec, x, b, rows, chunk, blocks.outputs.walk)
        rotation = tiles.load_rotation(spec, x.rotation, b, rows.at, rows.loaded)
        turned = tiles.rotated(spec, q, rotation)
        carry = _read_window(spec, x, (b, g), rows, over, turned, carry)

    slot_sum *= exp2(highest - carry[0], spec)
    highest, total, acc_CV = carry
    safe = jnp.where(total > 0, total, 1)
    inverse = 1 / safe
    tiles.store_features(
        out.out, b, rows.at, n, spec.value_size, rows.exist, acc_CV * inverse[:, None]
    )
    at = tiles.stored(out.slot_mass, rows.at, rows.exist)
    plgpu.store(out.slot_mass.at[b, at, n], slot_sum * inverse, mask=rows.exist)
    tokens.store_per_row(out.lse, b, n, rows, highest + jnp.log2(safe))


def _accumulate(spec, carry, scores, values):
    """One step of the running softmax; `values` maps probabilities to their output.

    Without a carry it is the first one.
    """
    lowest = jnp.finfo(scores.dtype).min  # finite, so that a difference is never NaN
    higher = jnp.maximum(lowest if carry is None else carry[0], jnp.max(scores, axis=1))
    p = exp2(scores - higher[:, None], spec)
    if carry is None:
        return higher, jnp.sum(p, axis=1), values(p)
    highest, total, acc = carry
    shrink = exp2(highest - higher, spec)
    return higher, total * shrink + jnp.sum(p, axis=1), acc * shrink[:, None] + values(p)


def _read_slots(spec, blocks, strong, heads, x, states, at, view, q, carry):
    b, g = at
    tile = slot_tiles.tile_size(spec, blocks.outputs)
    k = slot_tiles.load_retiring_keys(spec, x, b, view.keys, g)
    v_CV = tiles.load_features(x.v, b, view.keys.at, g, spec.value_size, view.keys.valid)
    products_CC = jnp.where(view.pairs, dot_parts(q, k, spec, "b"), 0)

    def step(i, carry):
        first = i * tile
        g_CM = slot_tiles.load_log_decay(spec, x, b, view.keys, g, first, tile)
        gates = decays.chunk_gates(g_CM, strong, blocks.outputs.products, spec, heads)
        h_k, h_v = slot_tiles.load_states(spec, states, (b, view.state, g), first, tile)
        state_CM = tiles.where(view.has_state, dot_parts(q, h_k, spec, "b"))
        scores = spec.log2_scale * decays.read(gates, state_CM, products_CC, spec)
        readable = slot_tiles.readable_slots(spec, view, first, tile)
        scores = jnp.where(readable, scores, -jnp.inf)

        def values(p):
            to_keys = decays.write(gates, p, view.pairs, spec)
            to_state = tiles.where(view.has_state, p * gates.rows)
            return dot(to_state, h_v, spec) + dot(to_keys, v_CV, spec)

        return _accumulate(spec, carry, scores, values)

    count = slot_tiles.tile_count(spec, blocks.outputs)
    return step(jnp.int32(0), None) if count == 1 else tiles.loop(count, step, carry)


def _read_window(spec, x, at, rows, over, q, carry):
    b, g = at

    def step(masked, keys, carry):
        k = tokens.load_window_keys(spec, x, b, keys, g)
        v_JV = tiles.load_features(x.v, b, keys.at, g, spec.value_size, keys.valid)
        scores = spec.log2_scale * dot_parts(q, k, spec, "b")
        if masked:
            scores = jnp.where(tokens.in_window(spec, rows, keys), scores, -jnp.inf)
        return _accumulate(spec, carry, scores, lambda p: dot(p, v_JV, spec))

    return walk.walk(spec, x, b, rows, over, step, carry)
