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
    before: Any = None,
) -> Callable[..., Any]:
    """As `launch`, for a kernel(strong, ids, x, states, *inputs, outputs) that owns a chunk.

    Args:
      kernel: `ids` are its place in the grid.
      locate: from a place in the grid to batch row, key/value head and chunk, which may lie outside
        of the chunks; the next place on axis 1 has the next chunk.
      chunk: rows and keys per chunk.
      limit: a chunk is strong if one of its slots decays by exp(-limit) or more.
      before: a tuple of arrays that the last outputs add to, or None; the kernel gets it (as far as
        it is written) ahead of x.
    """
    run = functools.partial(
        launch,
        out_shape=out_shape,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        interpret=spec.interpret,
    )
    count, written = len(jax.tree.leaves(out_shape)), len(jax.tree.leaves(before))

    def is_strong(totals, ids, chunks: int):
        return gates.is_strong(spec, totals, *locate(*ids), chunks, spec.chunks(chunk), limit)

    def mild(*refs):
        ids = tuple(pl.program_id(axis) for axis in range(3))
        if not spec.num_slots:
            return kernel(False, ids, *refs)
        states: States = refs[1 if before is None else 2]
        pl.when(~is_strong(states.totals, ids, 1))(lambda: kernel(False, ids, *refs))

    def strong(previous, *refs):
        totals = refs[1].totals
        if before is not None:
            so_far = iter(jax.tree.leaves(previous)[count - written :])
            refs = (tuple(None if array is None else next(so_far) for array in before), *refs)
        # Asked for outside of the loop: interpretation knows them only there.
        first, second, third = (pl.program_id(axis) for axis in range(3))
        second *= _PER_PROGRAM

        def one(i, carry):
            ids = (first, second + i, third)
            inside = ids[1] < grid[1]
            pl.when(inside & is_strong(totals, ids, 1))(lambda: kernel(True, ids, *refs))
            return carry

        @pl.when(is_strong(totals, (first, second, third), _PER_PROGRAM))
        def _():
            jax.lax.fori_loop(jnp.int32(0), jnp.int32(_PER_PROGRAM), one, jnp.int32(0))

    def both(*args):
        first = args if before is None else (before, *args)
        aliases = {i: count - written + i for i in range(written)}
        results = run(mild, name=name, grid=grid, input_output_aliases=aliases)(*first)
        if not spec.num_slots:
            return results
        coarse = (grid[0], -(-grid[1] // _PER_PROGRAM), grid[2])
        aliases = {i: i for i in range(count)}
        in_place = run(strong, name=f"{name}_strong", grid=coarse, input_output_aliases=aliases)
        return in_place(results, *args)

    return both
