"""Gradient of the log decays.

With `DK_i` the adjoint of the state after key i retired, the write strength has the gradient
`dwrite_i = k_i . DK_i + v_i . DV_i`, and the log decay `x_i - exp(g_i) dwrite_i`, where `x` runs
back from `D . H` at the chunk's end: `x_i = x_{i+1} + (read . its gradient)_i - write_i dwrite_i`.
Where the chunk decays strongly these differences cancel, and pairs are summed by themselves.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gates as decays
from pallas_kernels import slot_tiles, tiles
from pallas_kernels.adjoint_scan import Adjoint
from pallas_kernels.blocks import Block
from pallas_kernels.outputs import Outputs
from pallas_kernels.queries import Cotangents, QueryGradients
from pallas_kernels.rebuild import load_head, slot_gradients
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States
from pallas_kernels.strong import mild_then_strong
from pallas_kernels.sums import wide_sums
from pallas_kernels.tiles import dot, dot_parts


def gate_gradients(
    spec: Spec,
    chunk: int,
    block: Block,
    x: Operands,
    states: States,
    results: Outputs,
    cotangents: Cotangents,
    queries: QueryGradients,
    adjoint: Adjoint,
) -> jax.Array:
    """Gradient [B,S,G,M] of the log decays, in their dtype."""
    tile = min(block.slots, tiles.padded(spec.num_slots))
    tiles_of_slots, (blocks, first) = -(-spec.num_slots // tile), spec.key_blocks(chunk)
    return mild_then_strong(
        spec,
        functools.partial(_kernel, spec, chunk, tile, block.products),
        name="nha_gate_gradients",
        locate=lambda i, c, b: (b, i % spec.num_kv_heads, c - first),
        chunk=chunk,
        limit=decays.BACKWARD_LIMIT,
        grid=(spec.num_kv_heads * tiles_of_slots, blocks, x.k.shape[0]),
        out_shape=jax.ShapeDtypeStruct(x.log_decay.shape, x.log_decay.dtype),
        block=block,
    )(x, states, results, cotangents, queries, adjoint)


def _kernel(
    spec,
    chunk,
    tile,
    products,
    strong,
    ids,
    x,
    states,
    results,
    cotangents,
    queries,
    adjoint,
    d_gates,
):
    index, c, b = ids
    g, slot = index % spec.num_kv_heads, index // spec.num_kv_heads * tile
    c -= spec.key_blocks(chunk)[1]
    first = spec.origin + c * chunk
    rows = tiles.load_rows(spec, x, b, spec.shift + c * chunk, chunk)
    view = slot_tiles.chunk_view(spec, x, b, c, chunk, rows)
    keys = view.keys
    k = slot_tiles.load_retiring_keys(spec, x, b, keys, g)
    v_CV = tiles.load_features(x.v, b, keys.at, g, spec.value_size, keys.valid)
    g_CM = slot_tiles.load_log_decay(spec, x, b, keys, g, slot, tile)
    gates = decays.chunk_gates(g_CM, strong, products, spec)

    # Through the state at the chunk's end.
    to_end = tiles.reaches_end(spec, x, b, keys, first + chunk - 1)
    end = jnp.minimum(view.state + 1, spec.chunks(chunk))
    d_end_k = slot_tiles.load_slot_parts(spec, adjoint.k, (b, end, g), slot, tile)
    d_end_v = slot_tiles.load_slots(spec, adjoint.v, (b, end, g), slot, tile, spec.value_size)
    at_end = dot_parts(k, d_end_k, spec, "b") + dot(v_CV, d_end_v, spec, "b")
    at_end *= decays.to_end(gates, to_end, spec)

    # D . H where the walk back begins: at the chunk's end, or at its start, decayed.
    state = view.state if strong else end
    h_k = slot_tiles.load_slot_parts(spec, states.k, (b, state, g), slot, tile)
    h_v = slot_tiles.load_slots(spec, states.v, (b, state, g), slot, tile, spec.value_size)
    carried = sum(
        jnp.sum(d.astype(spec.wide) * h.astype(spec.wide), axis=1)
        for d, h in zip((*d_end_k, d_end_v), (*h_k, h_v), strict=True)
    )

    def head(h, carry):
        d_write, d_pairs, moved = carry
        n = g * spec.group + h
        q, do_CV, lse, delta = load_head(spec, x, results, cotangents, queries, b, n, rows)
        s = slot_gradients(
            spec, x, states, (b, g), view, slot, tile, gates, q, k, do_CV, v_CV, lse, delta
        )
        reads = (spec.scale * s.dz, s.products, s.p, s.value_products)
        own, pairs = decays.transposed(gates, spec, *reads)
        return d_write + own, d_pairs + pairs, moved + s.moved

    zeros = jnp.zeros((chunk, tile), spec.wide)
    carry = (at_end, zeros if strong else 0.0, zeros)
    d_write, d_pairs, moved = tiles.loop(spec.group, head, carry)

    if strong:
        through_end = gates.write * at_end
        d_pairs += tiles.where(to_end, jnp.cumsum(through_end, axis=0) - through_end)
        carried *= jnp.exp(gates.total)
        if spec.tables:  # unless the document of the state at the start has ended
            start = tiles.key_start(spec, x, b, first + chunk - 1)
            carried = jnp.where(start < first, carried, 0)
    else:
        moved -= gates.write * d_write
    # At key i the sum over all rows that read it.
    d_gate = d_pairs + wide_sums(view.pairs, moved, spec, "a")
    d_gate += tiles.where(to_end, jnp.broadcast_to(carried[None, :], zeros.shape))
    d_gate -= gates.decay * d_write
    slots = slot + tiles.iota(tile)[None, :]
    plgpu.store(
        d_gates.at[b, keys.at[:, None], g, slots],
        tiles.where(tiles.retiring(spec, keys)[:, None], d_gate).astype(d_gates.dtype),
        mask=keys.exist[:, None] & (slots < spec.num_slots),
    )
