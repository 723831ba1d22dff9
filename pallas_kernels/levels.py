"""Pairs of rows and keys of a chunk, sorted by the smallest aligned block that holds both.

Such a pair stands on both sides of the block's middle. The decay between them is that from the key
to the middle times that from the middle to the row: both at most 1, however strong they are, so
that pairs of one size of block make matrix products without overflow.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.instructions import exp2
from pallas_kernels.spec import Spec
from pallas_kernels.sums import masked_sums
from pallas_kernels.tiles import LOG2_E, iota, loop, repeated_iota


class Level(NamedTuple):
    """Pairs of a strong chunk that stand on both sides of the middle of a block of 2h rows."""

    pairs: jax.Array  # [C,C] row in the right half, key in the left half of one block
    right: jax.Array  # [C] rows in right halves
    half: jax.Array  # [C] which half of h rows
    decay: jax.Array  # [C,M] right: from the middle to the row; left: from the key to the middle


def level(log_decay_CM: jax.Array, exponent, spec: Spec) -> Level:
    """h = 2^exponent."""
    row = iota(log_decay_CM.shape[0])
    half = row >> exponent
    right = (half & 1) == 1
    same = half[:, None] == half[None, :]
    until = jnp.where(right[:, None], row[None, :] <= row[:, None], row[None, :] > row[:, None])
    decay = exp2(masked_sums(same & until, LOG2_E * log_decay_CM, spec), spec)
    block = row >> (exponent + 1)
    pairs = right[:, None] & ~right[None, :] & (block[:, None] == block[None, :])
    return Level(pairs, right, half, decay)


def over_levels(size: int, body, carry):
    """`body(exponent, carry)` for every size of half from 1 to half a chunk."""
    return loop(size.bit_length() - 1, body, carry)


def own_pairs(rows: int, keys: int) -> jax.Array:
    """The pairs of a row with its own key, whose decay is 1; of each head's rows."""
    return repeated_iota(keys, rows // keys)[:, None] == iota(keys)[None, :]


def own_products(products_CC: jax.Array) -> jax.Array:
    """Products of each row and its own key, [C,1]."""
    own = jnp.where(own_pairs(*products_CC.shape), products_CC, 0)
    return jnp.sum(own, axis=1)[:, None]
