"""What a block of rows reads, again in the backward pass: the window's keys, and tiles of slots."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import gates as decays
from pallas_kernels import slot_tiles, tiles, tokens, walk
from pallas_kernels.blocks import Block
from pallas_kernels.rebuild import Sums, probabilities, slot_gradients, sums
from pallas_kernels.slot_tiles import ChunkView
from pallas_kernels.spec import Operands, Spec
from pallas_kernels.states import States
from pallas_kernels.tiles import dot, dot_parts
from pallas_kernels.tokens import Rows
from pallas_kernels.walk import Walk


class WindowReads(NamedTuple):
    """What the walk over the window takes."""

    x: Operands
    at: tuple  # batch row, key/value head
    rows: Rows
    over: Walk
    q: tuple  # rotated
    do: jax.Array  # [C,V]
    lse: jax.Array  # [C]

    def fold(self, spec: Spec, body: Callable[..., Any], carry: Any) -> Any:
        """`body(carry, p, do . v, keys)` for the blocks of keys that rows read."""
        b, g = self.at

        def step(masked, keys, carry):
            k = tokens.load_window_keys(spec, self.x, b, keys, g)
            v_JV = tiles.load_features(self.x.v, b, keys.at, g, spec.value_size, keys.valid)
            mask = tokens.in_window(spec, self.rows, keys) if masked else None
            scores = dot_parts(self.q, k, spec, "b")
            p = probabilities(spec, scores, self.lse[:, None], mask)
            return body(carry, p, dot(self.do, v_JV, spec, "b"), k)

        return walk.walk(spec, self.x, b, self.rows, self.over, step, carry)


class SlotReads(NamedTuple):
    """What the loop over tiles of slots takes."""

    chunk: int
    block: Block
    strong: bool
    x: Operands
    states: States
    at: tuple  # batch row, key/value head, chunk
    rows: Rows
    q: tuple
    do: jax.Array  # [C,V]
    lse: jax.Array  # [C]

    def load(self, spec: Spec) -> tuple[ChunkView, tuple, Callable[..., tuple]]:
        """The chunk, its keys, and from a tile's number and delta its state, gates, gradients."""
        b, g, c = self.at
        view = slot_tiles.chunk_view(spec, self.x, b, c, self.chunk, self.rows)
        k = slot_tiles.load_retiring_keys(spec, self.x, b, view.keys, g)
        keys = view.keys
        v_CV = tiles.load_features(self.x.v, b, keys.at, g, spec.value_size, keys.valid)
        heads = self.rows.row.shape[0] // self.chunk
        tile = slot_tiles.tile_size(spec, self.block)

        def gradients(i, delta):
            first = i * tile
            state = slot_tiles.load_tile(spec, self.x, self.states, b, g, view, first, tile)
            products = self.block.products
            gates = decays.chunk_gates(state.log_decay, self.strong, products, spec, heads)
            of_tile = (view, first, state, gates)
            of_rows = (self.do, v_CV, self.lse, delta)
            return state, gates, slot_gradients(spec, *of_tile, self.q, k, *of_rows)

        return view, k, gradients


def exact_delta(spec: Spec, window: WindowReads | None, slots: SlotReads) -> jax.Array:
    """do . o [C] of all that rows read, not of outputs that were rounded."""
    zeros = jnp.zeros(slots.lse.shape, spec.wide)
    total = Sums(zeros, zeros)
    if window is not None:

        def add(total, p, u, keys):
            return jax.tree.map(jnp.add, total, sums(p, u))

        total = window.fold(spec, add, total)
    if spec.num_slots:
        gradients = slots.load(spec)[-1]

        def add_tile(i, total):
            return jax.tree.map(jnp.add, total, gradients(i, None)[-1].sums)

        total = tiles.loop(slot_tiles.tile_count(spec, slots.block), add_tile, total)
    return total.delta
