"""Sums over a chunk's rows on the matrix units."""

import jax
import jax.numpy as jnp

from pallas_kernels.spec import Spec


def masked_sums(mask_CC: jax.Array, x_CM: jax.Array, spec: Spec) -> jax.Array:
    """At each row the sum of x over the rows that the mask names, on the matrix units.

    x is cut into bfloat16 numbers: two leave 2^-17 of it for 16-bit calls, three nothing.
    """
    if spec.wide == jnp.float64:
        return jnp.dot(mask_CC.astype(x_CM.dtype), x_CM)
    # Exact in float32, too, and XLA's CPU backend lacks some narrow products.
    narrow = jnp.float32 if spec.interpret else jnp.bfloat16
    mask = jnp.where(mask_CC, narrow(1), narrow(0))  # a conversion takes twice as long
    total = jnp.zeros_like(x_CM)
    for _ in range(3 if spec.is_exact else 2):
        term = x_CM.astype(jnp.bfloat16)
        x_CM = x_CM - term.astype(x_CM.dtype)
        total += jnp.dot(mask, term.astype(narrow), preferred_element_type=jnp.float32)
    return total


def wide_sums(mask_CC: jax.Array, x_CM: jax.Array, spec: Spec) -> jax.Array:
    """mask @ x of terms that may cancel, which bfloat16 would not survive."""
    precision = jax.lax.Precision.HIGHEST if spec.is_exact else jax.lax.Precision.DEFAULT
    mask = jnp.where(mask_CC, jnp.ones_like(x_CM, shape=()), 0)
    return jnp.dot(mask, x_CM, precision=precision, preferred_element_type=spec.wide)
