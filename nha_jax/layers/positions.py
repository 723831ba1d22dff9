"""Positions of tokens within their documents, as the operator counts them."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def document_positions(
    length: int,
    segment_ids: Int[Array, "B T"] | None = None,
    previous_id: Int[Array, "B"] | None = None,
    previous_length: Int[Array, "B"] | None = None,
) -> Int[Array, "b T"]:
    """How many tokens of its document stand before each token (`operator.md`, "Packed documents").

    Padding (id 0) does not count and does not end a document; its own positions mean nothing.

    Args:
      length: number of tokens T.
      segment_ids: document ids; None: one document.
      previous_id: last non-zero document id of each row's cache; a first token with it continues
        that document.
      previous_length: tokens of that document in the cache.

    Returns:
      int32 positions, `[B,T]`, or `[1,T]` where all rows agree.
    """
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if segment_ids is None:
        return index if previous_length is None else index + previous_length[:, None]
    first = jnp.zeros_like(segment_ids[:, :1], jnp.int32)  # cut over a mesh as the ids are
    before = first if previous_id is None else previous_id[:, None]
    offset = first if previous_length is None else previous_length[:, None]
    valid = segment_ids != 0
    # Index of the last token before each position; -1: none in this call.
    last = lax.cummax(jnp.where(valid, index, -1), axis=1)
    last = jnp.concatenate([first - 1, last[:, :-1]], axis=1)
    last_id = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)
    starts = valid & (segment_ids != jnp.where(last < 0, before, last_id))
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    origin = lax.cummax(jnp.where(starts, count, -offset), axis=1)
    return jnp.maximum(count - origin, 0)
