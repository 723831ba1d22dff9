"""Gradient of the log decays, in two parts.

With `DK_i` the adjoint of the state after key i retired, the write strength has the gradient
`dwrite_i = k_i . DK_i + v_i . DV_i`, and the log decay `x_i - exp(g_i) dwrite_i`, where `x_i` is
the inner product with their gradients of all reads from key i on, as far as they read what was
written before it. All that is linear in the adjoint: one part is what the chunk's own rows read,
which asks for no adjoint state and is computed beside the adjoint's contributions; the other, a
kernel of its own, is what goes on through the chunk's end.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gates as decays
from pallas_kernels import slot_tiles, tiles, tokens
from pallas_kernels.adjoint_scan import Adjoint
from pallas_kernels.blocks import Block
from pallas_kernels.gates import Gates
from pallas_kernels.instructions import exp2
from pallas_kernels.launch import launch
from pallas_kernels.rebuild import SlotGradients
from pallas_kernels.slot_tiles import ChunkView
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States
from pallas_kernels.sums import masked_sums
from pallas_kernels.tiles import LOG2_E, dot


def of_rows(spec: Spec, gates: Gates, s: SlotGradients) -> tuple[Any, ...]:
    """What one head's rows add, [C,M]: to `dwrite`, to reads and, if strong, to pairs' own sums."""
    reads = (spec.scale * s.dz, s.products, s.p, s.value_products)
    d_write, d_pairs = decays.transposed(gates, spec, *reads)
    if gates.is_strong:
        return d_write, s.moved, d_pairs
    return d_write, s.moved - gates.write * d_write


def through_rows(spec: Spec, gates: Gates, view: ChunkView, d_write, moved, *pairs) -> jax.Array:
    """The first part [C,M], from the sums of `of_rows` over a group's heads.

    Reads in all, less what keys from i on have written of them. Where the chunk decays strongly
    these differences cancel, and pairs have been summed by themselves.
    """
    # At key i the sum over all rows that read it.
    return sum(pairs) + masked_sums(view.readers, moved, spec) - gates.decay * d_write


def gate_gradients(
    spec: Spec, chunk: int, block: Block, x: Operands, states: States, adjoint: Adjoint
) -> jax.Array:
    """Gradient [B,S,G,M] of the log decays, in their dtype."""
    tile = slot_tiles.tile_size(spec, block)
    count = slot_tiles.tile_count(spec, block)
    return launch(
        functools.partial(_kernel, spec, chunk, tile),
        name="nha_gate_gradients",
        grid=(spec.num_kv_heads * count, spec.key_blocks(chunk)[0], x.k.shape[0]),
        out_shape=jax.ShapeDtypeStruct(x.log_decay.shape, x.log_decay.dtype),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        interpret=spec.interpret,
    )(x, states, adjoint)


def _piece(spec: Spec, size: int) -> int:
    """How many features are multiplied at once: exact products keep operands in registers."""
    while spec.is_exact and size > 64 and size % 2 == 0:
        size //= 2
    return size


def _kernel(spec, chunk, tile, ids, x, states, adjoint, d_gates):
    """Adds what the state at the chunk's end passes on.

    Before key i it holds the state at the chunk's start, decayed, and what earlier keys have
    written: a sum of these terms alone, so that nothing cancels, however strong the gates are.
    """
    index, c, b = ids
    g, slot = index % spec.num_kv_heads, index // spec.num_kv_heads * tile
    c -= spec.key_blocks(chunk)[1]
    first = spec.origin + c * chunk
    keys = tokens.load_keys(spec, x, b, first + tiles.iota(chunk))
    to_end = tokens.reaches_end(spec, x, b, keys, first + chunk - 1)
    start = tokens.key_start(spec, x, b, first + chunk - 1)
    state = jnp.clip(c, 0, spec.chunks(chunk))
    end = jnp.minimum(state + 1, spec.chunks(chunk))
    g_CM = slot_tiles.load_log_decay(spec, x, b, keys, g, slot, tile)
    rows_part = slot_tiles.load_per_slot(spec, adjoint.gates, b, keys, g, slot, tile)
    # Keys, then values: what both read does not fit into the registers of two programs.
    d_write, carried = 0.0, 0.0
    for kind, y in enumerate((x.k if x.slot_k is None else x.slot_k, x.v)):
        size = _piece(spec, (spec.part_size, spec.value_size)[kind])
        for part in range((spec.key_size, spec.value_size)[kind] // size):
            args = (slot, tile, size, part)
            d = slot_tiles.load_slots(spec, adjoint[kind], (b, end, g), *args)
            h = slot_tiles.load_slots(spec, states[kind], (b, state, g), *args)
            y_C = tiles.load_features(y, b, keys.at, g, size, keys.valid, part)
            d_write += dot(y_C, d, spec, "b")
            carried += dot(d, h, spec, "b")

    d_write = tiles.where(to_end, d_write * decays.exact_to_end(g_CM, spec))
    # Of the products of all slots with all others those with themselves, on the matrix units.
    slots = tiles.iota(tile)
    carried = jnp.sum(jnp.where(slots[:, None] == slots[None, :], carried, 0), axis=0)
    carried *= jnp.exp(slot_tiles.load_total(spec, states, b, c, g, slot, tile))
    if start is not None:  # unless the document of the state at the start has ended
        carried = jnp.where(start < first, carried, 0)
    key = tiles.iota(chunk)
    earlier = key[None, :] < key[:, None]
    written = masked_sums(earlier, decays.write_strength(g_CM, spec) * d_write, spec)
    d_gate = tiles.where(to_end, carried[None, :] + written) - exp2(LOG2_E * g_CM, spec) * d_write
    d_gate = tiles.where(tokens.retiring(spec, keys)[:, None], d_gate + rows_part)
    slot_tiles.store_per_slot(spec, d_gates, b, keys, g, slot, d_gate)
