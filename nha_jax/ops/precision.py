"""Matrix products whose precision is named: float32 by default is not float32 on a GPU or TPU."""

import functools

import jax
import jax.numpy as jnp


def dot(spec: str, a: jax.Array, b: jax.Array, operand_dtype: jnp.dtype) -> jax.Array:
    """`einsum` with operands in `operand_dtype`, accumulated in float32 (float64 for float64).

    float32 operands are multiplied as float32 (not TF32 or bfloat16). Narrower ones are multiplied
    exactly, forward and backward: cotangents are rounded to the operands' dtype too, so that the
    backward pass runs on the same matrix units. Every index of an operand must appear in the other
    operand or in the result.
    """
    if operand_dtype == jnp.promote_types(operand_dtype, jnp.float32):
        a, b = a.astype(operand_dtype), b.astype(operand_dtype)
        return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)
    return _narrow_dot(spec, jnp.dtype(operand_dtype), a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow_dot(spec: str, dtype: jnp.dtype, a: jax.Array, b: jax.Array) -> jax.Array:
    def product(a, b):
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    def widened(a, b):  # XLA's CPU backend has no mixed product; these operands lose nothing
        return product(a.astype(jnp.float32), b.astype(jnp.float32))

    a, b = a.astype(dtype), b.astype(dtype)
    return jax.lax.platform_dependent(a, b, cpu=widened, default=product)


def _narrow_dot_forward(spec, dtype, a, b):
    return _narrow_dot(spec, dtype, a, b), (a, b)


def _narrow_dot_backward(spec, dtype, residuals, cotangent):
    a, b = residuals
    operands, result = spec.split("->")
    first, second = operands.split(",")
    da = _narrow_dot(f"{result},{second}->{first}", dtype, cotangent, b)
    db = _narrow_dot(f"{result},{first}->{second}", dtype, cotangent, a)
    return da.astype(a.dtype), db.astype(b.dtype)


_narrow_dot.defvjp(_narrow_dot_forward, _narrow_dot_backward)
