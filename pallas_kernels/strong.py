"""Launching a kernel for the chunks that decay mildly, then in place for those that do not."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gates
from pallas_kernels.blocks import Block
from pallas_kernels.launch import launch
from pallas_kernels.spec import Spec
from pallas_kernels.states import States

# Chunks that a program of the strong launch looks at: most find nothing to do.
_PER_PROGRAM = 16


def mild_then_strong(
    spec: Spec,
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    block: Block,
    locate: Callable[[Any, Any, Any], tuple[Any, Any, Any]],
    chunk: int,
    limit: float,
    heads: int = 1,
) -> Callable[..., Any]:
    """As `launch`, for a kernel(strong, ids, x, states, *inputs, outputs) that owns a chunk.

    The first launch does not ask: what it writes for a strong chunk, infinities maybe, the second
    one replaces.

    Args:
      kernel: `ids` are its place in the grid.
      locate: from a place in the grid to batch row, key/value head and chunk, which may lie outside
        of the chunks; the next place on axis 1 has the next chunk.
      chunk: rows and keys per chunk.
      limit: a chunk is strong if one of its slots decays by exp(-limit) or more.
      heads: places on axis 0 that a program of the first launch does at once; those of the second
        do one.
    """
    run = functools.partial(
        launch,
        out_shape=out_shape,
        num_stages=block.num_stages,
        interpret=spec.interpret,
    )
    count = len(jax.tree.leaves(out_shape))

    def mild(ids, *refs):
        kernel(False, ids, *refs)

    def strong(coarse, previous, x, states: States, *refs):
        def is_strong(ids, chunks: int):
            place = locate(*ids)
            return gates.any_strong(spec, states.totals, *place, chunks, spec.chunks(chunk), limit)

        first, second, third = coarse
        second *= _PER_PROGRAM

        def one(i, carry):
            ids = (first, second + i, third)
            inside = ids[1] < grid[1]
            pl.when(inside & is_strong(ids, 1))(lambda: kernel(True, ids, x, states, *refs))
            return carry

        @pl.when(is_strong((first, second, third), _PER_PROGRAM))
        def _():
            jax.lax.fori_loop(jnp.int32(0), jnp.int32(_PER_PROGRAM), one, jnp.int32(0))

    def both(*args):
        together = (grid[0] // heads, *grid[1:])
        results = run(mild, name=name, grid=together, num_warps=block.num_warps)(*args)
        if not spec.num_slots:
            return results
        coarse = (grid[0], -(-grid[1] // _PER_PROGRAM), grid[2])
        aliases = {i: i for i in range(count)}
        in_place = run(
            strong,
            name=f"{name}_strong",
            grid=coarse,
            num_warps=block.num_warps,
            input_output_aliases=aliases,
        )
        return in_place(results, *args)

    return both
