"""Instructions that the lowering does not choose by itself.

XLA compiles Triton kernels without fused multiply-add and with an exponential that also serves
numbers below the normal range: three instructions more each, a sixth of what some kernels execute.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.spec import Spec


def exp2(x: jax.Array, spec: Spec) -> jax.Array:
    """2^x; in float32 on GPUs 0 below 2^-126, and right to 2 units of the last place."""
    if spec.interpret or x.dtype != jnp.float32:
        return jnp.exp2(x)
    return _assembly("ex2.approx.ftz.f32 $0, $1;", "=f,f", x)


def fma(a: jax.Array, b, c, spec: Spec) -> jax.Array:
    """a b + c, which broadcast against each other, rounded once on GPUs."""
    if spec.interpret or a.dtype != jnp.float32:
        return a * b + c
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (a, b, c)))
    args = (jnp.broadcast_to(jnp.asarray(x, a.dtype), shape) for x in (a, b, c))
    return _assembly("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", *args)


def opaque(x: jax.Array, i: jax.Array, spec: Spec) -> jax.Array:
    """x, int32, as if it changed in turn i of a loop, so that what depends on it is computed anew.

    Else compilers keep the addresses of all rows and the masks of all pairs in registers across the
    loop, where none are left.
    """
    if spec.interpret:
        return x
    return _assembly("mov.b32 $0, $1;", "=r,r,r", x, jnp.broadcast_to(i, x.shape))


def _assembly(instruction: str, constraints: str, *args: jax.Array) -> jax.Array:
    result = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
    return plgpu.elementwise_inline_asm(
        instruction, args=args, constraints=constraints, pack=1, result_shape_dtypes=[result]
    )[0]
