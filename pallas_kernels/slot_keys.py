"""Gradients of keys and values through the slots, added to those through the window.

Key i has the adjoint `DK_i`, that of the state after it retired: `dk_i = sum_m write_i[m] DK_i[m]`,
which is the transpose of writing back inside the chunk plus the adjoint state at the chunk's end,
decayed. Both sum over a group's query heads.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import gates as decays
from pallas_kernels import slot_tiles, tiles, tokens
from pallas_kernels.adjoint_scan import Adjoint
from pallas_kernels.blocks import Block
from pallas_kernels.outputs import Outputs
from pallas_kernels.queries import Cotangents, QueryGradients
from pallas_kernels.rebuild import load_head, slot_gradients
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States
from pallas_kernels.strong import mild_then_strong
from pallas_kernels.tiles import dot
from pallas_kernels.window_keys import KeyGradients


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
) -> KeyGradients:
    """Gradients of the keys that retire and of the values.

    They are those through the window, too, where the window reads the same arrays.
    """
    count, first = spec.key_blocks(chunk)
    before = None
    if window is not None:
        before = KeyGradients(window.k if x.slot_k is None else None, window.v)
    return mild_then_strong(
        spec,
        functools.partial(_kernel, spec, chunk, block),
        name="nha_slot_key_gradients",
        grid=(spec.num_kv_heads, count, x.k.shape[0]),
        locate=lambda g, i, b: (b, g, i - first),
        chunk=chunk,
        limit=decays.BACKWARD_LIMIT,
        out_shape=KeyGradients(
            jax.ShapeDtypeStruct(x.k.shape, x.k.dtype), jax.ShapeDtypeStruct(x.v.shape, x.v.dtype)
        ),
        block=block,
    )(x, states, results, cotangents, queries, adjoint, before)


def _kernel(
    spec, chunk, block, strong, ids, x, states, results, cotangents, queries, adjoint, before, grads
):
    g, index, b = ids
    c = index - spec.key_blocks(chunk)[1]
    first = spec.origin + c * chunk
    rows = tokens.load_rows(spec, x, b, spec.shift + c * chunk, chunk)
    view = slot_tiles.chunk_view(spec, x, b, c, chunk, rows)
    keys = view.keys
    keys_and_values = slot_tiles.load_in_turn(spec, x, b, keys, g, block.reload)
    k, v_CV = keys_and_values(jnp.int32(0))
    to_end = tokens.reaches_end(spec, x, b, keys, first + chunk - 1)
    end = jnp.minimum(view.state + 1, spec.chunks(chunk))
    tile = slot_tiles.tile_size(spec, block)

    def slots_tile(i, carry):
        slot = i * tile
        state = slot_tiles.load_tile(spec, x, states, b, g, view, slot, tile)
        gates = decays.chunk_gates(state.log_decay, strong, block.products, spec)

        def head(h, carry):
            d_k, d_v = carry
            at = (results, cotangents, queries, b, g * spec.group + h, rows.in_turn(h, spec))
            q, do_CV, lse, delta = load_head(spec, x, *at)
            here = view.in_turn(h, spec)
            k, v_CV = keys_and_values(h)
            s = slot_gradients(spec, here, slot, state, gates, q, k, do_CV, v_CV, lse, delta)
            to_values = decays.write(gates, s.p, here.pairs, spec)
            to_keys = decays.write(gates, spec.scale * s.dz, here.pairs, spec)
            return (
                tuple(d + dot(to_keys, y, spec, "a") for d, y in zip(d_k, q, strict=True)),
                d_v + dot(to_values, do_CV, spec, "a"),
            )

        def through_end(carry):
            d_k, d_v = carry
            total_M = slot_tiles.load_total(spec, states, b, c, g, slot, tile)
            written = gates.write * decays.to_end(gates, total_M, to_end, spec)
            d_end_v = slot_tiles.load_slots(
                spec, adjoint.v, (b, end, g), slot, tile, spec.value_size
            )
            d_v += dot(written, d_end_v, spec)
            d_end_k = slot_tiles.load_slot_parts(spec, adjoint.k, (b, end, g), slot, tile)
            return tuple(d + dot(written, y, spec) for d, y in zip(d_k, d_end_k, strict=True)), d_v

        # Registers decide the order: over several heads the sums are alive and the gates need not
        # be afterwards; with one head the sums need not be alive before.
        if spec.group > 1:
            return tiles.loop(spec.group, head, through_end(carry))
        return through_end(head(0, carry))

    zeros = tuple(jnp.zeros(part.shape, spec.wide) for part in k), jnp.zeros(v_CV.shape, spec.wide)
    carry = tiles.loop(slot_tiles.tile_count(spec, block), slots_tile, zeros)
    before_k, before_v = (None, None) if before is None else before
    for part, value in enumerate(carry[0]):
        if before_k is not None:
            value += tiles.load_features(before_k, b, keys.at, g, spec.part_size, keys.valid, part)
        tiles.store_features(grads.k, b, keys.at, g, spec.part_size, keys.exist, value, part)
    d_v = carry[1]
    if before_v is not None:
        d_v += tiles.load_features(before_v, b, keys.at, g, spec.value_size, keys.valid)
    tiles.store_features(grads.v, b, keys.at, g, spec.value_size, keys.exist, d_v)
