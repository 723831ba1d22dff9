"""Chunkwise implementation in plain `jax.numpy`: CPU, GPU and TPU, forward and backward.

Time and memory are O(T) for a fixed window, O(T W) time and O(T) memory for a large one. Two
parts, each with its own log-sum-exp, are merged into the one softmax: the window, over the tokens
of this call and of the cache, and the slots.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nha_jax.ops.cache import Cache
from nha_jax.ops.checks import Call
from nha_jax.ops.rotary import rotate
from nha_jax.ops.rows import Rows, rows_of
from nha_jax.ops.xla_slots import read_slots
from nha_jax.ops.xla_window import few_tokens_attention, window_attention

# Calls of at most this many tokens score the ring where it lies; longer ones unroll it first.
_FEW_TOKENS = 16


def xla(call: Call) -> tuple[jax.Array, jax.Array, Cache | None]:
    """Runs one checked call. Returns output [B,T,N,V], slot mass [B,T,N] and the final cache."""
    b, t, n, _ = call.q.shape
    g = call.k.shape[2]
    rows = rows_of(call)
    # [B,T,G,R,K]: query head n reads key/value head n // R.
    grouped = (b, t, g, n // g, -1)
    rotated_q = rows.compact(rotate(call.q, call.rope)).reshape(grouped)
    rotated_k = rows.compact(rotate(call.k, call.rope))
    q = rows.compact(call.q).reshape(grouped)
    k, v = rows.compact(call.k), rows.compact(call.v)
    log_decay = rows.compact(call.log_decay).astype(call.state_dtype)

    parts = []
    final = None
    if call.window:
        attend = (
            few_tokens_attention
            if call.cache is not None and t <= _FEW_TOKENS
            else window_attention
        )
        parts.append(attend(call, rows, rotated_q, rotated_k, v))
    if call.reads_slots:
        stream = retired_stream(call, rows, k, v, log_decay)
        out, lse, slots = read_slots(call, rows, q, *stream)
        parts.append((out, lse))
    else:
        slots = None
    out, weights = merge(parts)
    slot_mass = weights[-1] if call.reads_slots else jnp.zeros(out.shape[:-1], out.dtype)
    if call.return_cache:
        final = final_cache(call, rows, slots, rotated_k, k, v, log_decay)
    out = rows.restore(out.reshape(b, t, n, -1).astype(call.q.dtype))
    return out, rows.restore(slot_mass.reshape(b, t, n)), final


def merge(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
    """Joins softmaxes over disjoint keys: outputs [...,V], log-sum-exps [...] (-inf: no keys)."""
    if len(parts) == 1:
        out, lse = parts[0]
        return out, [jnp.where(lse > -jnp.inf, 1.0, 0.0).astype(out.dtype)]
    highest = jnp.stack([lse for _, lse in parts]).max(0)
    # The maximum cancels in the ratio, so it carries no gradient; rows without keys stay finite.
    highest = jax.lax.stop_gradient(jnp.where(highest > -jnp.inf, highest, 0))
    shares = [jnp.exp(lse - highest) for _, lse in parts]
    total = functools.reduce(jnp.add, shares)
    total = jnp.where(total > 0, total, 1)
    weights = [share / total for share in shares]
    weighted = [w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True)]
    return functools.reduce(jnp.add, weighted), weights


def retired_stream(
    call: Call, rows: Rows, k: jax.Array, v: jax.Array, log_decay: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Key, value and log decay of the token that retires at each token: the inputs, `lag` later.

    The first `lag` retirements come from the cache. Where none is due the log decay is 0, which
    writes nothing and forgets nothing.
    """
    retires = rows.retires(call.slot_lag)[:, :, None, None]
    lag, t, cache = call.slot_lag, k.shape[1], call.cache
    streams = [k, v, log_decay]
    if lag:
        early = min(lag, t)
        if cache is None or not cache.pending_k.shape[1]:
            heads = [jnp.zeros_like(x[:, :early]) for x in streams]
        else:
            arrivals = cache.length[:, None] + jnp.arange(early)
            at_ring, at_pending = (arrivals - lag) % cache.capacity, arrivals % lag
            take = jax.vmap(lambda ring, at: ring[at])
            heads = [
                take(cache.pending_k, at_pending),
                take(cache.window_v, at_ring),
                take(cache.pending_log_decay, at_pending),
            ]
        streams = [
            jnp.concatenate([head, x[:, : t - early]], axis=1)
            for head, x in zip(heads, streams, strict=True)
        ]
    k, v, log_decay = (jnp.where(retires, x, 0) for x in streams)
    return k, v, log_decay


def final_cache(
    call: Call, rows: Rows, slots, rotated_k: jax.Array, k: jax.Array, v: jax.Array, log_decay
) -> Cache:
    """The cache after a call, from its compacted tokens and the slots after the last one."""
    cache = call.cache
    assert cache is not None  # return_cache=True without one starts from an empty one
    b, t = k.shape[:2]
    count = jnp.broadcast_to(rows.num_tokens, (b,))
    moved = count > 0
    index = jnp.arange(t, dtype=jnp.int32)[None]

    def store(ring: jax.Array, x: jax.Array) -> jax.Array:
        size = ring.shape[1]
        if not size:
            return ring
        if cache.is_new and rows.source is None and t <= size:
            return ring.at[:, :t].set(x.astype(ring.dtype))
        # Only the last `size` tokens survive; the rest go to distinct rows that do not exist.
        survives = (index < count[:, None]) & (index >= count[:, None] - size)
        at = jnp.where(survives, (cache.length[:, None] + index) % size, size + index)
        return jax.vmap(lambda r, i, y: r.at[i].set(y, mode="drop", unique_indices=True))(
            ring, at, x.astype(ring.dtype)
        )

    last = jnp.broadcast_to((count - 1).clip(0)[:, None], (b, 1))

    def at_last(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.broadcast_to(x, (b, t)), last, axis=1)[:, 0]

    changes: dict[str, Any] = {}
    empty = cache.slots_empty[:, None] | (rows.start >= 0)
    if slots is not None:
        empty = rows.slots_empty(call)
        keep = moved[:, None, None, None]
        changes["slots_k"] = jnp.where(keep, slots[0], cache.slots_k)
        changes["slots_v"] = jnp.where(keep, slots[1], cache.slots_v)
    return dataclasses.replace(
        cache,
        **changes,
        slots_empty=jnp.where(moved, at_last(empty), cache.slots_empty),
        window_k=store(cache.window_k, rotated_k),
        window_v=store(cache.window_v, v),
        pending_k=store(cache.pending_k, k),
        pending_log_decay=store(cache.pending_log_decay, log_decay),
        length=cache.length + count,
        segment_id=cache.segment_id
        if rows.ids is None
        else jnp.where(moved, at_last(rows.ids), cache.segment_id),
        segment_length=jnp.where(moved, at_last(rows.position) + 1, cache.segment_length),
    )
