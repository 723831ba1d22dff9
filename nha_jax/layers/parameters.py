"""Parameters with logical axis names, and how they are initialised.

A parameter is a plain `nnx.Param` with two more pieces of metadata: `logical_axes`, a name for each
axis, and `weight_decay`, whether an optimizer should shrink it. The names are *only* metadata.
They are kept under a key of our own, and `eager_sharding` is off, so that Flax never looks for a
mesh: a layer can be built, shape-evaluated, bridged and called with no mesh and inside a mesh whose
axes are named otherwise. The training code's table turns the names into shardings.

Logical axes: "layers", "vocab", "embed" (the model width D), "heads" (N), "kv_heads" (G),
"head_size" (K and V), "mlp" (F), "slots" (M).

Initialisation (the rule of Nguyen & Salazar 2019, arXiv 1910.05895, "small init"):

* every matrix, embeddings and gates included: normal with standard deviation sqrt(2 / (5 D)),
  which is 0.0198 for D = 1024;
* the two matrices of a block that write to the residual stream (the attention's output, the MLP's
  `down`): the same divided by sqrt(2 L), so that the stream's variance does not grow with depth
  (Radford et al. 2019);
* norm scales 1; biases 0; fusion logits 0 (both memories weigh one half);
* so a gate starts near `logsigmoid(0) / 8`: it forgets 8 % per token, a half-life of 8 tokens.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def small_init_stddev(width: int, depth: int | None = None) -> float:
    """Standard deviation of a matrix's entries in a model of the given width.

    Args:
      width: model width D.
      depth: number of layers L, for a matrix that writes to the residual stream.

    Raises:
      ValueError: a depth below 1.
    """
    if depth is not None and depth < 1:
        raise ValueError(f"depth={depth}: expected at least 1")
    stddev = math.sqrt(2.0 / (5.0 * width))
    return stddev if depth is None else stddev / math.sqrt(2.0 * depth)


def normal_parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    stddev: float,
    dtype: DTypeLike,
    logical_axes: tuple[str, ...],
    *,
    weight_decay: bool = True,
) -> nnx.Param:
    """A parameter drawn from a normal distribution.

    Drawn in float32 and then rounded, so that the same seed gives the same model in every dtype.

    Raises:
      ValueError: there is not one logical name for each axis.
    """
    value = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
    return named_parameter(value.astype(dtype), logical_axes, weight_decay=weight_decay)


def constant_parameter(
    constant: float, shape: tuple[int, ...], dtype: DTypeLike, logical_axes: tuple[str, ...]
) -> nnx.Param:
    """A parameter that starts as a constant; such parameters (norms, biases) take no decay.

    Raises:
      ValueError: there is not one logical name for each axis.
    """
    return named_parameter(jnp.full(shape, constant, dtype), logical_axes, weight_decay=False)


def named_parameter(
    value: jax.Array, logical_axes: tuple[str, ...], *, weight_decay: bool
) -> nnx.Param:
    """`nnx.Param` with one logical name for each axis of `value`.

    Raises:
      ValueError: there is not one logical name for each axis.
    """
    if len(logical_axes) != value.ndim:
        raise ValueError(f"logical_axes={logical_axes}: expected {value.ndim} names, one an axis")
    return nnx.Param(
        value, logical_axes=logical_axes, weight_decay=weight_decay, eager_sharding=False
    )
