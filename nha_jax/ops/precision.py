"""Matrix products whose precision is named: on GPUs and TPUs the default for float32 is not float32."""

import jax
import jax.numpy as jnp


def dot(spec: str, a: jax.Array, b: jax.Array, operand_dtype: jnp.dtype) -> jax.Array:
    """`einsum` with operands in `operand_dtype`, accumulated in float32 (float64 for float64).

    float32 operands are multiplied as float32 (not TF32 or bfloat16); narrower ones exactly, as the
    hardware does.
    """
    wide = jnp.promote_types(operand_dtype, jnp.float32)
    precision = jax.lax.Precision.HIGHEST if operand_dtype == wide else None
    return jnp.einsum(
        spec,
        a.astype(operand_dtype),
        b.astype(operand_dtype),
        precision=precision,
        preferred_element_type=wide,
    )
