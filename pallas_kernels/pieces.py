"""Large calls, piece by piece: the kernels' offsets into an array are 32-bit integers.

Every array of a call has a batch axis, most a head axis, and nothing crosses either: pieces are
calls of some rows of the batch and, where one row alone is too large, of some key/value heads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Elements of an array that 32-bit offsets reach.
LIMIT = 2**31
# Programs along a grid's second and third axis in CUDA.
_PROGRAMS = 2**16 - 1


def in_pieces(
    function: Callable[..., Any],
    in_dims: Any,
    out_dims: Any,
    elements: int,
    programs: int = 1,
    limit: int | None = None,
) -> Callable[..., Any]:
    """`function` of arrays to arrays, called for pieces whose arrays all stay within the limit.

    Args:
      function: takes pytrees of arrays, of any number of rows and heads.
      in_dims: the arguments' trees with a string of letters for each array, as in `distribute`.
      out_dims: likewise for the result.
      elements: of the largest array that the function reads or writes, per row of the batch and
        key/value head.
      programs: along one axis of a grid, per row of the batch.
      limit: elements that one array may have. None: `LIMIT`.

    Raises:
      NotImplementedError: (when called) one row's one head is too large.
    """
    ins, outs = ([d.lower() for d in jax.tree.leaves(dims)] for dims in (in_dims, out_dims))
    most = LIMIT if limit is None else limit

    def run(*args):
        arrays, tree = jax.tree.flatten(args)
        sizes = [dict(zip(d, x.shape, strict=True)) for d, x in zip(ins, arrays, strict=True)]
        rows = max(size["b"] for size in sizes)
        heads = next(size["g"] for size in sizes if "g" in size)
        if rows * heads * elements <= most and rows * programs <= _PROGRAMS:
            return function(*args)
        if elements > most:
            raise NotImplementedError(
                f"one sequence of one head takes arrays of {elements} elements; the Pallas kernels "
                f"reach {most}: use implementation='xla', or shorter calls and a cache"
            )
        some_heads = min(most // elements, heads)
        some_rows = max(min(most // (elements * heads), _PROGRAMS // programs), 1)

        def piece(row, head):
            def cut(x, letters):
                index = []
                for letter, size in zip(letters, x.shape, strict=True):
                    first, count, whole = {
                        "b": (row, some_rows, rows),
                        "g": (head, some_heads, heads),
                        "n": (head, some_heads, heads),
                    }.get(letter, (0, 1, 1))
                    each = size // whole  # query heads per key/value head; 0 where rows agree
                    index.append(slice(first * each, (first + count) * each) if each else slice(1))
                return x[tuple(index)]

            parts = [cut(x, d) for x, d in zip(arrays, ins, strict=True)]
            return jax.tree.flatten(function(*jax.tree.unflatten(tree, parts)))

        found, out_tree = [], None
        for row in range(0, rows, some_rows):
            across = []
            for head in range(0, heads, some_heads):
                leaves, out_tree = piece(row, head)
                across.append(leaves)
            found.append(
                [_over_heads(x, d) for x, d in zip(zip(*across, strict=True), outs, strict=True)]
            )
        joined = [jnp.concatenate(x, axis=0) for x in zip(*found, strict=True)]
        return jax.tree.unflatten(out_tree, joined)

    return run


def _over_heads(parts, letters: str) -> jax.Array:
    axes = [letters.index(letter) for letter in "ng" if letter in letters]
    return jnp.concatenate(parts, axes[0]) if axes else parts[0]
