"""The arrays of a cache, as the decode kernels see them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.decode_blocks import DecodeSpec

# One number per row.
SMALL = ("slots_empty", "length", "segment_id", "segment_length")
# Leaves that the kernels update in place.
IN_PLACE = ("slots_k", "slots_v", "window_k", "window_v", "pending_k", "pending_log_decay")


class Leaves(NamedTuple):
    """A cache's arrays, or those of several layers, stacked; shapes as in `decode_step`."""

    slots_k: jax.Array
    slots_v: jax.Array
    slots_empty: jax.Array
    window_k: jax.Array
    window_v: jax.Array
    pending_k: jax.Array
    pending_log_decay: jax.Array
    length: jax.Array
    segment_id: jax.Array
    segment_length: jax.Array


class OfLayer:
    """A ref of stacked arrays as one of the layer at hand."""

    def __init__(self, ref: Any, layer: Any) -> None:
        self._ref, self._layer = ref, layer
        self.dtype, self.shape = ref.dtype, ref.shape[1:]

    @property
    def at(self) -> "OfLayer":
        return self

    def __getitem__(self, index: tuple) -> Any:
        return self._ref.at[(self._layer, *index)]


def small_leaves(spec: DecodeSpec, leaves: Leaves, token_ids, layer) -> dict[str, jax.Array]:
    """The leaves of one number per row: outside the kernel, whose programs share them."""
    if layer is None:
        return _small_leaves(spec, leaves, token_ids)
    at = (jnp.broadcast_to(layer, (spec.batch,)), jnp.arange(spec.batch))
    of_layer = {name: getattr(leaves, name)[at] for name in SMALL}
    after = _small_leaves(spec, leaves._replace(**of_layer), token_ids)
    return {name: getattr(leaves, name).at[at].set(x) for name, x in after.items()}


def _small_leaves(spec: DecodeSpec, leaves: Leaves, token_ids) -> dict[str, jax.Array]:
    starts, t = False, leaves.segment_length
    if token_ids is not None:
        ids = token_ids[:, 0]
        starts, t = ids != leaves.segment_id, jnp.where(ids != leaves.segment_id, 0, t)
    empty = starts | leaves.slots_empty
    if spec.updates_slots:
        empty &= t < spec.slot_lag
    after = {"slots_empty": empty, "length": leaves.length + 1, "segment_length": t + 1}
    if token_ids is None:
        return after
    after["segment_id"] = ids
    return {name: jnp.where(ids != 0, x, getattr(leaves, name)) for name, x in after.items()}
