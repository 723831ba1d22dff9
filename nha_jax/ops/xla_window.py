"""Softmax attention to the window, walking over key blocks with a running log-sum-exp.

All query blocks walk in step: at step j each reads the key block j places before its own. Nothing
of size T x T or T x W exists, forward or backward; the backward pass recomputes the probabilities
from the log-sum-exp. Long walks run group by group of query blocks, so that early ones stop early.

Axes: n query blocks of C tokens, Y = R C query rows in each; joined for the reason that `xla_slots`
gives.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.ops.checks import Call
from nha_jax.ops.precision import dot
from nha_jax.ops.rows import Rows
from nha_jax.ops.xla_slots import softmax_and_lse

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 128
# Up to this many steps the walk is unrolled, which lets XLA fuse it.
_UNROLLED_STEPS = 3
_GROUPS = 8


class _Walk(NamedTuple):
    """Static: how the walk is cut."""

    steps: int  # key blocks that a query block may read
    group: int  # query blocks per group
    groups: int
    has_past: bool  # whether the blocks before the first query block hold tokens
    scale: float

    def stop(self, index):
        """Number of steps of group `index`: blocks before the first token need no visit."""
        if self.has_past or self.groups == 1:
            return self.steps
        return jnp.minimum(self.steps, (index + 1) * self.group)


def window_attention(
    call: Call, rows: Rows, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention of each token to its window: the call's own tokens and those of the cache.

    Args:
      call: the call; its window, scale and cache are used.
      rows: documents and padding.
      q: rotated queries [B,T,G,R,K].
      k: rotated keys [B,T,G,K].
      v: values [B,T,G,V].

    Returns:
      Output [B,T,G,R,V] and log-sum-exp [B,T,G,R], -inf for padding.
    """
    b, t, g, r, key_size = q.shape
    cache = call.cache
    past = 0 if cache is None else cache.capacity
    window = min(call.window, t + past)
    size = min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, 1 << (min(window, t) - 1).bit_length()))
    steps = -(-(window - 1) // size) + 1
    blocks = -(-t // size)
    group = blocks if steps <= _UNROLLED_STEPS else -(-blocks // _GROUPS)
    groups = -(-blocks // group)
    walk = _Walk(steps, group, groups, past > 0, float(call.scale))
    blocks = groups * group
    lead = (steps - 1) * size  # rows before the first query's own block
    tail = blocks * size - t

    def extend(x, ring):
        if cache is not None and past:
            x = jnp.concatenate([_unroll(ring, cache.length, min(past, lead)), x], axis=1)
        x = jnp.pad(x, ((0, 0), (lead + t - x.shape[1], tail), (0, 0), (0, 0)))
        x = x.reshape(b, steps - 1 + blocks, size, g, x.shape[-1])
        return x.transpose(0, 3, 1, 2, 4)  # [B,G,blocks,C,.]

    ring_k, ring_v = (None, None) if cache is None else (cache.window_k, cache.window_v)
    k, v = extend(k, ring_k), extend(v, ring_v)
    q = jnp.pad(q, ((0, 0), (0, tail), (0, 0), (0, 0), (0, 0)))
    q = q.reshape(b, blocks, size, g, r, key_size).transpose(0, 3, 1, 4, 2, 5)
    q = q.reshape(b, g, blocks, r * size, key_size)
    reach = jnp.pad(rows.reach(window), ((0, 0), (0, tail)), constant_values=-1)
    reach = reach.reshape(-1, blocks, size)
    out, lse = _attend(walk, q, k, v, reach)

    def tokens(x):  # [B,G,n,R C,...] -> [B,T,G,R,...]
        x = x.reshape(b, g, blocks, r, size, *x.shape[4:])
        x = jnp.moveaxis(x, (2, 4), (1, 2))
        return x.reshape(b, blocks * size, *x.shape[3:])[:, :t]

    return tokens(out), tokens(lse)


def few_tokens_attention(
    call: Call, rows: Rows, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `window_attention`, for a few tokens after a cache: scores the ring where it lies."""
    cache, t = call.cache, q.shape[1]
    assert cache is not None
    reach = rows.reach(call.window)[:, None, None, :, None]  # [1|B,1,1,T,1]
    token = jnp.arange(t)
    # The newest token of the ring, at row length - 1, is one token before the call's first.
    age = (cache.length[:, None] - 1 - jnp.arange(cache.capacity)) % cache.capacity + 1
    distance = jnp.concatenate(
        [
            age[:, None] + token[:, None],
            jnp.broadcast_to(token[:, None] - token, (age.shape[0], t, t)),
        ],
        axis=-1,
    )[:, None, None]  # [B,1,1,T,S+T]
    scores = jnp.concatenate(
        [
            dot("btgrk,bsgk->bgrts", q, cache.window_k, q.dtype),
            dot("btgrk,bsgk->bgrts", q, k, q.dtype),
        ],
        axis=-1,
    )
    scores = jnp.where((distance >= 0) & (distance <= reach), call.scale * scores, -jnp.inf)
    p, lse = softmax_and_lse(scores)
    p_ring, p_new = jnp.split(p, [cache.capacity], axis=-1)
    out = dot("bgrts,bsgv->btgrv", p_ring, cache.window_v, q.dtype)
    out += dot("bgrts,bsgv->btgrv", p_new, v, q.dtype)
    return out, jnp.moveaxis(lse, 3, 1)


def _unroll(ring: jax.Array, length: jax.Array, rows: int) -> jax.Array:
    """The last `rows` tokens of a ring [B,S,G,.], oldest first; unwritten ones get masked later."""
    at = (length[:, None] - rows + jnp.arange(rows)) % ring.shape[1]
    return jax.vmap(lambda x, i: x[i])(ring, at)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(walk: _Walk, q, k, v, reach):
    """q [B,G,n,Y,K], k, v [B,G,n+steps-1,C,.], reach [1|B,n,C] -> out, lse (wide)."""

    def group(index):
        here = functools.partial(_take, start=index * walk.group, size=walk.group)
        q_here, reach_here = here(q, axis=2), here(reach, axis=1)
        shape, dtype = q_here.shape[:-1], jnp.promote_types(q.dtype, jnp.float32)

        def step(j, carry):
            highest, total, out = carry
            k_j, v_j, _ = _key_blocks(walk, index, j, k, v)
            scores = _scores(walk, q_here, k_j, reach_here, j)
            higher = jnp.maximum(highest, scores.max(-1))
            finite = jnp.where(higher > -jnp.inf, higher, 0)
            p = jnp.exp(scores - finite[..., None])
            shrink = jnp.exp(highest - finite)
            out = out * shrink[..., None] + dot("bgnyj,bgnjv->bgnyv", p, v_j, q.dtype)
            return higher, total * shrink + p.sum(-1), out

        carry = (
            jnp.full(shape, -jnp.inf, dtype),
            jnp.zeros(shape, dtype),
            jnp.zeros((*shape, v.shape[-1]), dtype),
        )
        highest, total, out = _loop(walk.stop(index), step, carry)
        seen = total > 0
        total = jnp.where(seen, total, 1)
        return out / total[..., None], jnp.where(seen, jnp.log(total) + highest, -jnp.inf)

    if walk.groups == 1:
        return group(0)
    out, lse = jax.lax.map(group, jnp.arange(walk.groups))
    return tuple(jnp.moveaxis(x, 0, 2).reshape(*q.shape[:2], -1, *x.shape[4:]) for x in (out, lse))


def _attend_forward(walk, q, k, v, reach):
    out, lse = _attend(walk, q, k, v, reach)
    return (out, lse), (q, k, v, reach, out, lse)


def _attend_backward(walk, residuals, cotangents):
    """Flash attention's backward pass, with the log-sum-exp's own cotangent."""
    q, k, v, reach, out, lse = residuals
    dout, dlse = cotangents
    # d(score) = p * (dout . v - dout . out + dlse)
    shift = dlse - (dout * out).sum(-1)
    finite_lse = jnp.where(lse > -jnp.inf, lse, 0)

    def group(index, carry):
        here = functools.partial(_take, start=index * walk.group, size=walk.group, axis=2)
        q_here, dout_here, shift_here, lse_here = (here(x) for x in (q, dout, shift, finite_lse))
        reach_here = _take(reach, index * walk.group, walk.group, axis=1)

        def step(j, carry):
            dq, dk, dv = carry
            k_j, v_j, at = _key_blocks(walk, index, j, k, v)
            p = jnp.exp(_scores(walk, q_here, k_j, reach_here, j) - lse_here[..., None])
            dp = dot("bgnyv,bgnjv->bgnyj", dout_here, v_j, q.dtype)
            ds = walk.scale * p * (dp + shift_here[..., None])
            dq += dot("bgnyj,bgnjk->bgnyk", ds, k_j, q.dtype)
            dk = _add(dk, dot("bgnyj,bgnyk->bgnjk", ds, q_here, q.dtype), at)
            dv = _add(dv, dot("bgnyj,bgnyv->bgnjv", p, dout_here, q.dtype), at)
            return dq, dk, dv

        dq, dk, dv = carry
        start = jnp.zeros(q_here.shape, dq.dtype)
        dq_here, dk, dv = _loop(walk.stop(index), step, (start, dk, dv))
        return jax.lax.dynamic_update_slice_in_dim(dq, dq_here, index * walk.group, 2), dk, dv

    dtype = jnp.promote_types(q.dtype, jnp.float32)
    carry = tuple(jnp.zeros(x.shape, dtype) for x in (q, k, v))
    grads = _loop(walk.groups, group, carry)
    return (*(dx.astype(x.dtype) for dx, x in zip(grads, (q, k, v), strict=True)), None)


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(walk: _Walk, q, k, reach, j) -> jax.Array:
    """Scores [B,G,n,Y,C] with the key blocks j places before, -inf out of reach."""
    size, heads = k.shape[3], q.shape[3] // k.shape[3]
    token = jnp.arange(size)
    distance = j * size + token[:, None] - token
    seen = (distance >= 0) & (distance <= reach[..., None])
    seen = jnp.tile(seen, (1, 1, heads, 1))[:, None]
    return jnp.where(seen, walk.scale * dot("bgnyk,bgnjk->bgnyj", q, k, q.dtype), -jnp.inf)


def _key_blocks(walk: _Walk, group, j, k, v):
    at = walk.steps - 1 + group * walk.group - j
    return _take(k, at, walk.group, axis=2), _take(v, at, walk.group, axis=2), at


def _take(x: jax.Array, start, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _add(x: jax.Array, update: jax.Array, at) -> jax.Array:
    update += _take(x, at, update.shape[2], axis=2)
    return jax.lax.dynamic_update_slice_in_dim(x, update, at, 2)


def _loop(stop, body, carry):
    if isinstance(stop, int) and stop <= _UNROLLED_STEPS:
        for j in range(stop):
            carry = body(j, carry)
        return carry
    return jax.lax.fori_loop(0, stop, body, carry)
