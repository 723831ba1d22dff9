"""What the kernels' bodies share: loading and storing tiles, rotation, products.

Values cannot be sliced in this lowering, so everything is cut when it is loaded; sizes are padded
to powers of two and masked. Names carry shapes: C rows or keys of a chunk, M slots, K and V sizes.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.instructions import fma
from pallas_kernels.spec import Spec

# The hardware's exponential has base 2: scores and log-sum-exps of the kernels are in this unit.
LOG2_E = 1 / math.log(2)


def padded(size: int) -> int:
    """The tile size for an axis: a power of two, and at least 16 for the matrix units."""
    return max(16, 1 << (size - 1).bit_length())


def iota(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


def repeated_iota(size: int, times: int) -> jax.Array:
    return iota(size) if times == 1 else iota(size * times) % size


def repeated(x: jax.Array, times: int) -> jax.Array:
    """The rows of x [C,P], `times` times: [times * C, P]."""
    if times == 1:
        return x
    return jnp.broadcast_to(x[None], (times, *x.shape)).reshape(times * x.shape[0], x.shape[1])


def load(ref, *index, mask=None, other=0):
    """A tile of a ref, `other` where masked; index arrays broadcast against each other."""
    # Interpretation fails on Python integers beside arrays.
    index = tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else other)


def dot(a: jax.Array, b: jax.Array, spec: Spec, transpose: str = "") -> jax.Array:
    """a @ b with operands in the call's dtype, accumulated wide; `transpose` names a, b or both.

    float32 is multiplied as float32, never as TF32. Operands that a float16 call computes may leave
    float16's range, so they are multiplied as TF32, which has float16's precision.
    """
    contract = ((0 if "a" in transpose else 1,), (1 if "b" in transpose else 0,))
    dtype, precision = spec.dtype, jax.lax.Precision.HIGHEST
    if dtype == jnp.float16 and not a.dtype == b.dtype == dtype:
        dtype, precision = jnp.float32, jax.lax.Precision.DEFAULT
    elif dtype in (jnp.float16, jnp.bfloat16):
        precision = jax.lax.Precision.DEFAULT
    a, b = a.astype(dtype), b.astype(dtype)
    if spec.interpret and dtype != spec.wide:
        # Products of narrow operands are exact in float32, and XLA's CPU backend lacks some.
        a, b = a.astype(spec.wide), b.astype(spec.wide)
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=spec.wide
    )


def batch_index(ref, b):
    """The index on an axis [1|B]."""
    return b if ref.shape[0] > 1 else 0


def _across(head):
    """A head, or one of each row, as an index into [C,P]."""
    return head if jnp.ndim(head) == 0 else head[:, None]


def columns(size: int):
    """Indices [1,P] of a padded axis, and their mask; None where nothing is padded."""
    cols = iota(padded(size))[None, :]
    return cols, None if padded(size) == size else cols < size


def both(*masks):
    """The conjunction of masks, some of which may be None."""
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    result = present[0]
    for mask in present[1:]:
        result = result & mask
    return result


def load_features(ref, b, at, head, size: int, valid, part: int = 0) -> jax.Array:
    """Rows of [B,T,H,.]: features [part * size, (part + 1) * size) of their head, [C,padded]."""
    cols, mask = columns(size)
    valid = None if valid is None else valid[:, None]
    return load(ref, b, at[:, None], _across(head), part * size + cols, mask=both(valid, mask))


def load_parts(spec: Spec, ref, b, at, head, valid) -> tuple[jax.Array, ...]:
    """Queries or keys in one part, or in two halves where they are to be rotated."""
    return tuple(
        load_features(ref, b, at, head, spec.part_size, valid, part) for part in range(spec.parts)
    )


def store_features(ref, b, at, head, size: int, valid, value, part: int = 0) -> None:
    cols, mask = columns(size)
    plgpu.store(
        ref.at[b, stored(ref, at, valid)[:, None], _across(head), part * size + cols],
        value.astype(ref.dtype),
        mask=both(valid[:, None], mask),
    )


def stored(ref, at, valid) -> jax.Array:
    """Places [C] of a masked store, behind the end where an interpreted one harms nothing."""
    return jnp.where(valid, at, ref.shape[1])


def load_rotation(spec: Spec, table, b, index, valid):
    """Cosines and sines [C,K/2] of rows or keys; None without rotation."""
    if not spec.rope:
        return None
    cols, mask = columns(spec.part_size)
    mask = both(None if valid is None else valid[:, None], mask)
    at = batch_index(table, b), index[:, None]
    return tuple(
        load(table, *at, part * spec.part_size + cols, mask=mask).astype(spec.wide)
        for part in range(2)
    )


def rotated(spec: Spec, parts, rotation, inverse: bool = False):
    """Half-split rotation of two halves, rounded to the call's dtype unless it is the inverse."""
    if rotation is None:
        return parts
    cos, sin = rotation
    first, second = (part.astype(spec.wide) for part in parts)
    if inverse:
        sin = -sin
    turned = fma(first, cos, -(second * sin), spec), fma(second, cos, first * sin, spec)
    if inverse:
        return turned
    return tuple(part.astype(spec.dtype) for part in turned)


def dot_parts(a, b, spec: Spec, transpose: str = "") -> jax.Array:
    """Sum of the products of two lists of parts: scores of queries and keys."""
    total = dot(a[0], b[0], spec, transpose)
    for first, second in zip(a[1:], b[1:], strict=True):
        total += dot(first, second, spec, transpose)
    return total


def loop(count: int, body, carry):
    """`fori_loop` whose index is int32 under 64-bit types, too; a single turn is no loop at all."""
    if count == 1:
        return body(jnp.int32(0), carry)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, carry)


def where(mask, value):
    """The value where the mask holds, else 0; None holds everywhere."""
    return value if mask is None else jnp.where(mask, value, 0)
