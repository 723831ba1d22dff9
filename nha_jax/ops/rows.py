"""What each token of a call may read, once padding is out of the way.

The chunkwise implementations run on *compacted* rows: valid tokens first, in order, then padding.
Padding is thereby skipped as if removed, wherever it stood, and the rest is arithmetic on indices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nha_jax.ops.checks import Call


class Rows(NamedTuple):
    """Per token i of the compacted call; the leading axis is 1 where all rows agree."""

    valid: jax.Array  # [1|B,T] not padding
    position: jax.Array  # [1|B,T] tokens of its document before it, those of the cache included
    start: jax.Array  # [1|B,T] index of the document's first token; -1: it continues the cache's
    num_tokens: jax.Array  # [1|B] valid ones
    # Where each compacted token came from and where each original one went; None: nothing moved.
    source: jax.Array | None  # [B,T]
    target: jax.Array | None  # [B,T]
    ids: jax.Array | None  # [B,T] compacted segment ids

    def reach(self, window: int) -> jax.Array:
        """How many tokens back the window of each token reaches, [1|B,T]; -1 for padding."""
        return jnp.where(self.valid, jnp.minimum(self.position, window - 1), -1)

    def retires(self, lag: int) -> jax.Array:
        """Whether a token retires into the slots when this one arrives, [1|B,T]."""
        return self.valid & (self.position >= lag)

    def slots_empty(self, call: Call) -> jax.Array:
        """Whether the slots are empty when this token reads them, [1|B,T]."""
        empty = self.position < call.slot_lag
        if call.cache is not None:
            empty &= (self.start >= 0) | call.cache.slots_empty[:, None]
        return empty

    def compact(self, x: jax.Array) -> jax.Array:
        """Moves the valid tokens of x [B,T,...] to the front, zeros behind them."""
        if self.source is None:
            return x
        valid = self.valid.reshape(self.valid.shape + (1,) * (x.ndim - 2))
        return jnp.where(valid, _permute(x, self.source, self.target), 0)

    def restore(self, x: jax.Array) -> jax.Array:
        """Undoes `compact`: each token to its own place, zeros on padding."""
        if self.target is None:
            return x
        valid = self.valid.reshape(self.valid.shape + (1,) * (x.ndim - 2))
        return _permute(jnp.where(valid, x, 0), self.target, self.source)


def rows_of(call: Call) -> Rows:
    """Reads segment ids and cache lengths into `Rows`."""
    t = call.q.shape[1]
    index = jnp.arange(t, dtype=jnp.int32)[None]
    if call.segment_ids is None:
        everything = jnp.ones((1, t), bool)
        count = jnp.full((1,), t, jnp.int32)
        if call.cache is None:
            return Rows(everything, index, jnp.zeros_like(index), count, None, None, None)
        position = call.cache.segment_length[:, None] + index
        return Rows(everything, position, -jnp.ones_like(index), count, None, None, None)

    is_token = call.segment_ids != 0
    count = is_token.sum(1, dtype=jnp.int32)
    before = jnp.cumsum(is_token, axis=1, dtype=jnp.int32) - is_token
    target = jnp.where(is_token, before, count[:, None] + index - before)
    source = _inverse(target)
    ids = jnp.take_along_axis(call.segment_ids, source, axis=1)
    valid = index < count[:, None]

    first = jnp.zeros_like(count) if call.cache is None else call.cache.segment_id
    previous = jnp.concatenate([first[:, None], ids[:, :-1]], axis=1)
    starts = valid & (ids != previous)
    # Padding at the end carries the last document on, so that states pass through it unchanged.
    start = jax.lax.cummax(jnp.where(starts, index, -1), axis=1)
    position = index - jnp.maximum(start, 0)
    if call.cache is not None:
        position += jnp.where(start < 0, call.cache.segment_length[:, None], 0)
    return Rows(valid, position, start, count, source, target, ids)


def _inverse(permutation: jax.Array) -> jax.Array:
    """The inverse of each row's permutation: one scatter, where sorting is slow on GPUs."""
    index = jnp.arange(permutation.shape[1], dtype=permutation.dtype)

    def row(target):
        return jnp.zeros_like(target).at[target].set(index, unique_indices=True)

    return jax.vmap(row)(permutation)


@jax.custom_vjp
def _permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[b, index[b]]: a gather whose transpose is a gather too (a scatter-add is slow on GPUs)."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _permute_forward(x, index, inverse):
    return _permute(x, index, inverse), (index, inverse)


def _permute_backward(residuals, cotangent):
    index, inverse = residuals
    return _permute(cotangent, inverse, index), None, None


_permute.defvjp(_permute_forward, _permute_backward)
