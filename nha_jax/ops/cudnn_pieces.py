"""A piece of a text behind the tokens of a cache, through cuDNN.

Two exact softmaxes, over the cache's tokens and causally over the piece's own, are merged by their
log-sum-exps. Slots that the cache was given, and into which nothing retires, are a third.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

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


def _attend(call: Call) -> Results:
    cache = call.cache
    assert cache is not None
    q = rotate(call.q, call.rope)
    own = _distributed(call, q, rotate(call.k, call.rope), call.v)
    parts = [own, _before(call, q)]

    def without_slots() -> Results:
        out, _ = merge(parts)
        return out.astype(call.q.dtype), jnp.zeros(out.shape[:3], call.state_dtype)

    def with_slots() -> Results:
        out, weights = merge([*parts, _read_slots(call)])
        return out.astype(call.q.dtype), weights[-1]

    if not call.log_decay.shape[3]:
        return without_slots()
    return jax.lax.cond(cache.slots_empty.all(), without_slots, with_slots)


def _before(call: Call, q: jax.Array) -> Softmax:
    """Of rotated queries over the cache's tokens, as far as they are of the document at hand."""
    cache = call.cache
    assert cache is not None
    rings, size = (cache.window_k, cache.window_v), cache.capacity
    count = jnp.minimum(cache.segment_length, size)

    def in_place() -> Softmax:
        return _distributed(call, q, *rings, count)

    def turned() -> Softmax:
        """An earlier document lies in front of this one in the ring, or this one is wrapped."""
        at = ((cache.length - count)[:, None] + jnp.arange(size)) % size
        k, v = (jax.vmap(lambda ring, i: ring[i])(ring, at) for ring in rings)
        return _distributed(call, q, k, v, count)

    out, lse = jax.lax.cond((cache.length == count).all(), in_place, turned)
    # Rows without tokens before them read one that is none.
    some = (count > 0)[:, None, None]
    return jnp.where(some[..., None], out, 0), jnp.where(some, lse, -jnp.inf)


def _read_slots(call: Call) -> Softmax:
    """Of unrotated queries over the cache's slots, which no token of the call changes."""
    cache, dtype = call.cache, call.state_dtype
    assert cache is not None
    b, t, n, key_size = call.q.shape
    q = call.q.reshape(b, t, call.k.shape[2], -1, key_size)
    scores = call.scale * dot("btgrk,bgmk->btgrm", q, cache.slots_k, dtype)
    scores = jnp.where(cache.slots_empty[:, None, None, None, None], -jnp.inf, scores)
    p, lse = softmax_and_lse(scores)
    out = dot("btgrm,bgmv->btgrv", p, cache.slots_v, dtype)
    return out.reshape(b, t, n, -1), lse.reshape(b, t, n)


def _distributed(
    call: Call, q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None
) -> Softmax:
    dims = ("btnk", "bsgk", "bsgv", None if lengths is None else "b")
    run = functools.partial(softmax, scale=call.scale)
    return distribute(run, dims, ("btnv", "btn"))(q, k, v, lengths)


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
