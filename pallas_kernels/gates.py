"""Decays inside one chunk: reading through them, and their transpose.

Between row r and key i <= r of a chunk the decay of slot m is `exp(G_r - G_i)`, G being the sum of
the log decays from the chunk's start. Split into `exp(G_r) exp(-G_i)` it makes matrix products, which
is exact enough as long as the chunk decays mildly. Where it decays strongly, the rows are visited one
by one with a running product of decays: every factor is at most 1, and nothing is clipped.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.spec import Spec
from pallas_kernels.tiles import dot, iota

# The products' factors stay within exp(+-LIMIT/2), as G is centred on the chunk's middle.
FORWARD_LIMIT = 60.0
# The gradient of the gates takes differences that cancel where a chunk decays strongly.
BACKWARD_LIMIT = 24.0
# float16 products are TF32 ones, whose range is float32's.


class Gates(NamedTuple):
    """Of one chunk and one tile of slots."""

    log_decay: jax.Array  # [C,M]
    decay: jax.Array  # [C,M] exp(log decay)
    write: jax.Array  # [C,M] 1 - decay
    summed: jax.Array  # [C,M] G_r
    total: jax.Array  # [M] G over the chunk
    is_mild: jax.Array  # [] whether the split into factors holds


def chunk_gates(log_decay_CM: jax.Array, limit: float) -> Gates:
    total = jnp.sum(log_decay_CM, axis=0)
    return Gates(
        log_decay=log_decay_CM,
        decay=jnp.exp(log_decay_CM),
        write=-jnp.expm1(log_decay_CM),
        summed=jnp.cumsum(log_decay_CM, axis=0),
        total=total,
        is_mild=jnp.min(total) > -limit,
    )


def factors(gates: Gates) -> tuple[jax.Array, jax.Array]:
    """exp(G_r - c) and exp(c - G_i), c half the chunk's sum; finite where the chunk is mild."""
    centred = gates.summed - 0.5 * gates.total[None, :]
    return jnp.exp(centred), jnp.exp(-centred)


def read(gates: Gates, products_CC: jax.Array, spec: Spec) -> jax.Array:
    """sum_{i<=r} exp(G_r - G_i) write_i[m] products[r,i]: [C,M]; products are 0 for pairs i > r."""

    def mild():
        rows, keys = factors(gates)
        return rows * dot(products_CC, keys * gates.write, spec)

    def strong():
        def row(r, carry):
            decays_CM, out_CM = carry
            decays_CM = advance(gates, decays_CM, r)
            out_M = jnp.sum(take_row(products_CC, r)[:, None] * decays_CM, axis=0)
            return decays_CM, put_row(out_CM, r, out_M)

        zeros = jnp.zeros_like(gates.write)
        return loop(zeros.shape[0], row, (zeros, zeros))[1]

    return jax.lax.cond(gates.is_mild, mild, strong)


def write(gates: Gates, a_CM: jax.Array, pairs_CC: jax.Array, spec: Spec) -> jax.Array:
    """sum_m a[r,m] exp(G_r - G_i) write_i[m] where pairs, else 0: [C,C]."""

    def mild():
        rows, keys = factors(gates)
        return dot(a_CM * rows, keys * gates.write, spec, "b")

    def strong():
        def row(r, carry):
            decays_CM, out_CC = carry
            decays_CM = advance(gates, decays_CM, r)
            out_C = jnp.sum(take_row(a_CM, r)[None, :] * decays_CM, axis=1)
            return decays_CM, put_row(out_CC, r, out_C)

        zeros = jnp.zeros_like(gates.write)
        size = zeros.shape[0]
        return loop(size, row, (zeros, jnp.zeros((size, size), zeros.dtype)))[1]

    return jnp.where(pairs_CC, jax.lax.cond(gates.is_mild, mild, strong), 0)


def transposed(
    gates: Gates, spec: Spec, a_CM, products_CC, b_CM, other_products_CC
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the chunk's reads.

    Returns:
      [C,M] that of the write strengths, sum_{r>=i} exp(G_r - G_i) f[r,i,m] with
        f[r,i,m] = products[r,i] a[r,m] + other_products[r,i] b[r,m];
      [C,M] where the chunk decays strongly, that of the log decays through the chunk's own pairs,
        sum_{i<j<=r} exp(G_r - G_i) write_i f[r,i,m] at j; else 0, as differences give it.
    """
    zeros = jnp.zeros_like(gates.write)

    def mild():
        rows, keys = factors(gates)
        total = dot(products_CC, rows * a_CM, spec, "a")
        total += dot(other_products_CC, rows * b_CM, spec, "a")
        return keys * total, zeros

    def strong():
        index = iota(zeros.shape[0])[:, None]

        def row(r, carry):
            decays_CM, d_write, d_decay = carry
            # exp(G_r - G_i), without the write strength
            decayed = decays_CM * take_row(gates.decay, r)[None, :]
            decays_CM = jnp.where(index == r, 1, decayed)
            f_CM = take_row(products_CC, r)[:, None] * take_row(a_CM, r)[None, :]
            f_CM += take_row(other_products_CC, r)[:, None] * take_row(b_CM, r)[None, :]
            f_CM *= decays_CM
            written = gates.write * f_CM
            before = jnp.cumsum(written, axis=0) - written
            return decays_CM, d_write + f_CM, d_decay + jnp.where(index <= r, before, 0)

        return loop(zeros.shape[0], row, (zeros, zeros, zeros))[1:]

    return jax.lax.cond(gates.is_mild, mild, strong)


def advance(gates: Gates, decays_CM: jax.Array, r) -> jax.Array:
    """From exp(G_{r-1} - G_i) write_i to exp(G_r - G_i) write_i, 0 for i > r."""
    is_row = iota(decays_CM.shape[0])[:, None] == r
    return jnp.where(is_row, gates.write, decays_CM * take_row(gates.decay, r)[None, :])


def take_row(x: jax.Array, r) -> jax.Array:
    """Row r of a value, which this lowering cannot index."""
    return jnp.sum(jnp.where(iota(x.shape[0])[:, None] == r, x, 0), axis=0)


def put_row(x: jax.Array, r, row: jax.Array) -> jax.Array:
    return jnp.where(iota(x.shape[0])[:, None] == r, row[None, :], x)


def loop(count: int, body, carry):
    """`fori_loop` whose index is int32 under 64-bit types, too."""
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, carry)
