"""One layer of the decoder: attention, then the feed-forward layer, each with its norm."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nha_jax.layers.attention import NativeHybridAttention, Projections
from nha_jax.layers.mlp import SwiGLU
from nha_jax.layers.norm import RMSNorm

# Reads memories: projections -> heads [B,T,N,K], slot mass [B,T,N], final cache.
Read = Callable[[Projections], tuple[Any, Any, Any]]


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))` (pre-norm, as in Llama).

    Args:
      make_attention: builds the attention layer from `rngs`.
      width: model width D.
      mlp_width: feed-forward width F.
      depth: layers L of the model, for the initialisation.
      norm_eps: epsilon of both norms.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        make_attention: Callable[[nnx.Rngs], NativeHybridAttention],
        width: int,
        mlp_width: int,
        *,
        depth: int = 1,
        norm_eps: float = 1e-6,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention_norm = RMSNorm(width, eps=norm_eps, param_dtype=param_dtype)
        self.attention = make_attention(rngs)
        self.mlp_norm = RMSNorm(width, eps=norm_eps, param_dtype=param_dtype)
        self.mlp = SwiGLU(
            width, mlp_width, depth=depth, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B T D"], read: Read
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T N"], Any]:
        """Returns the residual stream, the slot mass and the final cache.

        Args:
          x: residual stream, in the compute dtype.
          read: how memories are read, usually `attention.read` with its options bound.
        """
        heads, slot_mass, cache = read(self.attention.project(self.attention_norm(x)))
        x = x + self.attention.merge_heads(heads)
        return x + self.mlp(self.mlp_norm(x)), slot_mass, cache
