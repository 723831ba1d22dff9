"""The state a call can start from and return: slots, window ring, tokens waiting to retire."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp

from nha_jax.ops.checks import DTYPE_NAMES, DTYPES, ArgumentError, resolve_slot_lag

_ARRAYS = (
    "slots_k",
    "slots_v",
    "slots_empty",
    "window_k",
    "window_v",
    "pending_k",
    "pending_log_decay",
    "length",
    "segment_id",
    "segment_length",
)
# Of these a token changes one row.
_RINGS = ("window_k", "window_v", "pending_k", "pending_log_decay")
# Axis of the key/value heads, in the leaves that have one.
HEAD_AXES = {
    "slots_k": 1,
    "slots_v": 1,
    "window_k": 2,
    "window_v": 2,
    "pending_k": 2,
    "pending_log_decay": 2,
}
_STATIC = ("window", "slot_lag", "max_length", "is_new")


@dataclasses.dataclass(frozen=True)
class Cache:
    """What the operator remembers of the past, per row of the batch.

    Rings hold the token at row position `p` in row `p % size`, so equal histories give equal
    caches. Positions count the row's tokens without padding.

    The caches of several layers can be stacked: every leaf then has one more axis in front, and
    `at_layer` names the layer that a call is for. The call returns the stack with that layer's part
    changed, where it lies: a loop over layers can carry the stack without copying it.
    """

    # Any: leaves are arrays, but also ShapeDtypeStructs, shardings or axes in transformed trees.
    slots_k: Any  # [B,G,M,K] float32 (float64 in a float64 cache)
    slots_v: Any  # [B,G,M,V]
    slots_empty: Any  # [B] bool: no token of the document has retired
    window_k: Any  # [B,capacity,G,K] rotated keys
    window_v: Any  # [B,capacity,G,V]
    pending_k: Any  # [B,lag or 0,G,K] unrotated keys that wait to retire
    pending_log_decay: Any  # [B,lag or 0,G,M] float32 (float64)
    length: Any  # [B] int32: tokens so far
    segment_id: Any  # [B] int32: the last id that was not 0
    segment_length: Any  # [B] int32: tokens of that document so far
    window: int
    slot_lag: int
    max_length: int
    is_new: bool = False
    layer: Any = None  # int32 []: leaves are stacked [L,...], and this is the layer at hand

    def at_layer(self, layer: jax.Array | int | None) -> "Cache":
        """A stack of caches with the layer that a call is for; None: just the stack."""
        return dataclasses.replace(self, layer=layer)

    def unstacked(self) -> "Cache":
        """The cache of the layer at hand."""
        stack = self.at_layer(None)
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False), stack
        )

    def with_unstacked(self, cache: "Cache", tokens: int) -> "Cache":
        """The stack after a call of so many tokens a row left `cache` to the layer at hand."""
        changes = {}
        if tokens == 1:
            # Writing all of a long window costs more than reading it.
            layer = jnp.asarray(self.layer)
            before = jax.lax.dynamic_index_in_dim(self.length, layer, keepdims=False)
            row = jnp.arange(before.shape[0])
            for name in _RINGS:
                ring, new = getattr(self, name), getattr(cache, name)
                if size := ring.shape[2]:
                    at = before % size
                    rows = ring.at[layer, row, at]
                    changes[name] = rows.set(new[row, at], unique_indices=True)
        whole = {
            name: jax.lax.dynamic_update_index_in_dim(
                getattr(self, name), getattr(cache, name), self.layer, 0
            )
            for name in _ARRAYS
            if name not in changes
        }
        return self.replace(**changes, **whole, is_new=False)

    def as_new(self) -> "Cache":
        """The same cache with a promise that it holds no token and its slots are empty.

        Then a call need not read it. A row of which this is not true is an error where its numbers
        are concrete; under jit its output is NaN. The cache that a call returns makes no promise.
        """
        return dataclasses.replace(self, is_new=True)

    def replace(self, **changes) -> "Cache":
        """A copy with some leaves replaced, for example `slots_k`, `slots_v`, `slots_empty`."""
        return dataclasses.replace(self, **changes)

    @property
    def capacity(self) -> int:
        """Rows of the window's ring."""
        return self.window_k.shape[-3]

    @property
    def is_bounded(self) -> bool:
        """Whether a document beyond `max_length` would lose tokens that are still to be read."""
        return self.window > self.max_length


jax.tree_util.register_dataclass(Cache, data_fields=(*_ARRAYS, "layer"), meta_fields=_STATIC)


@typing.no_type_check  # checked by hand below, with better messages than a type checker's
def init_cache(
    batch: int,
    *,
    num_kv_heads: int,
    key_size: int,
    value_size: int,
    num_slots: int,
    window: int,
    slot_lag: int | None = None,
    max_length: int,
    dtype: jax.typing.DTypeLike,
) -> Cache:
    """An empty cache.

    Args:
      batch: rows B.
      num_kv_heads: G.
      key_size: K.
      value_size: V.
      num_slots: M; 0 for a layer without slots.
      window: W, tokens read exactly; beyond `max_length`: the whole document ("full" attention).
      slot_lag: how many tokens after its arrival a token retires into the slots; None: `window`.
      max_length: the longest document that a layer with `window > max_length` can hold, in tokens.
        Layers with a smaller window are not bounded by it.
      dtype: of q, k and v in the calls to come. Slots and log decays are float32 (float64 for
        float64).

    Returns:
      A `Cache` with `min(max(W, lag), max_length)` window rows, and `lag` pending rows (none
      without slots, and none where `lag >= max_length` and `W > max_length`: a document is then
      bounded by `max_length`, and none of its tokens can retire).

    Raises:
      ArgumentError: naming the argument, its value and what would be right.
    """
    for name, value, least in (
        ("batch", batch, 1),
        ("num_kv_heads", num_kv_heads, 1),
        ("key_size", key_size, 1),
        ("value_size", value_size, 1),
        ("num_slots", num_slots, 0),
        ("max_length", max_length, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ArgumentError(f"{name}={value!r}: expected an int of at least {least}")
    lag = resolve_slot_lag(window, slot_lag, num_slots)
    dtype = jnp.dtype(dtype)
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype={dtype.name}: expected one of {DTYPE_NAMES}")
    state_dtype = jnp.promote_types(dtype, jnp.float32)
    capacity = min(max(window, lag), max_length)
    # With window == lag == max_length a document may outgrow max_length (only larger windows are
    # bounded by it), and its tokens then retire: they have to be kept.
    never_retires = num_slots == 0 or (window > max_length and lag >= max_length)
    pending = 0 if never_retires else lag
    heads = num_kv_heads
    # Distinct buffers throughout: a cache is donated whole, and a buffer can be donated only once.
    return Cache(
        slots_k=jnp.zeros((batch, heads, num_slots, key_size), state_dtype),
        slots_v=jnp.zeros((batch, heads, num_slots, value_size), state_dtype),
        slots_empty=jnp.ones((batch,), bool),
        window_k=jnp.zeros((batch, capacity, heads, key_size), dtype),
        window_v=jnp.zeros((batch, capacity, heads, value_size), dtype),
        pending_k=jnp.zeros((batch, pending, heads, key_size), dtype),
        pending_log_decay=jnp.zeros((batch, pending, heads, num_slots), state_dtype),
        length=jnp.zeros((batch,), jnp.int32),
        segment_id=jnp.zeros((batch,), jnp.int32),
        segment_length=jnp.zeros((batch,), jnp.int32),
        window=window,
        slot_lag=lag,
        max_length=max_length,
    )
