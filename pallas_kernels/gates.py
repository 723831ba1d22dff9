"""Decays inside one chunk: reading through them, writing back, and their transpose.

Between row r and key i <= r of a chunk the decay of slot m is `exp(G_r - G_i)`, G being the sum of
the log decays from the chunk's start. Split into `exp(G_r) exp(-G_i)` it makes matrix products,
which is exact enough as long as the chunk decays mildly. Where it decays strongly, the rows are
visited one by one with a running product of decays: every factor is at most 1, and nothing is
clipped. Each kernel is launched once for the mild chunks and once for the strong ones (few or none,
as a rule): in one body the second way would cost the first one its registers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.spec import Spec
from pallas_kernels.tiles import LOG2_E, dot, iota, load

# A chunk is mild while no slot decays by more than exp(-LIMIT) in it: the factors have to stay
# within the range of float32 (float16 products are TF32 ones, with the same range).
LIMIT = 60.0


def gate_gradient_limit(spec: Spec) -> float:
    """The same for the gradient of the gates: its differences cancel as decays grow.

    The error with the limit that is returned, where every gate is at it, against a tolerance of:
    bfloat16 1.0e-2 (1.5e-2 with a limit of 60), 2e-2; float16 1.4e-4, 5e-3; float32 4e-6, 1e-4.
    """
    return 40.0 if spec.dtype == jnp.bfloat16 else LIMIT


class Gates(NamedTuple):
    """Of one chunk and one tile of slots."""

    log_decay: jax.Array  # [C,M]
    decay: jax.Array  # [C,M] exp(log decay)
    write: jax.Array  # [C,M] 1 - decay
    total: jax.Array  # [M] log decay over the chunk
    rows: jax.Array  # [C,M] exp(G_r)
    keys: jax.Array  # [C,M] exp(-G_i), 0 where the chunk decays strongly
    is_strong: bool


def chunk_gates(log_decay_CM: jax.Array, strong: bool, products: bool, spec: Spec) -> Gates:
    """The gates of a chunk that is mild or strong, as the kernel's launch says.

    `products` allows 16-bit calls to sum up on the matrix units.
    """
    log2_decay_CM = LOG2_E * log_decay_CM
    if products and not strong and jnp.dtype(spec.dtype).itemsize == 2:
        summed = _summed_by_products(log2_decay_CM, spec)
    else:
        summed = jnp.cumsum(log2_decay_CM, axis=0)
    return Gates(
        log_decay=log_decay_CM,
        decay=jnp.exp2(log2_decay_CM),
        write=write_strength(log_decay_CM),
        total=jnp.sum(log_decay_CM, axis=0),
        rows=jnp.exp2(summed),
        keys=jnp.zeros_like(summed) if strong else jnp.exp2(-summed),
        is_strong=strong,
    )


def _summed_by_products(x_CM: jax.Array, spec: Spec) -> jax.Array:
    """Running sum over rows on the matrix units, to 2^-17 of the sum, at a quarter of the cost."""
    earlier = iota(x_CM.shape[0])[None, :] <= iota(x_CM.shape[0])[:, None]
    high = x_CM.astype(jnp.bfloat16)
    low = (x_CM - high.astype(x_CM.dtype)).astype(jnp.bfloat16)
    earlier, *terms = (y.astype(jnp.bfloat16) for y in (earlier, high, low))
    if spec.interpret:  # exact in float32, too, and XLA's CPU backend lacks some narrow products
        earlier, *terms = (y.astype(jnp.float32) for y in (earlier, *terms))
    summed = [jnp.dot(earlier, y, preferred_element_type=jnp.float32) for y in terms]
    return summed[0] + summed[1]


def write_strength(log_decay: jax.Array) -> jax.Array:
    """1 - exp(log_decay) to the dtype's precision; a library call's expm1 costs four times this."""
    if log_decay.dtype == jnp.float64:
        return -jnp.expm1(log_decay)
    x = log_decay
    # Coefficients, not divisions, which take ten instructions each.
    series = -x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
    return jnp.where(x > -0.1, series, 1 - jnp.exp2(LOG2_E * x))


def any_strong(spec: Spec, totals, b, g, first, chunks: int, count: int, limit: float) -> jax.Array:
    """Whether a slot decays by exp(-limit) or more in one of the chunks from `first` on.

    Chunks outside of 0 ... count - 1 have no decay.
    """
    slot = iota(1 << (spec.num_slots - 1).bit_length())[None, :]
    c = first + iota(chunks)[:, None]
    mask = (c >= 0) & (c < count) & (slot < spec.num_slots)
    return jnp.min(load(totals, b, jnp.clip(c, 0, count - 1), g, slot, mask=mask)) <= -limit


def to_end(gates: Gates, reaches) -> jax.Array:
    """exp(G_end - G_i) [C,M], 0 for keys whose document ends in the chunk."""
    if not gates.is_strong:
        decay = jnp.exp(gates.total)[None, :] * gates.keys
    else:  # the sum of the later ones alone: G_end - G_i would lose digits
        size = gates.decay.shape[0]
        later = jnp.where(iota(size)[:, None] < iota(size)[None, :], 1.0, 0.0)
        later = later.astype(gates.decay.dtype)
        decay = jnp.exp(jnp.dot(later, gates.log_decay, precision=jax.lax.Precision.HIGHEST))
    return decay if reaches is None else jnp.where(reaches, decay, 0)


def read(gates: Gates, state_CM: jax.Array, products_CC: jax.Array, spec: Spec) -> jax.Array:
    """exp(G_r) state[r,m] + sum_{i<=r} exp(G_r - G_i) write_i[m] products[r,i]: [C,M].

    The products are 0 for pairs that do not meet, i > r among them.
    """
    if not gates.is_strong:
        return gates.rows * (state_CM + dot(products_CC, gates.keys * gates.write, spec))

    def row(r, carry):
        decays_CM, out_CM = carry
        decays_CM = advance(gates, decays_CM, r)
        out_M = jnp.sum(take_row(products_CC, r)[:, None] * decays_CM, axis=0)
        return decays_CM, put_row(out_CM, r, out_M)

    zeros = jnp.zeros_like(gates.write)
    return gates.rows * state_CM + loop(zeros.shape[0], row, (zeros, zeros))[1]


def write(gates: Gates, a_CM: jax.Array, pairs_CC: jax.Array, spec: Spec) -> jax.Array:
    """sum_m a[r,m] exp(G_r - G_i) write_i[m] where pairs meet, else 0: [C,C]."""
    if not gates.is_strong:
        to_keys = dot(a_CM * gates.rows, gates.keys * gates.write, spec, "b")
        return jnp.where(pairs_CC, to_keys, 0)

    def row(r, carry):
        decays_CM, out_CC = carry
        decays_CM = advance(gates, decays_CM, r)
        out_C = jnp.sum(take_row(a_CM, r)[None, :] * decays_CM, axis=1)
        return decays_CM, put_row(out_CC, r, out_C)

    zeros = jnp.zeros_like(gates.write)
    size = zeros.shape[0]
    to_keys = loop(size, row, (zeros, jnp.zeros((size, size), zeros.dtype)))[1]
    return jnp.where(pairs_CC, to_keys, 0)


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

    zeros = jnp.zeros_like(gates.write)
    index = iota(zeros.shape[0])[:, None]

    def row(r, carry):
        decays_CM, d_write, d_decay = carry
        # exp(G_r - G_i), without the write strength
        decays_CM = jnp.where(index == r, 1, decays_CM * take_row(gates.decay, r)[None, :])
        f_CM = take_row(products_CC, r)[:, None] * take_row(a_CM, r)[None, :]
        f_CM += take_row(other_products_CC, r)[:, None] * take_row(b_CM, r)[None, :]
        f_CM *= decays_CM
        written = gates.write * f_CM
        before = jnp.cumsum(written, axis=0) - written
        return decays_CM, d_write + f_CM, d_decay + jnp.where(index <= r, before, 0)

    return loop(zeros.shape[0], row, (zeros, zeros, zeros))[1:]


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
    """`fori_loop` whose index is int32 under 64-bit types, too; a single turn is no loop at all."""
    if count == 1:
        return body(jnp.int32(0), carry)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, carry)
