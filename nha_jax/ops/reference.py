"""The definition read aloud: token by token, one row of the batch at a time.

Slow and plain on purpose. Every other implementation is tested against this one. Letters as in
`operator.md`; equations as in arXiv 2510.07019, section 3 (slots: gated linear recurrence; read:
one softmax over slots and window).
"""

import dataclasses

import jax
import jax.numpy as jnp

from nha_jax.ops.cache import Cache, init_cache
from nha_jax.ops.checks import Call
from nha_jax.ops.rotary import rotate

_HIGHEST = jax.lax.Precision.HIGHEST


def reference(call: Call) -> tuple[jax.Array, jax.Array, Cache | None]:
    """Runs one checked call. Returns output [B,T,N,V], slot mass [B,T,N] and the final cache."""
    b, t, _, key_size = call.q.shape
    g, value_size, num_slots = call.k.shape[2], call.v.shape[3], call.log_decay.shape[3]
    cache = call.cache
    if cache is None:
        cache = init_cache(
            b,
            num_kv_heads=g,
            key_size=key_size,
            value_size=value_size,
            num_slots=num_slots,
            window=call.window,
            slot_lag=call.slot_lag,
            max_length=t,
            dtype=call.q.dtype,
        )
    tokens = {
        "q": call.q,
        "rotated_q": rotate(call.q, call.rope),
        "k": call.k,
        "rotated_k": rotate(call.k, call.rope),
        "v": call.v,
        "log_decay": call.log_decay.astype(call.state_dtype),
        # Without segment ids every token continues the row's document, whatever its id.
        "segment_id": cache.segment_id[:, None].repeat(t, 1)
        if call.segment_ids is None
        else call.segment_ids,
    }

    def row(state: Cache, tokens):
        return jax.lax.scan(lambda s, token: _step(call, s, token), state, tokens)

    final, (out, slot_mass) = jax.vmap(row)(cache, tokens)
    return out.astype(call.q.dtype), slot_mass, final


def _step(call: Call, state: Cache, token: dict[str, jax.Array]):
    """One token of one row: the cache after it, and what the token reads."""
    after, read = _advance(call, state, token)
    if call.segment_ids is None:
        return after, read
    is_token = token["segment_id"] != 0  # id 0 is padding: as if removed

    def keep(new, old):
        return jnp.where(is_token, new, old)

    return jax.tree.map(keep, after, state), tuple(jnp.where(is_token, x, 0) for x in read)


def _advance(call: Call, state: Cache, token: dict[str, jax.Array]):
    window, lag, dtype = call.window, call.slot_lag, call.state_dtype
    capacity, pending = state.window_k.shape[0], state.pending_k.shape[0]
    here = state.length  # this token's position in the row

    # A change of id starts a new document: slots zero and empty, the window begins here.
    starts = token["segment_id"] != state.segment_id
    t = jnp.where(starts, 0, state.segment_length)  # this token's position in its document
    slots_k = jnp.where(starts, 0, state.slots_k)
    slots_v = jnp.where(starts, 0, state.slots_v)
    empty = starts | state.slots_empty

    # The token enters the window, and waits to retire.
    window_k, window_v = state.window_k, state.window_v
    pending_k, pending_log_decay = state.pending_k, state.pending_log_decay
    if capacity:
        window_k = window_k.at[here % capacity].set(token["rotated_k"])
        window_v = window_v.at[here % capacity].set(token["v"])
    if lag == 0:
        leaving = token["k"], token["v"], token["log_decay"]
    elif pending:
        # Read before writing: ring row here % lag still holds the token of position here - lag.
        at = here % pending
        previous_v = state.window_v[(here - lag) % capacity]
        leaving = pending_k[at], previous_v, pending_log_decay[at]
        pending_k = pending_k.at[at].set(token["k"])
        pending_log_decay = pending_log_decay.at[at].set(token["log_decay"])

    # Token t - lag retires: S <- diag(alpha) S + (1 - alpha) (x) k.
    if call.log_decay.shape[3] and (lag == 0 or pending):
        retires = t >= lag
        k_j, v_j, log_alpha = (x.astype(dtype) for x in leaving)  # [G,K] [G,V] [G,M]
        alpha, write = jnp.exp(log_alpha)[..., None], -jnp.expm1(log_alpha)[..., None]
        slots_k = jnp.where(retires, alpha * slots_k + write * k_j[:, None], slots_k)
        slots_v = jnp.where(retires, alpha * slots_v + write * v_j[:, None], slots_v)
        empty = empty & ~retires

    # One softmax over M slots and at most W tokens.
    heads = call.q.shape[2] // call.k.shape[2]
    q = token["q"].reshape(-1, heads, call.q.shape[3]).astype(dtype)  # [G,R,K]
    rotated_q = token["rotated_q"].reshape(q.shape).astype(dtype)
    slot_scores = call.scale * jnp.einsum("grk,gmk->grm", q, slots_k, precision=_HIGHEST)
    if call.empty_slots == "mask":
        slot_scores = jnp.where(empty, -jnp.inf, slot_scores)
    age = (here - jnp.arange(capacity)) % max(capacity, 1)
    in_window = (age < window) & (age <= t)
    window_scores = call.scale * jnp.einsum(
        "grk,sgk->grs", rotated_q, window_k.astype(dtype), precision=_HIGHEST
    )
    window_scores = jnp.where(in_window, window_scores, -jnp.inf)
    p = jax.nn.softmax(jnp.concatenate([slot_scores, window_scores], axis=-1), axis=-1)
    p_slots, p_window = jnp.split(p, [slot_scores.shape[-1]], axis=-1)
    out = jnp.einsum("grm,gmv->grv", p_slots, slots_v, precision=_HIGHEST) + jnp.einsum(
        "grs,sgv->grv", p_window, window_v.astype(dtype), precision=_HIGHEST
    )

    after = dataclasses.replace(
        state,
        slots_k=slots_k,
        slots_v=slots_v,
        slots_empty=empty,
        window_k=window_k,
        window_v=window_v,
        pending_k=pending_k,
        pending_log_decay=pending_log_decay,
        length=here + 1,
        segment_id=token["segment_id"],
        segment_length=t + 1,
    )
    return after, (out.reshape(-1, out.shape[-1]), p_slots.sum(-1).reshape(-1))
