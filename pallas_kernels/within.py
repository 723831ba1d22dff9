"""Blocks of rows and keys that lie within one document, as most do.

They are what they would be in a call without documents, but for an offset between the indices of
tokens and their places: no addresses, masks and bounds of each row by itself, which take registers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.spec import Offset, Operands, Spec
from pallas_kernels.tiles import batch_index, load


def apart(
    spec: Spec,
    x: Operands,
    b,
    *,
    lowest: jax.Array,
    last: jax.Array,
    start: jax.Array,
    body: Callable[[Spec, Operands], None],
) -> None:
    """body(spec, x), without tables where the tokens allow it.

    Args:
      lowest: the first token that is read.
      last: the last one.
      start: where their document must have begun, or before.
      body: a kernel's, which stores its results.
    """
    # With a cache, slots and keys stand before the first token: that is left to tables.
    if not spec.tables or spec.past or x.source is None or x.slots_k is not None:
        return body(spec, x)
    at = jnp.clip(last, 0, spec.rows - 1)
    reach, begun, place = (load(y, batch_index(y, b), at) for y in (x.reach, x.start, x.source))
    low = load(x.source, batch_index(x.source, b), jnp.clip(lowest, 0, spec.rows - 1))
    inside = (lowest >= 0) & (last < spec.rows)
    together = (reach >= 0) & (begun <= start) & (place - low == last - lowest)
    is_one = inside & together

    @pl.when(is_one)
    def _():
        plain = dataclasses.replace(spec, tables=False)
        body(plain, x._replace(source=Offset(place - last)))

    @pl.when(~is_one)
    def _():
        body(spec, x)
