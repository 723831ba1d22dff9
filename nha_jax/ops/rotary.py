"""Rotary position embedding, half-split pairing (element i with element i + K/2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "B T H K"], rope: tuple[jax.Array, jax.Array] | None
) -> Float[Array, "B T H K"]:
    """Rotates by tables (cos, sin), each [1|B, T, K/2]; the product is float32 or wider."""
    if rope is None:
        return x
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (table.astype(dtype)[:, :, None] for table in rope)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
