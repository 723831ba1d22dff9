"""A feature map on the slots' queries and keys, expressed with the operator as it is.

Published models read their slots with `φ(q)·φ(k)` while the window keeps `rot(q)·rot(k)` (Gated
Slot Attention, arXiv 2409.07146, and the released NHA code). The operator takes one q and one k.
For a layer that reads only slots or only a window the map is applied or left out. For a layer that
reads both, the heads are widened to 3K so that one inner product serves each memory:

    q' = [q,  q, φ(q)]      k' = [k, -k, φ(k)]      tables' = [(cos, sin), 0, 0]

Slots read unrotated: q·k - q·k + φ(q)·φ(k). The window reads rotated, and a table of zeros makes
its part invisible: rot(q)·rot(k). Exact in exact arithmetic and to rounding in floats (the first
two terms are sums of the same products with opposite signs), at three times the key width. A layer
without a feature map pays nothing.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FeatureMap = Literal["silu", "relu"]
RopeTables = tuple[Float[Array, "b T pairs"], Float[Array, "b T pairs"]]

FEATURE_MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def separate_slot_features(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T G K"],
    rope: RopeTables | None,
    feature_map: FeatureMap,
) -> tuple[
    Float[Array, "B T N K3"],
    Float[Array, "B T G K3"],
    tuple[Float[Array, "b T pairs3"], Float[Array, "b T pairs3"]],
]:
    """Queries, keys and tables with which slots score `φ(q)·φ(k)` and the window `rot(q)·rot(k)`.

    Args:
      q: queries, unrotated; K even.
      k: keys, unrotated.
      rope: rotary tables; None: the window reads without rotation.
      feature_map: φ by name.

    Returns:
      q and k of size 3K and the tables that belong to them. The caller passes the scale of the
      original K.

    Raises:
      ValueError: K is odd.
    """
    size = q.shape[-1]
    if size % 2:
        raise ValueError(f"head_size={size}: slot_feature_map beside a window needs an even size")
    phi = FEATURE_MAPS[feature_map]
    if rope is None:
        ones = jnp.ones((1, q.shape[1], size // 2), jnp.promote_types(q.dtype, jnp.float32))
        rope = (ones, jnp.zeros_like(ones))
    cos, sin = (jnp.concatenate([x, jnp.zeros_like(x), jnp.zeros_like(x)], -1) for x in rope)
    return _join_halves([q, q, phi(q)]), _join_halves([k, -k, phi(k)]), (cos, sin)


def _join_halves(parts: list[jax.Array]) -> jax.Array:
    """Concatenates so that element i of a part still pairs with its element i + K/2."""
    halves = [jnp.split(x, 2, axis=-1) for x in parts]
    return jnp.concatenate([a for a, _ in halves] + [b for _, b in halves], axis=-1)
