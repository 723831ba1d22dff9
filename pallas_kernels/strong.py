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
_PER_PROGRAM = 8


def mild_then_strong(
    spec: Spec,
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    block: Block,
    before: Any = None,
) -> Callable[..., Any]:
    """As `launch`, for a kernel(strong, ids, *inputs, outputs) that owns chunk ids[1].

    With `before`, a tuple of arrays that the last outputs add to, or None, the kernel gets it (as far
    as it is written) before the inputs.
    """
    run = functools.partial(
        launch,
        out_shape=out_shape,
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        interpret=spec.interpret,
    )
    count, written = len(jax.tree.leaves(out_shape)), len(jax.tree.leaves(before))

    def mild(*refs):
        kernel(False, tuple(pl.program_id(axis) for axis in range(3)), *refs)

    def strong(previous, *refs):
        if before is not None:
            so_far = iter(jax.tree.leaves(previous)[count - written :])
            refs = (tuple(None if array is None else next(so_far) for array in before), *refs)

        # Asked for outside of the loop: interpretation knows them only there.
        first, second, third = (pl.program_id(axis) for axis in range(3))

        def one(i, carry):
            index = second * _PER_PROGRAM + i

            @pl.when(index < grid[1])
            def _():
                kernel(True, (first, index, third), *refs)

            return carry

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


def when_strong(spec: Spec, states: States | None, at, chunk: int, limit: float, strong: bool):
    """`pl.when` the program's chunk is of the launch's kind; without slots every chunk is mild."""
    if not spec.num_slots:
        return lambda body: body()
    b, _, g, c = at
    found = gates.is_strong(spec, states.totals, b, c, spec.chunks(chunk), g, limit)
    return pl.when(found if strong else ~found)
