"""A piece of a text behind the tokens of a cache, through cuDNN.

Two exact softmaxes, over the cache's tokens and causally over the piece's own, are merged by their
log-sum-exps. Slots that the cache was given, and into which nothing retires, are a third.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.ops.checks import Call
from nha_jax.ops.precision import dot
from nha_jax.ops.rotary import rotate
from nha_jax.ops.xla import merge
from nha_jax.ops.xla_slots import softmax_and_lse
from pallas_kernels.distribute import distribute

# cuDNN works on blocks of so many queries; shorter pieces, and decoding, are left to other kernels.
SHORTEST_PIECE = 128

# Of a call, what may be differentiated.
_DIFFERENTIABLE = ("q", "k", "v", "log_decay", "rope", "cache")
# Output [B,T,N,V] and log-sum-exp [B,T,N] in float32.
Softmax = tuple[jax.Array, jax.Array]
Results = tuple[jax.Array, jax.Array]


def refusals(call: Call) -> list[str]:
    """Why a call with a cache that may hold tokens is more than full attention."""
    t, cache = call.q.shape[1], call.cache
    assert cache is not None
    reasons = []
    if t < SHORTEST_PIECE:
        reasons.append(f"T={t} after a cache: it takes pieces of at least {SHORTEST_PIECE} tokens")
    if not cache.is_bounded:
        reasons.append(
            f"window={call.window} does not exceed the cache's max_length={cache.max_length}: "
            f"tokens leave the window"
        )
    elif call.log_decay.shape[3] and call.slot_lag < cache.max_length:
        reasons.append(
            f"slot_lag={call.slot_lag} is less than the cache's max_length={cache.max_length}: "
            f"tokens retire into the slots"
        )
    return reasons


def attend(call: Call) -> Results:
    """Output [B,T,N,V] and slot mass [B,T,N] of a call whose cache may hold tokens.

    Under differentiation the implementation next in line runs instead, forward and backward: JAX's
    cuDNN attention has no gradient with respect to its log-sum-exp.
    """

    def changed(given: dict[str, Any]) -> Call:
        return dataclasses.replace(call, **given, stack=None, return_cache=False)

    def other(given: dict[str, Any]) -> Results:
        out, slot_mass, _ = _next_in_line(call)(changed(given))
        return out, slot_mass

    given = {name: getattr(call, name) for name in _DIFFERENTIABLE}
    return _differentiated_as(other, lambda given: _attend(changed(given)), given)


def _next_in_line(call: Call) -> Callable[[Call], Any]:
    from nha_jax.ops.api import IMPLEMENTATIONS

    kernels = IMPLEMENTATIONS["pallas_triton"]
    serves = kernels.automatic() and not kernels.refusals(call)
    return (kernels if serves else IMPLEMENTATIONS["xla"]).load()


def _differentiated_as(
    other: Callable[[Any], Results], function: Callable[[Any], Results], given: Any
) -> Results:
    """`function` of `given`; under differentiation `other`, which computes the same."""
    leaves, tree = jax.tree.flatten(given)

    @jax.custom_vjp
    def run(*leaves):
        return function(tree.unflatten(leaves))

    def forward(*leaves):
        values = [leaf.value for leaf in leaves]
        # Only what is differentiated: the kernels refuse where that is the rotary tables.
        moved = {
            i: leaf.value
            for i, leaf in enumerate(leaves)
            if leaf.perturbed and jnp.issubdtype(leaf.value.dtype, jnp.inexact)
        }
        return jax.vjp(
            lambda moved: other(tree.unflatten([moved.get(i, x) for i, x in enumerate(values)])),
            moved,
        )

    def backward(pull_back, cotangents):
        zero = jax.custom_derivatives.SymbolicZero
        (found,) = pull_back(
            tuple(jnp.zeros(y.shape, y.dtype) if type(y) is zero else y for y in cotangents)
        )
        return tuple(found.get(i) for i in range(len(leaves)))

    run.defvjp(forward, backward, symbolic_zeros=True)
    return run(*leaves)


class _Operands(NamedTuple):
    """Arrays of a call; with the letters of `distribute` in their place, their dimensions."""

    q: Any = "btnk"  # rotated
    k: Any = "btgk"  # rotated
    v: Any = "btgv"
    window_k: Any = "bsgk"
    window_v: Any = "bsgv"
    length: Any = "b"
    segment_length: Any = "b"
    # None without slots.
    slot_q: Any = "btnk"  # unrotated
    slots_k: Any = "bgmk"
    slots_v: Any = "bgmv"
    slots_empty: Any = "b"


def _attend(call: Call) -> Results:
    cache, has_slots = call.cache, call.log_decay.shape[3] > 0
    assert cache is not None
    x = _Operands(
        q=rotate(call.q, call.rope),
        k=rotate(call.k, call.rope),
        v=call.v,
        window_k=cache.window_k,
        window_v=cache.window_v,
        length=cache.length,
        segment_length=cache.segment_length,
        slot_q=call.q if has_slots else None,
        slots_k=cache.slots_k if has_slots else None,
        slots_v=cache.slots_v if has_slots else None,
        slots_empty=cache.slots_empty if has_slots else None,
    )
    letters = zip(_Operands(), x, strict=True)
    dims = _Operands(*(None if array is None else d for d, array in letters))
    return distribute(functools.partial(_merged, call.scale), (dims,), ("btnv", "btn"))(x)


def _merged(scale: float, x: _Operands) -> Results:
    """Of the rows and heads of one device."""
    parts = [softmax(x.q, x.k, x.v, None, scale=scale), _before(scale, x)]
    wide = jnp.promote_types(x.q.dtype, jnp.float32)

    def without_slots() -> Results:
        out, _ = merge(parts)
        return out.astype(x.q.dtype), jnp.zeros(out.shape[:3], wide)

    def with_slots() -> Results:
        out, weights = merge([*parts, _read_slots(scale, x)])
        return out.astype(x.q.dtype), weights[-1]

    if x.slots_empty is None:
        return without_slots()
    return jax.lax.cond(x.slots_empty.all(), without_slots, with_slots)


def _before(scale: float, x: _Operands) -> Softmax:
    """Over the cache's tokens, as far as they are of the document at hand."""
    size = x.window_k.shape[1]
    count = jnp.minimum(x.segment_length, size)

    def in_place() -> Softmax:
        return softmax(x.q, x.window_k, x.window_v, count, scale=scale)

    def turned() -> Softmax:
        """An earlier document lies in front of this one in the ring, or this one is wrapped."""
        at = ((x.length - count)[:, None] + jnp.arange(size)) % size
        k, v = (jax.vmap(lambda ring, i: ring[i])(ring, at) for ring in (x.window_k, x.window_v))
        return softmax(x.q, k, v, count, scale=scale)

    out, lse = jax.lax.cond((x.length == count).all(), in_place, turned)
    # Rows without tokens before them read one that is none.
    some = (count > 0)[:, None, None]
    return jnp.where(some[..., None], out, 0), jnp.where(some, lse, -jnp.inf)


def _read_slots(scale: float, x: _Operands) -> Softmax:
    """Over the cache's slots, which no token of the call changes."""
    b, t, n, key_size = x.slot_q.shape
    q = x.slot_q.reshape(b, t, x.k.shape[2], -1, key_size)
    dtype = x.slots_k.dtype
    scores = scale * dot("btgrk,bgmk->btgrm", q, x.slots_k, dtype)
    scores = jnp.where(x.slots_empty[:, None, None, None, None], -jnp.inf, scores)
    p, lse = softmax_and_lse(scores)
    out = dot("btgrm,bgmv->btgrv", p, x.slots_v, dtype)
    return out.reshape(b, t, n, -1), lse.reshape(b, t, n)


def softmax(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, *, scale: float
) -> Softmax:
    """cuDNN's attention with its log-sum-exp: causal, or to the first `lengths` [B] keys.

    A length of 0 counts as 1. The log-sum-exp is a natural logarithm. `jax.nn` has it, too, but
    rounded to the dtype of the queries, which the merge would show: hence JAX's inner function.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    options: dict[str, Any] = {"mask_type": MaskType.CAUSAL}
    if lengths is not None:
        options = {
            "mask_type": MaskType.PADDING,
            "q_seqlen": jnp.full_like(lengths, q.shape[1]),
            "kv_seqlen": jnp.maximum(lengths, 1),
        }
    out, lse = dot_product_attention(q, k, v, scale=scale, return_residual=True, **options)
    return out, lse.transpose(0, 2, 1)
