"""Adjoint states: the gradient of the slots at each chunk's start.

Every chunk's own contribution is computed side by side, summed over a group's query heads; then one
scan goes backwards over the chunks. The first kernel adds up the log decays' gradient through the
chunk's rows, too, which takes the same probabilities.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gates as decays
from pallas_kernels import slot_gates, slot_tiles, tiles, tokens, within
from pallas_kernels.adjoint_scan import Adjoint, InitialGradients, adjoint_scan
from pallas_kernels.blocks import Block
from pallas_kernels.outputs import Outputs
from pallas_kernels.queries import Cotangents, QueryGradients
from pallas_kernels.rebuild import load_head, slot_gradients
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States
from pallas_kernels.strong import mild_then_strong
from pallas_kernels.tiles import dot, iota


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
    tile = slot_tiles.tile_size(spec, block)
    shape = jax.ShapeDtypeStruct
    adjoint = mild_then_strong(
        spec,
        functools.partial(_contributions, spec, chunk, tile, block),
        name="nha_adjoint_contributions",
        locate=lambda i, c, b: (b, i % g, c),
        chunk=chunk,
        limit=decays.BACKWARD_LIMIT,
        grid=(slot_tiles.tile_count(spec, block) * g, count, batch),
        out_shape=Adjoint(
            shape((batch, count + 1, g, m, spec.key_size), spec.adjoint),
            shape((batch, count + 1, g, m, spec.value_size), spec.adjoint),
            shape((batch, count, g, m), spec.wide),
            shape(x.log_decay.shape, spec.wide),
        ),
        block=block,
    )(x, states, results, cotangents, queries)

    return adjoint_scan(spec, count, scan, x, adjoint, final)


def _contributions(spec, chunk, tile, block, strong, ids, x, *refs):
    def body(spec, x):
        _body(spec, chunk, tile, block, strong, ids, x, *refs)

    if strong:
        return body(spec, x)
    c, b = ids[1:]
    first, last = spec.origin + c * chunk, spec.shift + (c + 1) * chunk - 1
    # What slots hold at the chunk's start is of the same document, too.
    within.apart(spec, x, b, lowest=first, last=last, start=first - 1, body=body)


def _body(spec, chunk, tile, block, strong, ids, x, states, results, cotangents, queries, out):
    index, c, b = ids
    g, first = index % spec.num_kv_heads, index // spec.num_kv_heads * tile
    rows = tokens.load_rows(spec, x, b, spec.shift + c * chunk, chunk)
    view = slot_tiles.chunk_view(spec, x, b, c, chunk, rows)
    keys_and_values = slot_tiles.load_in_turn(spec, x, b, view.keys, g, block.reload)
    k, v_CV = keys_and_values(jnp.int32(0))
    state = slot_tiles.load_tile(spec, x, states, b, g, view, first, tile)

    def load(h):
        args = (results, cotangents, queries, b, g * spec.group + h, rows.in_turn(h, spec))
        return load_head(spec, x, *args)

    # All loads before the first product, which waits for its own.
    single = load(0) if spec.group == 1 else None
    gates = decays.chunk_gates(state.log_decay, strong, block.products, spec)

    def store_gates(of_gates):
        d_gates = slot_gates.through_rows(spec, gates, view, *of_gates)
        slot_tiles.store_per_slot(spec, out.gates, b, view.keys, g, first, d_gates)

    def head(h, carry):
        of_gates, d_k, d_v = carry
        q, do_CV, lse, delta = load(h) if single is None else single
        args = (view.in_turn(h, spec), first, state, gates)
        k, v_CV = keys_and_values(h)
        slots = slot_gradients(spec, *args, q, k, do_CV, v_CV, lse, delta)
        added = slot_gates.of_rows(spec, gates, slots)
        if of_gates is None:
            store_gates(added)  # before the sums, which need the registers
        else:
            of_gates = tuple(a + y for a, y in zip(of_gates, added, strict=True))
        to_keys = tiles.where(view.has_state, spec.scale * slots.dz * gates.rows)
        to_values = tiles.where(view.has_state, slots.p * gates.rows)
        # Features by slots: matrix units take 64 rows at a time, and tiles of slots may be narrow.
        d_k = tuple(d + dot(part, to_keys, spec, "a") for d, part in zip(d_k, q, strict=True))
        return of_gates, d_k, d_v + dot(do_CV, to_values, spec, "a")

    zeros = (
        None
        if spec.group == 1
        else (jnp.zeros(state.log_decay.shape, spec.wide),) * (3 if strong else 2),
        tuple(jnp.zeros((part.shape[1], tile), spec.wide) for part in k),
        jnp.zeros((v_CV.shape[1], tile), spec.wide),
    )
    of_gates, d_k, d_v = tiles.loop(spec.group, head, zeros)

    if of_gates is not None:
        store_gates(of_gates)
    for part, value in enumerate(d_k):
        slot_tiles.store_slots(spec, out.k, (b, c, g), first, spec.part_size, value.T, part)
    slot_tiles.store_slots(spec, out.v, (b, c, g), first, spec.value_size, d_v.T)
    slot = first + iota(tile)
    decay = jnp.exp(slot_tiles.load_total(spec, states, b, c, g, first, tile))
    if spec.tables:
        start = tokens.key_start(spec, x, b, spec.origin + (c + 1) * chunk - 1)
        decay = jnp.where(start < spec.origin + c * chunk, decay, 0)
    plgpu.store(out.decay.at[b, c, g, slot], decay, mask=slot < spec.num_slots)
