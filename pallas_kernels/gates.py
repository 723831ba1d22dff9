"""Decays inside one chunk: reading through them, writing back, and their transpose.

Between row r and key i <= r of a chunk the decay of slot m is `exp(G_r - G_i)`, G being the sum of
the log decays from the chunk's start. Split into `exp(G_r) exp(-G_i)` it makes matrix products,
which is exact enough as long as the chunk decays mildly. Where it decays strongly, pairs are split
at the middle of the smallest aligned block that holds both: the decay from the key to the middle
times that from the middle to the row, both sums of their own terms and at most 1, and again matrix
products, one for each size of block; nothing is clipped. Each kernel is launched once for the mild
chunks and once for the strong ones (few or none, as a rule): in one body the second way would cost
the first one its registers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import levels
from pallas_kernels.instructions import exp2, fma
from pallas_kernels.spec import Spec
from pallas_kernels.sums import masked_sums, wide_sums
from pallas_kernels.tiles import LOG2_E, dot, iota, load, repeated

# A chunk is mild while no slot decays by more than exp(-limit) in it. Forward, the factors have to
# stay within the range of float32 (float16 products are TF32 ones, with the same range). Backward,
# one of them meets gradients, which may be small: exp(-40) leaves them 20 decades until they
# underflow. And the differences that make the gradient of the gates cancel as decays grow: with all
# gates near the limit its error is 1.0e-2 in bfloat16, 1.4e-4 in float16 and 4e-6 in float32.
LIMIT = 60.0
BACKWARD_LIMIT = 40.0


class Gates(NamedTuple):
    """Of one chunk and one tile of slots."""

    log_decay: jax.Array  # [C,M]
    decay: jax.Array  # [C,M] exp(log decay)
    write: jax.Array  # [C,M] 1 - decay
    rows: jax.Array  # [C,M] exp(G_r), for each of a program's heads
    keys: jax.Array  # [C,M] exp(-G_i), 0 where the chunk decays strongly
    is_strong: bool


def chunk_gates(
    log_decay_CM: jax.Array, strong: bool, products: bool, spec: Spec, heads: int = 1
) -> Gates:
    """The gates of a chunk that is mild or strong, as the kernel's launch says.

    `products` allows 16-bit calls to sum up on the matrix units.
    """
    log2_decay_CM = LOG2_E * log_decay_CM
    if products and not strong and not spec.is_exact:
        summed = _summed_by_products(log2_decay_CM, spec)
    else:
        summed = jnp.cumsum(log2_decay_CM, axis=0)
    return Gates(
        log_decay=log_decay_CM,
        decay=exp2(log2_decay_CM, spec),
        write=write_strength(log_decay_CM, spec),
        rows=repeated(exp2(summed, spec), heads),
        keys=jnp.zeros_like(summed) if strong else exp2(-summed, spec),
        is_strong=strong,
    )


def _summed_by_products(x_CM: jax.Array, spec: Spec) -> jax.Array:
    """Running sum over rows, at a quarter of the cost of a scan."""
    row = iota(x_CM.shape[0])
    return masked_sums(row[None, :] <= row[:, None], x_CM, spec)


def write_strength(log_decay: jax.Array, spec: Spec) -> jax.Array:
    """1 - exp(log_decay), to 4e-5 for 16-bit calls, else to the dtype's precision.

    A library call's expm1 costs four times this.
    """
    if log_decay.dtype == jnp.float64:
        return -jnp.expm1(log_decay)
    x = log_decay
    if not spec.is_exact:
        return jnp.where(x > -1 / 64, -x * fma(x, 0.5, 1.0, spec), 1 - exp2(LOG2_E * x, spec))
    # Coefficients, not divisions, which take ten instructions each.
    series = -x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
    return jnp.where(x > -0.1, series, 1 - exp2(LOG2_E * x, spec))


def any_strong(spec: Spec, totals, b, g, first, chunks: int, count: int, limit: float) -> jax.Array:
    """Whether a slot decays by exp(-limit) or more in one of the chunks from `first` on.

    Chunks outside of 0 ... count - 1 have no decay.
    """
    slot = iota(1 << (spec.num_slots - 1).bit_length())[None, :]
    c = first + iota(chunks)[:, None]
    mask = (c >= 0) & (c < count) & (slot < spec.num_slots)
    return jnp.min(load(totals, b, jnp.clip(c, 0, count - 1), g, slot, mask=mask)) <= -limit


def to_end(gates: Gates, total_M: jax.Array, reaches, spec: Spec) -> jax.Array:
    """exp(G_end - G_i) [C,M], 0 for keys whose document ends in the chunk; `total` is G_end."""
    if not gates.is_strong:
        decay = jnp.exp(total_M)[None, :] * gates.keys
    else:
        decay = exact_to_end(gates.log_decay, spec)
    return decay if reaches is None else jnp.where(reaches, decay, 0)


def exact_to_end(log_decay_CM: jax.Array, spec: Spec) -> jax.Array:
    """exp(G_end - G_i) of any gates: a sum of the later ones alone; a difference loses digits."""
    row = iota(log_decay_CM.shape[0])
    later = row[None, :] > row[:, None]
    return exp2(masked_sums(later, LOG2_E * log_decay_CM, spec), spec)


def read(gates: Gates, state_CM: jax.Array, products_CC: jax.Array, spec: Spec) -> jax.Array:
    """exp(G_r) state[r,m] + sum_{i<=r} exp(G_r - G_i) write_i[m] products[r,i]: [C,M].

    The products are 0 for pairs that do not meet, i > r among them.
    """
    if not gates.is_strong:
        written = gates.keys * gates.write
        if not (spec.is_narrow and spec.overlaps):
            return gates.rows * (state_CM + dot(products_CC, written, spec))
        # Where a gate forgets all, slots are the last token that they hold, which the window reads,
        # too: rounded here alone, the two would differ.
        own = repeated(gates.write, products_CC.shape[0] // products_CC.shape[1])
        own *= levels.own_products(products_CC)
        products_CC = jnp.where(levels.own_pairs(*products_CC.shape), 0, products_CC)
        return own + gates.rows * (state_CM + dot(products_CC, written, spec))

    def level(exponent, out_CM):
        at = levels.level(gates.log_decay, exponent, spec)
        products = jnp.where(at.pairs, products_CC, 0)
        return out_CM + at.decay * dot(products, at.decay * gates.write, spec)

    own = gates.rows * state_CM + gates.write * levels.own_products(products_CC)
    return levels.over_levels(gates.decay.shape[0], level, own)


def write(gates: Gates, a_CM: jax.Array, pairs_CC: jax.Array, spec: Spec) -> jax.Array:
    """sum_m a[r,m] exp(G_r - G_i) write_i[m] where pairs meet, else 0: [C,C]."""
    if not gates.is_strong:
        to_keys = dot(a_CM * gates.rows, gates.keys * gates.write, spec, "b")
        return jnp.where(pairs_CC, to_keys, 0)

    def level(exponent, out_CC):
        at = levels.level(gates.log_decay, exponent, spec)
        to_keys = dot(a_CM * at.decay, at.decay * gates.write, spec, "b")
        return jnp.where(at.pairs, to_keys, out_CC)

    own = jnp.sum(a_CM * gates.write, axis=1)[:, None]
    own = jnp.where(levels.own_pairs(*pairs_CC.shape), own, 0)
    return jnp.where(pairs_CC, levels.over_levels(gates.decay.shape[0], level, own), 0)


def transposed(
    gates: Gates, spec: Spec, a_CM, products_CC, b_CM, other_products_CC
) -> tuple[jax.Array, jax.Array | float]:
    """Gradients of the chunk's reads.

    Returns:
      [C,M] that of the write strengths, sum_{r>=i} exp(G_r - G_i) f[r,i,m] with
        f[r,i,m] = products[r,i] a[r,m] + other_products[r,i] b[r,m];
      [C,M] where the chunk decays strongly, that of the log decays through the chunk's own pairs,
        sum_{i<j<=r} exp(G_r - G_i) write_i f[r,i,m] at j; else 0, as differences give it.
    """
    if not gates.is_strong:
        total = dot(products_CC, gates.rows * a_CM, spec, "a")
        total += dot(other_products_CC, gates.rows * b_CM, spec, "a")
        return gates.keys * total, 0.0

    row = iota(gates.decay.shape[0])

    def level(exponent, carry):
        d_write, d_decay = carry
        at = levels.level(gates.log_decay, exponent, spec)
        first, second = (jnp.where(at.pairs, y, 0) for y in (products_CC, other_products_CC))
        of_keys = dot(first, at.decay * a_CM, spec, "a")
        of_keys = at.decay * (of_keys + dot(second, at.decay * b_CM, spec, "a"))
        written = at.decay * gates.write
        of_rows = a_CM * dot(first, written, spec) + b_CM * dot(second, written, spec)
        through = jnp.where(at.right[:, None], at.decay * of_rows, gates.write * of_keys)
        # At j: what rows from j on have read across the middle, what keys before j have written.
        later = row[None, :] >= row[:, None]
        between = jnp.where(at.right[:, None], later, ~later)
        between &= at.half[:, None] == at.half[None, :]
        return d_write + of_keys, d_decay + wide_sums(between, through, spec)

    own = levels.own_products(products_CC) * a_CM + levels.own_products(other_products_CC) * b_CM
    return levels.over_levels(gates.decay.shape[0], level, (own, jnp.zeros_like(gates.write)))
