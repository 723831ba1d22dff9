"""Root mean square normalisation (Zhang & Sennrich 2019, arXiv 1910.07467)."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nha_jax.layers.parameters import constant_parameter


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + eps) · scale` over the last axis, in float32, returned in x's dtype.

    Args:
      size: length of the normalised axis.
      eps: added to the mean square.
      axis_name: logical name of the normalised axis.
      param_dtype: dtype of `scale`.
    """

    def __init__(
        self,
        size: int,
        *,
        eps: float = 1e-6,
        axis_name: str = "embed",
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.eps = eps
        self.scale = constant_parameter(1.0, (size,), param_dtype, (axis_name,))

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        wide = x.astype(dtype)
        inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * inverse * self.scale[...].astype(dtype)).astype(x.dtype)
