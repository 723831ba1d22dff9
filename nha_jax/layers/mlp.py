"""The gated feed-forward layer of a block (Shazeer 2020, arXiv 2002.05202)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from nha_jax.layers.parameters import normal_parameter, small_init_stddev


class SwiGLU(nnx.Module):
    """`(silu(x W_gate) ∘ x W_up) W_down`, without biases.

    Args:
      width: model width D.
      hidden: feed-forward width F.
      depth: layers of the model, for the initialisation of `down`.
      dtype: compute dtype.
      param_dtype: dtype of the parameters.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        depth: int = 1,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = dtype
        stddev = small_init_stddev(width)
        self.gate = normal_parameter(rngs, (width, hidden), stddev, param_dtype, ("embed", "mlp"))
        self.up = normal_parameter(rngs, (width, hidden), stddev, param_dtype, ("embed", "mlp"))
        self.down = normal_parameter(
            rngs, (hidden, width), small_init_stddev(width, depth), param_dtype, ("mlp", "embed")
        )

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x = x.astype(self.dtype)
        gate = x @ self.gate[...].astype(self.dtype)
        up = x @ self.up[...].astype(self.dtype)
        return (jax.nn.silu(gate) * up) @ self.down[...].astype(self.dtype)
